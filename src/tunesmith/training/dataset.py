"""The examples of a run: read the files of `data`, fit the task to the training targets, split, encode."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data import splits
from tunesmith.data.columns import Column, inputs_of, of_kind, predicts_labels, predicts_text, reads_plain_text
from tunesmith.data.encoded import Encoded, encode, encode_in_memory, fingerprint
from tunesmith.data.formats import Row, Table, find_splits, is_folder, read_table
from tunesmith.data.formats.columns import is_number
from tunesmith.data.formats.folders import data_files, no_train_error
from tunesmith.data.formats.plain import texts_in
from tunesmith.data.labels import IGNORED
from tunesmith.errors import DataError, RecipeError, shorten
from tunesmith.recipe import Data
from tunesmith.tasks import BoundTask, Task
from tunesmith.training import notes as remarks

GROUP = "group"
"""The name of a row's value in the column `data.group`."""


@dataclass(frozen=True)
class Split:
    """Rows of a table: all of them, or those at `indices` (ascending)."""

    table: Table
    indices: NDArray[np.int64] | None = None

    @property
    def sha256(self) -> str:
        """The sha256 of the file."""
        return self.table.sha256

    def rows(self) -> Iterator[Row]:
        """Yield the rows in file order."""
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

    def places(self, indices: Collection[int], limit: int = 16) -> str:
        """Return the file and line numbers of some rows: `reviews.csv:3, 7, 12 and 5 more`."""
        wanted = set(indices)
        places = [row.place.rpartition(":") for index, row in enumerate(self.rows()) if index in wanted]
        more = f" and {len(places) - limit} more" if len(places) > limit else ""
        return f"{places[0][0]}:{', '.join(line for _, _, line in places[:limit])}{more}"


@dataclass(frozen=True)
class Examples:
    """All splits of a run, the task and data keys fitted to the training targets, and notes for the user."""

    task: Task
    data: Data
    splits: dict[str, Split]
    notes: list[str]
    rows: dict[str, int]
    """Number of rows of each split."""

    def fingerprints(self) -> dict[str, str]:
        """Return the sha256 of each split's file."""
        return {name: split.sha256 for name, split in self.splits.items()}


def open_split(path: str | Path, task: Task, data: Data, *, grouped: bool = False) -> Split:
    """Open one file with the task's columns; `grouped` also reads the column `data.group`."""
    columns, named = list(task.columns), dict(data.columns or {})
    if grouped and data.group is not None:
        columns.append(Column(GROUP, "value"))
        named[GROUP] = data.group
    table = read_table(
        path,
        columns,
        named=named,
        on_bad_row=data.on_bad_row,
        limit=data.limit,
        plain_text=reads_plain_text(task.columns),
    )
    return Split(table)


def read(task: Task, data: Data, seed: int) -> Examples:
    """Read the files of the recipe, fit the task, and draw the splits that are fractions of train.

    Raises:
        DataError: a file or row that cannot be trained on.
    """
    data = _find_files(data, task)
    assert data.train is not None, "_find_files refuses that"
    opened = {"train": open_split(data.train, task, data, grouped=True)}
    task = task.with_columns(opened["train"].table.columns)
    for name, value in (("validation", data.validation), ("test", data.test)):
        if isinstance(value, str):
            opened[name] = open_split(value, task, data)
            splits.refuse_same_file(Path(data.train), Path(value), name)
    _check_same_columns(opened, task)
    task = task.infer_from_rows(opened["train"].rows())
    train = _read_usable(opened["train"], task, data)
    _check_swapped_columns(train, task)
    task, data = task.fit(train.targets, data)
    train = _read_usable(opened["train"], task, data) if task.targets_need_fit else train
    parts = {"train": train} | {name: _read_usable(opened[name], task, data) for name in opened.keys() - {"train"}}
    tables = [split.table for split in opened.values() if split.table.note]
    notes = remarks.merge_notes((str(table.path), (table.note or "").removeprefix(str(table.path))) for table in tables)
    notes += [f"{name}: skipped {remarks.skipped_rows(part.skipped)}" for name, part in parts.items() if part.skipped]
    strata = np.asarray(task.strata(train.targets) or np.zeros(len(train.targets)), dtype=np.int64)
    notes += _inspect_train(train, strata, task)
    units = train.digests if train.groups is None else splits.join_groups(train.groups, train.digests)
    drawn = _draw_splits(strata, units, data, seed)
    if drawn:
        parts |= {name: train.at(positions) for name, positions in drawn.items()}
        unit = "text" if train.groups is None else "group"
        notes += remarks.classes_only_in_train(train.targets, strata, units, unit)
    rows = {name: len(part.targets) for name, part in parts.items()}
    for name in sorted(parts.keys() - {"train"}):
        if duplicates := splits.count_overlap(parts["train"].digests, parts[name].digests):
            group = data.group if name in drawn else None
            notes.append(remarks.duplicates_of_train(name, duplicates, rows[name], group))
    by_name = {name: part.split for name, part in parts.items()}
    for name, path in task.extra_eval_sets().items():
        by_name[name], more = read_other(path, task, data.model_copy(update={"columns": None}))
        rows[name] = sum(1 for _ in by_name[name].rows())
        notes += more
    return Examples(task, data, by_name, notes, rows)


