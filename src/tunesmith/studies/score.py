"""Evaluation of a finished run, or of its base model, on a split or a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from tunesmith.console import Console
from tunesmith.data.columns import predicts_text
from tunesmith.data.encoded import Encoded
from tunesmith.data.formats import find_splits, is_folder
from tunesmith.deploy import predict
from tunesmith.errors import DataError, RecipeError
from tunesmith.models import load as models
from tunesmith.models import sources
from tunesmith.studies import probe
from tunesmith.tasks import Task
from tunesmith.training import dataset
from tunesmith.training import evaluate as evaluation


def evaluate(
    run: str | Path,
    *,
    data: str | Path | None = None,
    split: str | None = None,
    base: bool = False,
    device: str = "auto",
    offline: bool = False,
    allow_pickle: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Return the scores of a run on one of its splits (default: test, else validation), or on another file.

    `data` is a file, or a folder with a file for `split`; `notes` of the result count the rows skipped in it.
    `baseline` has the scores of the baseline named `baseline_name`. With `base`, `metrics` are the scores of the base
    model: its own if its head does the task, else those of a linear probe on its features; `run_metrics` has the run's.

    Raises:
        DataError: the file cannot be read, or the split has changed since training.
        RecipeError: the run has no such split.
    """
    console = console or Console()
    tuned = predict.load(run, device=device, offline=offline, allow_pickle=allow_pickle)
    split = split or ("validation" if tuned.data.test is None else "test")
    with console.during(f"reading and encoding {data or split}"):
        if data is None:
            chosen, notes = _split(tuned, Path(run), split), list[str]()
        else:
            data = _in_folder(Path(data), split, tuned.task)
            chosen, notes = dataset.read_other(data, tuned.task, tuned.data.model_copy(update={"limit": None}))
        encoded = _encode(tuned, chosen)
    result = {"run": str(run), "split": str(data or split), "base": base, "examples": len(encoded), "notes": notes}
    result["metric"] = tuned.bound.metrics().primary
    try:
        with console.during("reading the training targets"):
            train = _encode(tuned, _split(tuned, Path(run), "train"))
            result["baseline"] = evaluation.baseline(tuned.bound, train, encoded)
            result["baseline_name"] = tuned.task.baseline_name
    except DataError as error:  # without training data a run can be scored, but no probe can be fitted
        if base:
            raise
        notes.append(f"no baseline: the training targets cannot be read ({error})")
    own = _scores(tuned.model, tuned, encoded, console, f"scoring {data or split}")
    if base:
        source = sources.resolve(tuned.recipe.model, offline=offline, allow_pickle=allow_pickle)
        scored = _base_scores(tuned, source, encoded, notes, console) if tuned.task.base_has_head else None
        result |= {"probe": scored is None, "run_metrics": own}
        with console.during("fitting a linear probe on the base model"):
            return result | {"metrics": scored or probe.scores(tuned, source, train, encoded)}
    return result | {"metrics": own}


def _in_folder(data: Path, split: str, task: Task) -> Path:
    """Return the file itself, or the file of the split in a folder."""
    files = find_splits(data, pairs=predicts_text(task.columns)) if is_folder(data) else {}
    if files and split not in files:
        hint = f"use --split {' or '.join(sorted(files))}"
        raise DataError(f"no {split} file in this folder", where=str(data), hint=hint)
    return files.get(split, data)


def _scores(
    model: nn.Module, tuned: predict.FineTunedModel, encoded: Encoded, console: Console, what: str
) -> dict[str, Any]:
    answers = tuned.bound.metrics().answers_needed(encoded)
    with console.progress(len(encoded) + answers, of=what, unit="example") as show:
        return evaluation.scores(
            model, tuned.bound, encoded, tuned.machine, answers=True, show=lambda done: show(done, what)
        )


def _base_scores(
    tuned: predict.FineTunedModel, source: sources.Source, encoded: Encoded, notes: list[str], console: Console
) -> dict[str, Any]:
    """Return the scores of the base model with its own head."""
    model, anatomy = predict.base_of(tuned, source)
    if anatomy.new:
        notes.append("the checkpoint of the base has no head for this task: these are the scores of a random head")
    return _scores(model, tuned, encoded, console, "scoring the base model")


def _split(tuned: predict.FineTunedModel, run: Path, split: str) -> dataset.Split:
    read = dataset.read(tuned.task, tuned.data, tuned.recipe.train.seed)
    if split not in read.splits:
        known = ", ".join(sorted(read.splits))
        raise RecipeError(f"the run has no {split} split", where=str(run), hint=f"use one of {known}, or --data FILE")
    trained_on = json.loads((run / "run.json").read_text(encoding="utf-8"))["data"]["sha256"]
    if (now := read.fingerprints()[split]) != trained_on.get(split):
        raise DataError(
            "the file has changed since training",
            where=str(read.splits[split].table.path),
            hint=f"its sha256 is now {now[:12]}; to score other rows, use --data",
        )
    return read.splits[split]


def _encode(tuned: predict.FineTunedModel, split: dataset.Split) -> Encoded:
    cache = sources.cache_home() / "encoded"
    return dataset.encode_split(split, tuned.bound, models.processor_hash(tuned.processor), cache)
