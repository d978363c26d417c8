"""The files that a run writes besides its weights: `run.json`, `predictions-test.jsonl`, and its result."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.errors import ResourceError, redact
from tunesmith.kernels.ops.quantized import numbers_in
from tunesmith.run.prepare import Prepared
from tunesmith.run.state import TrainState
from tunesmith.storage import files
from tunesmith.tasks import Answer
from tunesmith.training import loop, machine, parallel
from tunesmith.training.machine import Machine

STAGES = "stages.yaml"
"""File in the folder of a recipe with stages."""

SAMPLES = 5
"""Number of rows that the card shows, with the answers before and after training."""

LIBRARIES = ("tunesmith", "torch", "transformers", "safetensors", "tokenizers", "numpy")


def resume_command(folder: Path) -> str:
    """Return the command that resumes a run, or the whole recipe if the run is one of its stages."""
    return parallel.command("train", "--resume", folder.parent if (folder.parent / STAGES).exists() else folder)


RESULT = (
    "run task technique steps best_step seconds examples_per_second trainable_parameters total_parameters "
    "peak_memory_bytes metrics"
).split()


def result_in(about: Mapping[str, Any]) -> dict[str, Any]:
    """Extract the result from a finished run's `run.json`."""
    return {key: value for key, value in about.items() if key in RESULT or key.endswith("_per_second")}


def result(prepared: Prepared, state: TrainState, folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the object that `tunesmith train --json` prints."""
    seconds = max(state.seconds, 1e-9)
    parameters = list(prepared.model.parameters())
    return {
        "run": str(folder),
        "task": prepared.task.name,
        "technique": prepared.technique.name,
        "steps": state.step,
        "best_step": state.best_step,
        "seconds": round(state.seconds, 3),
        "examples_per_second": round(state.examples / seconds, 2),
        f"{prepared.task.unit}_per_second": round(state.cost / seconds, 2),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "total_parameters": numbers_in(prepared.model),
        "peak_memory_bytes": prepared.machine.peak_memory_bytes(),
        "metrics": metrics,
    }


def write_run(folder: Path, prepared: Prepared, state: TrainState, outcome: dict[str, Any]) -> None:
    """Write `run.json`: versions, command, seed, hashes, hardware and outcome, to reproduce and resume the run."""
    source, before = prepared.base.source, files.read_json(folder / "run.json")
    lineage = _lineage(prepared.continued or (source.folder.parent if source.kind == "run" else None))
    about = {
        **outcome,
        "command": before.get("command") or redact(shlex.join(sys.argv)),  # a resumed run keeps its first command
        "resume": resume_command(folder),
        "seed": prepared.recipe.train.seed,
        "overridden": state.overridden,
        "world_size": parallel.world_size(),
        "model": {
            "spec": redact(source.spec),
            "kind": source.kind,
            "revision": source.revision,
            "license": source.license,
            "package_license": source.package_license,
            "sha256": source.sha256(),
            "family": prepared.anatomy.family,
            "lineage": lineage or before.get("model", {}).get("lineage", []),
        },
        "data": {
            "rows": prepared.examples.rows,
            "sha256": prepared.examples.fingerprints(),
            "notes": prepared.examples.notes,
        },
        "learned": list(prepared.learned),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "hardware": machine.describe(prepared.machine),
        "fast_path": prepared.fast_path.dump(),
    }
    files.atomic_write(folder / "run.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _lineage(run: Path | None) -> list[dict[str, Any]]:
    """Return the earlier runs that a run starts from, most recent first."""
    earlier = files.read_json(run / "run.json") if run is not None else {}
    if "model" not in earlier:  # not a run, or merged from several runs
        return []
    about = {key: earlier.get(key) for key in ("run", "task", "technique", "steps")}
    base = {key: earlier["model"][key] for key in ("spec", "kind", "revision", "sha256")}
    return [about | {"model": base}, *earlier["model"].get("lineage", [])]


def ended(folder: Path, outcome: str) -> None:
    """Write the outcome of an unfinished run to `run.json`."""
    about = files.read_json(folder / "run.json") if parallel.rank() == 0 else {}
    if about.get("outcome") == "running":  # a finished run stays done when resuming it is refused
        about["outcome"] = redact(outcome)
        with contextlib.suppress(ResourceError):  # on a full disk, the first error is the one to report
            files.atomic_write(folder / "run.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def step_metrics(step: loop.Step, machine: Machine, unit: str) -> dict[str, Any]:
    """Return the line of one step in `metrics.jsonl`."""
    return {
        "step": step.number,
        "epoch": round(step.epoch, 6),
        "loss": json_number(step.loss),
        "learning_rate": step.learning_rate,
        "grad_norm": json_number(step.grad_norm),
        "examples_per_s": round(step.examples / step.seconds, 2),
        f"{unit}_per_s": round(step.cost / step.seconds, 2),
        "memory_bytes": machine.peak_memory_bytes(),
    }


def json_number(value: float) -> float | str:
    """Return NaN and infinity as strings, because JSON has neither."""
    return value if math.isfinite(value) else str(value)


def log(folder: Path, line: dict[str, Any]) -> None:
    """Append a line to `metrics.jsonl`."""
    if parallel.rank() == 0:
        files.append_line(folder / "metrics.jsonl", line)


def first_answers(prepared: Prepared, answers: list[Answer]) -> dict[str, str]:
    """Return the first answers on validation as text, by row number."""
    rows = prepared.examples.splits["validation"].rows()
    given = ((number, row, answer) for number, (row, answer) in enumerate(zip(rows, answers, strict=True)) if answer)
    return {str(number): prepared.task.render(answer, row) for number, row, answer in islice(given, SAMPLES)}


def samples(prepared: Prepared, state: TrainState, answers: list[Answer]) -> list[dict[str, str]]:
    """Return some validation rows with prompt, reference, and the answers before and after training."""
    before, generator = {int(row): text for row, text in state.said_before.items()}, prepared.bound.generator
    if generator is None or not before or not answers:
        return []
    rows = []
    for number, row in enumerate(prepared.examples.splits["validation"].rows()):
        if number in before and answers[number]:
            prompt, reference = generator.reference_pair(row)
            after = prepared.task.render(answers[number], row)
            sample = {"row": row.place, "prompt": prompt, "reference": reference}
            rows.append(sample | {"before": before[number], "after": after})
    return rows


def write_predictions(prepared: Prepared, answers: list[dict[str, Any]], folder: Path) -> None:
    """Write every answered row of the test split with its prediction."""
    answered = zip(prepared.examples.splits["test"].rows(), answers, strict=True)
    predictions = (
        {"row": row.place, **row.values, "prediction": prepared.bound.postprocess(answer, row)}
        for row, answer in answered
        if answer
    )
    lines = (json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    files.atomic_write(folder / "predictions-test.jsonl", "".join(lines))