def read_other(path: str | Path, task: Task, data: Data) -> tuple[Split, list[str]]:
    """Read a file that is not a split of the run; return its usable rows and notes for the user.

    Raises:
        DataError: a file or row that cannot be scored.
    """
    part = _read_usable(open_split(path, task, data), task, data)
    notes = [part.split.table.note] if part.split.table.note else []
    return part.split, notes + ([f"{path}: skipped {remarks.skipped_rows(part.skipped)}"] if part.skipped else [])


def _check_same_columns(opened: dict[str, Split], task: Task) -> None:
    """Refuse an optional column, such as a second text, that only some splits have: inputs would differ in form."""
    words = of_kind(task.columns, "words")
    texts = {column.name for column in inputs_of(task.columns) if column.kind == "text"}
    for name, split in opened.items():
        for other in opened.values():
            redundant = texts if words is not None and words.name in split.table.columns else set()
            ignored = {GROUP} | redundant  # the text of tagged words adds no input
            if more := sorted(split.table.columns.keys() - other.table.columns.keys() - ignored):
                what = f"no column for {more[0]}, which {name} has ({shorten(split.table.columns[more[0]])})"
                hint = f"set data.columns.{more[0]}=NAME, or rename the column in {name} if it is not a {more[0]}"
                if words is not None and words.name in more:
                    hint = f"convert spans to tagged words: `tunesmith data convert {other.table.path} NAME.conll`"
                raise DataError(what, where=str(other.table.path), hint=hint)


@dataclass(frozen=True)
class _Part:
    """A split after one pass over its file: usable rows, their targets, and a digest of the inputs of each row."""

    split: Split
    targets: list[Any]
    digests: splits.Digests
    skipped: Counter[str]
    only_numbers: bool
    """True where every text is a number."""

    groups: splits.Digests | None = None
    """The group of each row; rows of one group stay in one split."""

    def at(self, positions: splits.Indices) -> _Part:
        """Return the part with the rows at these positions."""
        indices = positions if self.split.indices is None else self.split.indices[positions]
        targets = [self.targets[position] for position in positions.tolist()]
        split = replace(self.split, indices=indices)
        groups = None if self.groups is None else self.groups[positions]
        return _Part(split, targets, self.digests[positions], Counter(), self.only_numbers, groups)


def _read_usable(split: Split, task: Task, data: Data) -> _Part:
    """Read all rows of a split; skip and count rows with the label -100 and, with on_bad_row=skip, invalid targets."""
    targets: list[Any] = []
    digests, groups = array("Q"), array("Q")
    first: DataError | None = None
    kept, unusable, unlabeled, kind = array("q"), 0, 0, "label" if predicts_labels(task.columns) else "row"
    main, only_numbers = task.columns[0].name, True
    for index, row in enumerate(split.rows()):
        try:
            target = task.parse_target(row)
        except DataError as error:
            if data.on_bad_row == "stop":
                raise
            unusable, first = unusable + 1, first or error
            continue
        if target == IGNORED:
            unlabeled += 1
            continue
        targets.append(sys.intern(target) if type(target) is str else target)  # one object per class, not per row
        kept.append(index)
        digests.append(splits.digest(row, task.columns))
        if GROUP in row.values:
            groups.append(splits.group_digest(row))
        only_numbers = only_numbers and is_number(str(row.values.get(main)))
    skipped = split.table.skipped + Counter({f"unusable {kind}": unusable, f"label {IGNORED}": unlabeled})
    if not targets:
        what = f"no row can be used; skipped {remarks.skipped_rows(skipped)}"
        hint = "`tunesmith data check` lists the faults of each row"
        if first is not None:
            what, hint = f"{what}; first fault: {first.what}", first.hint.removesuffix(", or set data.on_bad_row=skip")
        raise DataError(what, where=str(split.table.path), hint=hint)
    split = replace(split, indices=np.frombuffer(kept, dtype=np.int64)) if unusable or unlabeled else split
    grouped = np.frombuffer(groups, dtype=np.uint64) if groups else None
    return _Part(split, targets, np.frombuffer(digests, dtype=np.uint64), skipped, only_numbers, grouped)


