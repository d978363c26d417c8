"""From the recipe's `data:` to encoded splits: read, fit the task to the targets, split, encode once and keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data import splits
from tunesmith.data.encoded import Encoded, encode, file_sha256, fingerprint
from tunesmith.data.formats import Row, Table, find_splits, read_table
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe import Data
from tunesmith.tasks import Task


@dataclass(frozen=True)
class Split:
    """Rows of a table: all of them, or those at `indices` (ascending)."""

    table: Table
    sha256: str
    indices: NDArray[np.int64] | None = None

    def rows(self) -> Iterator[Row]:
        """The rows in file order."""
        if self.indices is None:
            yield from self.table
            return
        wanted = iter(self.indices.tolist())
        following = next(wanted, None)
        for index, row in enumerate(self.table):
            if following is None:
                return
            if index == following:
                yield row
                following = next(wanted, None)


@dataclass(frozen=True)
class Examples:
    """All splits of a run, the task and data keys fitted to the training targets, and what to tell the user."""

    task: Task
    data: Data
    splits: dict[str, Split]
    notes: list[str]
    rows: dict[str, int]

    def fingerprints(self) -> dict[str, str]:
        """sha256 of the file behind each split."""
        return {name: split.sha256 for name, split in self.splits.items()}


def open_split(path: str | Path, task: Task, data: Data, *, labelled: bool = True) -> Split:
    """One file as rows with the task's roles."""
    table = read_table(
        path,
        task.columns,
        required=task.required if labelled else task.required - {"label"},
        columns=data.columns,
        on_bad_row=data.on_bad_row,
        limit=data.limit,
    )
    return Split(table, file_sha256(Path(path)))


def read(task: Task, data: Data, seed: int) -> Examples:
    """Read what the recipe names, fit the task, draw the splits that are fractions of train.

    Raises:
        DataError: a file or row that cannot be learned from.
    """
    data = _named_files(data)
    assert data.train is not None, "_named_files refuses that"
    found = {"train": open_split(data.train, task, data)}
    for name, value in (("validation", data.validation), ("test", data.test)):
        if isinstance(value, str):
            splits.refuse_same_file(Path(data.train), Path(value), name)
            found[name] = open_split(value, task, data)
    targets = [task.target(row) for row in found["train"].rows()]
    if not targets:
        raise DataError("no row to learn from", where=data.train)
    task, data = task.fit(targets, data, str(data.train))
    notes = [note for split in found.values() if (note := split.table.note)]
    notes += [
        f"{name}: skipped {_reasons(split.table.skipped)}" for name, split in found.items() if split.table.skipped
    ]
    found |= _drawn(found["train"], task, data, targets, seed)
    rows = {name: len(targets) if split.indices is None else len(split.indices) for name, split in found.items()}
    for name in found.keys() - {"train"}:
        if found[name].indices is None:
            rows[name] = _check(found[name], task)
        if repeated := splits.overlap(found["train"].rows(), found[name].rows()):
            notes.append(f"{repeated} of {rows[name]} {name} rows stand word for word in train: scores will flatter")
    return Examples(task, data, found, notes, rows)


def _named_files(data: Data) -> Data:
    if data.train is None:
        raise RecipeError("data.train: missing", hint="data.train=reviews.csv, or a folder with train.csv and test.csv")
    if not Path(data.train).is_dir():
        return data
    files = find_splits(data.train)
    if "train" not in files:
        raise DataError("no train file in this folder", where=data.train, hint="name it train.csv, or give the file")
    named = {
        name: str(path) for name, path in files.items() if not isinstance(getattr(data, name), str) or name == "train"
    }
    return data.model_copy(update=named)


def _drawn(train: Split, task: Task, data: Data, targets: list[Any], seed: int) -> dict[str, Split]:
    """Train, and the splits that the recipe draws from it: test first, then validation."""
    found: dict[str, Split] = {}
    left = np.arange(len(targets))
    codes = np.asarray(task.strata(targets) or np.zeros(len(targets), dtype=np.int64))
    for name, fraction in (("test", data.test), ("validation", data.validation)):
        if isinstance(fraction, float):
            of_all = min(fraction * len(targets) / len(left), 1.0)
            kept, drawn = splits.stratified_split(codes[left], of_all, seed)
            found[name] = replace(train, indices=left[drawn])
            left = left[kept]
    return found | ({"train": replace(train, indices=left)} if found else {})


def _check(split: Split, task: Task) -> int:
    rows = 0
    for row in split.rows():
        task.target(row)
        rows += 1
    if not rows:
        raise DataError("no rows", where=str(split.table.path))
    return rows


def _reasons(skipped: Counter[str]) -> str:
    return ", ".join(f"{count} rows ({reason})" for reason, count in skipped.most_common())


def encode_splits(examples: Examples, processor: Any, processor_hash: str, cache: Path) -> dict[str, Encoded]:
    """Every split encoded under `cache`, or opened where the same was encoded before."""
    return {
        name: encode_split(split, examples.task, examples.data, processor, processor_hash, cache)
        for name, split in examples.splits.items()
    }


def encode_split(split: Split, task: Task, data: Data, processor: Any, processor_hash: str, cache: Path) -> Encoded:
    """One split encoded; the folder's name is a hash of all that the result depends on."""
    drawn = None if split.indices is None else fingerprint(split.indices.tolist())
    keys: dict[str, Any] = {"max_length": data.max_length, "columns": split.table.columns, "limit": data.limit}
    keys |= {"on_bad_row": data.on_bad_row, "class_weights": data.class_weights}
    key = fingerprint(split.sha256, drawn, task.name, task.model_dump(), keys, processor_hash)
    return encode(split.rows(), lambda rows: task.encode(rows, processor, data), cache / key)
