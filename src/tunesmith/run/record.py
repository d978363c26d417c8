"""What a run writes down beside its weights: `run.json`, predictions, and how far it has come."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.errors import ResourceError, redact
from tunesmith.kernels.ops.quantized import numbers_in
from tunesmith.run.prepare import Prepared
from tunesmith.storage import files
from tunesmith.tasks import Answer
from tunesmith.training import loop, machine, parallel

STAGES = "stages.yaml"
"""In the folder that holds the runs of a recipe's stages."""

SAMPLES = 5
"""Rows whose answers before and after stand in the card."""

LIBRARIES = ("tunesmith", "torch", "transformers", "safetensors", "tokenizers", "numpy")


@dataclass
class Progress:
    """What changes as a run goes, beside tensors; saved in each checkpoint."""

    step: int = 0
    best: float | None = None
    best_loss: float | None = None
    """At that step: of equal scores that with the lower loss is the better."""
    best_step: int | None = None
    stale: int = 0
    skips: int = 0
    seconds: float = 0.0
    examples: int = 0
    cost: int = 0
    """In the units of the task (tokens, pixels)."""
    loss_sum: float = 0.0
    """Of the steps since the last evaluation, those of before a resume too."""
    loss_steps: int = 0
    threads: int = 0
    max_examples: int = 0
    checkpointing: bool = False
    fp16_scale: float = loop.FP16_SCALE
    fp16_good_steps: int = 0
    overridden: list[str] = field(default_factory=list)
    before: dict[str, Any] | None = None
    """What the body scored as it came, by split; only of a task that bases can do."""
    said_before: dict[str, str] = field(default_factory=dict)
    """What it wrote for some validation rows, by their number."""


def resume_command(folder: Path) -> str:
    """What goes on with a run, or with all the stages that it is one of."""
    return parallel.command("train", "--resume", folder.parent if (folder.parent / STAGES).exists() else folder)


RESULT = (
    "run task technique steps best_step seconds examples_per_second trainable_parameters total_parameters "
    "peak_memory_bytes metrics"
).split()


def result_in(about: Mapping[str, Any]) -> dict[str, Any]:
    """The result that `run.json` of a finished run holds."""
    return {key: value for key, value in about.items() if key in RESULT or key.endswith("_per_second")}


def result(prepared: Prepared, progress: Progress, folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """What `tunesmith train --json` prints."""
    seconds = max(progress.seconds, 1e-9)
    parameters = list(prepared.model.parameters())
    return {
        "run": str(folder),
        "task": prepared.task.name,
        "technique": prepared.technique.name,
        "steps": progress.step,
        "best_step": progress.best_step,
        "seconds": round(progress.seconds, 3),
        "examples_per_second": round(progress.examples / seconds, 2),
        f"{prepared.task.unit}_per_second": round(progress.cost / seconds, 2),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "total_parameters": numbers_in(prepared.model),
        "peak_memory_bytes": prepared.machine.peak_memory_bytes(),
        "metrics": metrics,
    }


def write_run(folder: Path, prepared: Prepared, progress: Progress, outcome: dict[str, Any]) -> None:
    """`run.json`: everything that is needed to know what was done with what, and to go on."""
    source, before = prepared.base.source, files.read_json(folder / "run.json")
    lineage = _lineage(prepared.continued or (source.folder.parent if source.kind == "run" else None))
    about = {
        **outcome,
        "command": before.get("command") or redact(shlex.join(sys.argv)),  # a resume is no other run
        "resume": resume_command(folder),
        "seed": prepared.recipe.train.seed,
        "overridden": progress.overridden,
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
    """Where an earlier run, the base or gone on with, came from, and what that came from: the youngest first."""
    earlier = files.read_json(run / "run.json") if run is not None else {}
    if "model" not in earlier:  # no run, or one that was merged from several
        return []
    about = {key: earlier.get(key) for key in ("run", "task", "technique", "steps")}
    base = {key: earlier["model"][key] for key in ("spec", "kind", "revision", "sha256")}
    return [about | {"model": base}, *earlier["model"].get("lineage", [])]


def ended(folder: Path, outcome: str) -> None:
    """Note in `run.json` how a run ended that did not finish."""
    about = files.read_json(folder / "run.json") if parallel.rank() == 0 else {}
    if about.get("outcome") == "running":  # a finished run whose resumption was refused is still done
        about["outcome"] = redact(outcome)
        with contextlib.suppress(ResourceError):  # on a full disk what ended the run counts, not that it is not noted
            files.atomic_write(folder / "run.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def first_answers(prepared: Prepared, answers: list[Answer]) -> dict[str, str]:
    """The first answers on validation as text, by the number of their row."""
    rows = prepared.examples.splits["validation"].rows()
    given = ((number, row, answer) for number, (row, answer) in enumerate(zip(rows, answers, strict=True)) if answer)
    return {str(number): prepared.task.render(answer, row) for number, row, answer in islice(given, SAMPLES)}


def samples(prepared: Prepared, progress: Progress, answers: list[Answer]) -> list[dict[str, str]]:
    """Some validation rows: prompt and reference, and the answers before and after."""
    before, generator = {int(row): text for row, text in progress.said_before.items()}, prepared.bound.generator
    if generator is None or not before or not answers:
        return []
    found = []
    for number, row in enumerate(prepared.examples.splits["validation"].rows()):
        if number in before and answers[number]:
            prompt, reference = generator.reference_pair(row)
            after = prepared.task.render(answers[number], row)
            told = {"row": row.place, "asked": prompt, "meant": reference, "before": before[number], "after": after}
            found.append(told)
    return found


def write_predictions(prepared: Prepared, answers: list[dict[str, Any]], folder: Path) -> None:
    """Every row of the test split as read, with the answer beside it."""
    said = zip(prepared.examples.splits["test"].rows(), answers, strict=True)
    full = ({"row": r.place, **r.values, "prediction": prepared.bound.postprocess(one, r)} for r, one in said if one)
    lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in full)
    files.atomic_write(folder / "predictions-test.jsonl", "".join(lines))