def _check_swapped_columns(train: _Part, task: Task) -> None:
    """Refuse many different labels with few different texts: the two columns appear to be swapped."""
    rows, columns = len(train.targets), train.split.table.columns
    texts, labels, main = len(np.unique(train.digests)), len(set(train.targets)), task.columns[0].name
    label = of_kind(task.columns, "label")
    not_numbers = all(isinstance(target, str) and not is_number(target) for target in train.targets)
    if label is not None and not_numbers and labels > rows / 2 and 1 < texts <= rows / 5:
        what = f"{label.name}: {labels:,} different labels in {rows:,} rows, but {texts:,} different texts"
        what += ": columns appear to be swapped"
        hint = f"data.columns.{main}={columns[label.name]} data.columns.{label.name}={columns[main]}"
        raise DataError(what, where=str(train.split.table.path), hint=hint)


def _inspect_train(train: _Part, strata: splits.Indices, task: Task) -> list[str]:
    """Return notes on the training rows.

    Raises:
        DataError: all texts are the same.
    """
    notes = remarks.labels_like_missing(train.targets)
    main = task.columns[0].name
    if train.only_numbers:
        notes.append(f"{main}: every value is a number; set data.columns.{main}=NAME if it is another column")
    repeated, conflicting = splits.count_duplicates(train.digests, strata)
    if repeated == len(train.digests) - 1 > 0:
        what = f"{main}: all {len(train.digests)} rows are the same; there is nothing to learn"
        hint = f"set data.columns.{main}=NAME if it is another column"
        raise DataError(what, where=str(train.split.table.path), hint=hint)
    return notes + ([remarks.repeated_texts(repeated, conflicting, len(train.digests))] if repeated else [])


def _find_files(data: Data, task: Task) -> Data:
    """Replace a folder in `data.train` by the files of its splits."""
    if data.train is None:
        raise RecipeError("data.train: missing", hint="data.train=reviews.csv, or a folder with train.csv and test.csv")
    if not is_folder(data.train):
        return data
    files = find_splits(data.train, pairs=predicts_text(task.columns))
    if "train" not in files and reads_plain_text(task.columns) and texts_in(Path(data.train)):
        return data
    if not files and len(others := data_files(data.train)) == 1:
        files = {"train": others[0]}
    if "train" not in files:
        raise no_train_error(data.train)
    named = {
        name: str(path) for name, path in files.items() if not isinstance(getattr(data, name), str) or name == "train"
    }
    return data.model_copy(update=named)


def _draw_splits(strata: splits.Indices, units: splits.Digests, data: Data, seed: int) -> dict[str, splits.Indices]:
    """Return the rows of train in each split that is drawn from it: test first, then validation, train keeps the rest.

    Rows of the same unit (text or group) stay in one split.
    """
    drawn: dict[str, splits.Indices] = {}
    left = np.arange(len(strata))
    for name, fraction in (("test", data.test), ("validation", data.validation)):
        if isinstance(fraction, float):
            fraction_left = min(fraction * len(strata) / len(left), 1.0)
            kept, chosen = splits.stratified_split(strata[left], units[left], fraction_left, seed, name)
            drawn[name] = left[chosen]
            left = left[kept]
    return drawn | ({"train": left} if drawn else {})


def encode_splits(examples: Examples, bound: BoundTask, processor_hash: str, cache: Path) -> dict[str, Encoded]:
    """Encode every split under `cache`; a split that was encoded before is opened."""
    return {name: encode_split(split, bound, processor_hash, cache) for name, split in examples.splits.items()}


def encode_split(split: Split, bound: BoundTask, processor_hash: str, cache: Path) -> Encoded:
    """Encode one split, or open it; its folder is named by a hash of everything that the result depends on."""
    indices = None if split.indices is None else hashlib.sha256(split.indices.tobytes()).hexdigest()
    data = bound.data
    keys: dict[str, Any] = {"max_length": data.max_length, "columns": split.table.columns, "limit": split.table.limit}
    keys |= {"on_bad_row": data.on_bad_row, "class_weights": data.class_weights}
    key = fingerprint(split.sha256, indices, bound.task.name, bound.task.model_dump(), keys, processor_hash)
    return encode(bound.chunks(split.rows()), bound.encode, cache / key, bound.costs)


def encode_rows(rows: Iterable[Row], bound: BoundTask) -> Encoded:
    """Encode rows in memory, for predictions."""
    return encode_in_memory(rows, bound.encode, bound.costs)
