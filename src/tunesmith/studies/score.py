"""Scores a finished run, or the untouched base beside it, on any split or file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from tunesmith.console import Talk
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
    talk: Talk | None = None,
) -> dict[str, Any]:
    """The scores of a run on one of its splits (by default test, else validation), or on another file, or a folder's
    file of that split (`notes`: what was left out of that).

    `baseline` has the scores of a predictor that has seen only the training targets (`baseline_name`). With
    `base`, `metrics` are those of a linear probe on the features of the untouched base, what the model knew before, or
    the base's own where it can do the task as it is; and `run_metrics` the run's own.

    Raises:
        DataError: the run has no such split, or the file cannot be read.
    """
    talk = talk or Talk()
    tuned = predict.load(run, device=device, offline=offline, allow_pickle=allow_pickle)
    split = split or ("validation" if tuned.data.test is None else "test")
    with talk.during(f"reading and encoding {data or split}"):
        if data is None:
            chosen, notes = _split(tuned, Path(run), split), list[str]()
        else:
            data = _in_folder(Path(data), split, tuned.task)
            chosen, notes = dataset.read_other(data, tuned.task, tuned.data.model_copy(update={"limit": None}))
        encoded = _encode(tuned, chosen)
    about = {"run": str(run), "split": str(data or split), "base": base, "examples": len(encoded), "notes": notes}
    about["metric"] = tuned.bound.metrics().primary
    try:
        with talk.during("reading the training labels"):
            train = _encode(tuned, _split(tuned, Path(run), "train"))
            about["baseline"] = evaluation.baseline(tuned.bound, train, encoded)
            about["baseline_name"] = tuned.task.baseline_name
    except DataError as error:  # a run is scored where its training data is gone, but no probe is fitted
        if base:
            raise
        notes.append(f"no baseline: the training targets cannot be read ({error})")
    own = _scores(tuned.model, tuned, encoded, talk, f"scoring {data or split}")
    if base:
        source = sources.resolve(tuned.recipe.model, offline=offline, allow_pickle=allow_pickle)
        scored = _as_it_came(tuned, source, encoded, notes, talk) if tuned.task.base_has_head else None
        about |= {"probe": scored is None, "run_metrics": own}
        with talk.during("fitting a linear probe on the untouched base"):
            return about | {"metrics": scored or probe.scores(tuned, source, train, encoded)}
    return about | {"metrics": own}


def _in_folder(data: Path, split: str, task: Task) -> Path:
    """The file itself, or that of the split in a folder of several."""
    found = find_splits(data, pairs=predicts_text(task.columns)) if is_folder(data) else {}
    if found and split not in found:
        hint = f"--split {' or '.join(sorted(found))}"
        raise DataError(f"no file for {split} in this folder", where=str(data), hint=hint)
    return found.get(split, data)


def _scores(model: nn.Module, tuned: predict.Tuned, encoded: Encoded, talk: Talk, what: str) -> dict[str, Any]:
    answers = tuned.bound.metrics().answers_needed(encoded)
    with talk.progress(len(encoded) + answers, of=what, unit="example") as show:
        return evaluation.scores(
            model, tuned.bound, encoded, tuned.machine, answers=True, show=lambda done: show(done, what)
        )


def _as_it_came(
    tuned: predict.Tuned, source: sources.Source, encoded: Encoded, notes: list[str], talk: Talk
) -> dict[str, Any]:
    """The scores of the base at a task that it can do, if its head is in the checkpoint."""
    model, anatomy = predict.base_of(tuned, source)
    if anatomy.new:
        notes.append("the base has no head for this task: what it scores is what a random one does")
    return _scores(model, tuned, encoded, talk, "scoring the untouched base")


def _split(tuned: predict.Tuned, run: Path, split: str) -> dataset.Split:
    read = dataset.read(tuned.task, tuned.data, tuned.recipe.train.seed)
    if split not in read.splits:
        known = ", ".join(sorted(read.splits))
        raise RecipeError(f"the run has no {split} split", where=str(run), hint=f"it has {known}; or give --data FILE")
    trained_on = json.loads((run / "run.json").read_text(encoding="utf-8"))["data"]["sha256"]
    if (now := read.fingerprints()[split]) != trained_on.get(split):
        raise DataError(
            "the file has changed since the run",
            where=str(read.splits[split].table.path),
            hint=f"sha256 is {now[:12]} now; to score other rows, name them with --data",
        )
    return read.splits[split]


def _encode(tuned: predict.Tuned, split: dataset.Split) -> Encoded:
    cache = sources.cache_home() / "encoded"
    return dataset.encode_split(split, tuned.bound, models.processor_hash(tuned.processor), cache)
