"""From the recipe's `data:` to encoded splits: read, fit the task to the targets, split, encode once and keep."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data import splits
from tunesmith.data.columns import Column, inputs_of, labeled, of_kind, reads_plain_text, translates
from tunesmith.data.encoded import Encoded, Fields, encode, encode_in_memory, fingerprint
from tunesmith.data.formats import Row, Table, find_splits, is_folder, read_table
from tunesmith.data.formats.columns import is_number
from tunesmith.data.formats.folders import data_files, no_train
from tunesmith.data.formats.plain import texts_in
from tunesmith.data.labels import IGNORED
from tunesmith.data.text.augment import Augmenter
from tunesmith.errors import DataError, RecipeError, counted, shorten
from tunesmith.recipe import Data
from tunesmith.tasks import BoundTask, Task

MISSING = frozenset({"na", "n/a", "#n/a", "<na>", "nan", "nil", "none", "null"})
"""Words that programs write where a value is missing."""


@dataclass(frozen=True)
class Split:
    """Rows of a table: all of them, or those at `indices` (ascending)."""

    table: Table
    indices: NDArray[np.int64] | None = None

    @property
    def sha256(self) -> str:
        """Of the file behind it."""
        return self.table.sha256

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

    def places(self, indices: Collection[int], limit: int = 16) -> str:
        """Where some of the rows stand in the file, the first of them: `reviews.csv:3, 7, 12 and 5 more`."""
        wanted = set(indices)
        places = [row.place.rpartition(":") for index, row in enumerate(self.rows()) if index in wanted]
        more = f" and {len(places) - limit} more" if len(places) > limit else ""
        return f"{places[0][0]}:{', '.join(line for _, _, line in places[:limit])}{more}"


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


GROUP = "group"
"""The name under which rows have the value of `data.group`."""


def open_split(path: str | Path, task: Task, data: Data, *, grouped: bool = False) -> Split:
    """One file as rows with the task's columns, `grouped` with the group of each."""
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
    """Read what the recipe names, fit the task, draw the splits that are fractions of train.

    Raises:
        DataError: a file or row that cannot be learned from.
    """
    data = _named_files(data, task)
    assert data.train is not None, "_named_files refuses that"
    found = {"train": open_split(data.train, task, data, grouped=True)}
    task = task.with_columns(found["train"].table.columns)
    for name, value in (("validation", data.validation), ("test", data.test)):
        if isinstance(value, str):
            found[name] = open_split(value, task, data)
            splits.refuse_same_file(Path(data.train), Path(value), name)
    _check_same_columns(found, task)
    task = task.infer_from_rows(found["train"].rows())
    every = _usable(found["train"], task, data)
    _check_places(every, task)
    task, data = task.fit(every.targets, data)
    every = _usable(found["train"], task, data) if task.targets_need_fit else every
    parts = {"train": every} | {name: _usable(found[name], task, data) for name in found.keys() - {"train"}}
    tables = [split.table for split in found.values() if split.table.note]
    notes = said_once((str(table.path), (table.note or "").removeprefix(str(table.path))) for table in tables)
    notes += [_left_out(name, part) for name, part in parts.items() if part.skipped]
    strata = np.asarray(task.strata(every.targets) or np.zeros(len(every.targets)), dtype=np.int64)
    notes += _remarks(every, strata, task)
    together = every.digests if every.groups is None else splits.joined(every.groups, every.digests)
    drawn = _drawn(strata, together, data, seed)
    if drawn:
        parts |= {name: every.at(positions) for name, positions in drawn.items()}
        notes += _alone(every, strata, together, "text" if every.groups is None else "group")
    rows = {name: len(part.targets) for name, part in parts.items()}
    for name in sorted(parts.keys() - {"train"}):
        if repeated := splits.overlap(parts["train"].digests, parts[name].digests):
            said = f"{repeated} of {rows[name]} {name} rows are duplicate rows of train; scores will be optimistic"
            way_out = f"remove them from one of the files, or data.{name}=0.1 draws rows that train lacks"
            if name in drawn:
                way_out = f"nearly all groups of {data.group} share texts: remove such rows (data check lists them)"
            notes.append(f"{said}; {way_out}")
    found = {name: part.split for name, part in parts.items()}
    for name, path in task.extra_eval_sets().items():
        found[name], remarks = read_other(path, task, data.model_copy(update={"columns": None}))
        rows[name] = sum(1 for _ in found[name].rows())
        notes += remarks
    return Examples(task, data, found, notes, rows)


def said_once(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Notes from (of what, what is said): where the same is said of several, one note names them all."""
    about: dict[str, list[str]] = {}
    for name, said in notes:
        about.setdefault(said, []).append(name)
    return [", ".join(names) + said for said, names in about.items()]


def read_other(path: str | Path, task: Task, data: Data) -> tuple[Split, list[str]]:
    """A file that is no split of the run: the rows of it that can be used, and what to tell the user.

    Raises:
        DataError: a file or row that cannot be scored.
    """
    part = _usable(open_split(path, task, data), task, data)
    notes = [part.split.table.note] if part.split.table.note else []
    return part.split, notes + ([_left_out(str(path), part)] if part.skipped else [])


def _check_same_columns(found: dict[str, Split], task: Task) -> None:
    """Refuse a second text, say, that some splits have and others lack: they would be read in different ways."""
    words = of_kind(task.columns, "words")
    texts = {column.name for column in inputs_of(task.columns) if column.kind == "text"}
    for name, split in found.items():
        for other in found.values():
            repeated = texts if words is not None and words.name in split.table.columns else set()
            beside = {GROUP} | repeated  # beside its words a text is nothing new
            if more := sorted(split.table.columns.keys() - other.table.columns.keys() - beside):
                what = f"no column for {more[0]}, which {name} has ({shorten(split.table.columns[more[0]])})"
                hint = f"data.columns.{more[0]}=NAME, or rename it in {name} if it is none"
                if words is not None and words.name in more:
                    hint = f"tunesmith data convert {other.table.path} NAME.conll makes words with tags of spans"
                raise DataError(what, where=str(other.table.path), hint=hint)


@dataclass(frozen=True)
class _Part:
    """A split read once: the rows that can be used, their targets, and a digest of what each says."""

    split: Split
    targets: list[Any]
    digests: splits.Digests
    skipped: Counter[str]
    only_numbers: bool
    """Every text is a number."""

    groups: splits.Digests | None = None
    """What each row belongs to, where rows that belong together stay together."""

    def at(self, positions: splits.Indices) -> _Part:
        """Some of the rows."""
        indices = positions if self.split.indices is None else self.split.indices[positions]
        targets = [self.targets[position] for position in positions.tolist()]
        split = replace(self.split, indices=indices)
        groups = None if self.groups is None else self.groups[positions]
        return _Part(split, targets, self.digests[positions], Counter(), self.only_numbers, groups)


def _usable(split: Split, task: Task, data: Data) -> _Part:
    """A row whose target cannot be read stops the run, or is left out and counted; one labelled -100 is left out."""
    targets: list[Any] = []
    digests, groups = array("Q"), array("Q")
    first: DataError | None = None
    kept, unusable, unlabelled, kind = array("q"), 0, 0, "label" if labeled(task.columns) else "row"
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
            unlabelled += 1
            continue
        targets.append(sys.intern(target) if type(target) is str else target)  # a class is one object, not one a row
        kept.append(index)
        digests.append(splits.digest(row, task.columns))
        if GROUP in row.values:
            groups.append(splits.group_digest(row))
        only_numbers = only_numbers and is_number(str(row.values.get(main)))
    skipped = split.table.skipped + Counter({f"unusable {kind}": unusable, f"label {IGNORED}": unlabelled})
    if not targets:
        what, hint = f"no row can be used, left out: {_reasons(skipped)}", "data check names what is wrong with each"
        if first is not None:
            what, hint = f"{what}, the first for {first.what}", first.hint.removesuffix(", or data.on_bad_row=skip")
        raise DataError(what, where=str(split.table.path), hint=hint)
    split = replace(split, indices=np.frombuffer(kept, dtype=np.int64)) if unusable or unlabelled else split
    known = np.frombuffer(groups, dtype=np.uint64) if groups else None
    return _Part(split, targets, np.frombuffer(digests, dtype=np.uint64), skipped, only_numbers, known)


def _check_places(train: _Part, task: Task) -> None:
    """Refuse labels that are nearly all different beside few texts: they stand in each other's column."""
    rows, columns = len(train.targets), train.split.table.columns
    texts, labels, main = len(np.unique(train.digests)), len(set(train.targets)), task.columns[0].name
    label = of_kind(task.columns, "label")
    worded = all(isinstance(target, str) and not is_number(target) for target in train.targets)
    if label is not None and worded and labels > rows / 2 and 1 < texts <= rows / 5:
        what = f"{label.name}: {labels:,} different ones in {rows:,} rows, but {texts:,} different texts"
        what += ": columns appear to be swapped"
        ways = f"data.columns.{main}={columns[label.name]} data.columns.{label.name}={columns[main]}"
        raise DataError(what, where=str(train.split.table.path), hint=ways)


def _remarks(train: _Part, strata: splits.Indices, task: Task) -> list[str]:
    """Rows that say the same (refused where all of them do), labels that may be missing, texts that may be none."""
    notes = [
        f"{count} train row{'s are' if count > 1 else ' is'} labelled {shorten(word)}, taken for a class as any other"
        for word, count in sorted(Counter(word for word in train.targets if _means_nothing(word)).items())
    ]
    role = task.columns[0].name
    if train.only_numbers:
        notes.append(f"{role}: every one is a number; data.columns.{role}=NAME if it is another column")
    repeated, torn = splits.repeats(train.digests, strata)
    if repeated == len(train.digests) - 1 > 0:
        what = f"{role}: every one of the {len(train.digests)} rows says the same; there is nothing to tell apart"
        raise DataError(
            what, where=str(train.split.table.path), hint=f"data.columns.{role}=NAME if it is another column"
        )
    if repeated:
        said = f"{repeated} of {len(train.digests)} train rows repeat an earlier text word for word"
        notes.append(f"{said}; {torn} of the texts stand there with different labels" if torn else said)
    return notes


def _means_nothing(target: object) -> bool:
    return isinstance(target, str) and target.lower() in MISSING


def _alone(train: _Part, strata: splits.Indices, together: splits.Digests, what: str) -> list[str]:
    texts = np.unique(np.stack([strata.astype(np.uint64), together]), axis=1)[0]
    _, first = np.unique(strata, return_index=True)
    counts = np.unique(texts, return_counts=True)[1]
    names = [shorten(train.targets[index]) for index in first[counts == 1]]
    if not names:
        return []
    who = f"{counted(len(names), 'class', 'classes')} {'has' if len(names) == 1 else 'have'}"
    return [f"{who} a single {what}, which stays in train where no score sees it: {', '.join(names[:3])}"]


def _named_files(data: Data, task: Task) -> Data:
    if data.train is None:
        raise RecipeError("data.train: missing", hint="data.train=reviews.csv, or a folder with train.csv and test.csv")
    if not is_folder(data.train):
        return data
    files = find_splits(data.train, pairs=translates(task.columns))
    if "train" not in files and reads_plain_text(task.columns) and texts_in(Path(data.train)):
        return data
    if not files and len(others := data_files(data.train)) == 1:
        files = {"train": others[0]}
    if "train" not in files:
        raise no_train(data.train)
    named = {
        name: str(path) for name, path in files.items() if not isinstance(getattr(data, name), str) or name == "train"
    }
    return data.model_copy(update=named)


def _drawn(strata: splits.Indices, digests: splits.Digests, data: Data, seed: int) -> dict[str, splits.Indices]:
    """Which rows of train are in the splits that the recipe draws from it: test first, then validation, then train."""
    found: dict[str, splits.Indices] = {}
    left = np.arange(len(strata))
    for name, fraction in (("test", data.test), ("validation", data.validation)):
        if isinstance(fraction, float):
            of_all = min(fraction * len(strata) / len(left), 1.0)
            kept, drawn = splits.stratified_split(strata[left], digests[left], of_all, seed, name)
            found[name] = left[drawn]
            left = left[kept]
    return found | ({"train": left} if found else {})


def _left_out(name: str, part: _Part) -> str:
    return f"{name}: skipped {_reasons(part.skipped)}"


def _reasons(skipped: Counter[str]) -> str:
    return ", ".join(f"{counted(count, 'row')} ({reason})" for reason, count in skipped.most_common())


def encode_splits(examples: Examples, bound: BoundTask, processor_hash: str, cache: Path) -> dict[str, Encoded]:
    """Every split encoded under `cache`, or opened where the same was encoded before."""
    return {name: encode_split(split, bound, processor_hash, cache) for name, split in examples.splits.items()}


def encode_split(split: Split, bound: BoundTask, processor_hash: str, cache: Path) -> Encoded:
    """One split encoded; the folder's name is a hash of all that the result depends on."""
    drawn, data = None if split.indices is None else hashlib.sha256(split.indices.tobytes()).hexdigest(), bound.data
    keys: dict[str, Any] = {"max_length": data.max_length, "columns": split.table.columns, "limit": split.table.limit}
    keys |= {"on_bad_row": data.on_bad_row, "class_weights": data.class_weights}
    key = fingerprint(split.sha256, drawn, bound.task.name, bound.task.model_dump(), keys, processor_hash)
    return encode(bound.chunks(split.rows()), bound.encode, cache / key, bound.costs)


def encode_rows(rows: Iterable[Row], bound: BoundTask) -> Encoded:
    """Rows encoded in memory, to be answered."""
    return encode_in_memory(rows, bound.encode, bound.costs)


def check_changeable(read: Examples, bound: BoundTask) -> None:
    """Refuse to augment rows without a text, or without tagged words, and rows that are joined to blocks.

    Raises:
        RecipeError: there are none.
    """
    columns, words = read.splits["train"].table.columns, of_kind(read.task.columns, "words")
    texts = [column.name for column in inputs_of(read.task.columns) if column.kind == "text"]
    if words is not None and words.name not in columns:
        what = f"data.augment: {read.task.name} has no words with tags here"
        raise RecipeError(what, hint="tunesmith data convert makes words with tags of spans")
    if words is None and not any(name in columns for name in texts):
        raise RecipeError(f"data.augment: {read.task.name} has no example of one text here", hint="leave the key out")
    if not bound.rows_are_examples:
        raise RecipeError("data.augment: blocks of raw text are not augmented", hint="leave the key out")


class Augmented:
    """The training split as it is in an epoch: changed and encoded again into a folder of its own, one at a time."""

    def __init__(
        self, read: Examples, bound: BoundTask, seed: int, cache: Path, otherwise: Mapping[str, str] | None = None
    ) -> None:
        check_changeable(read, bound)
        self._split, self._bound, self._cache = read.splits["train"], bound, cache
        self._augmenter = Augmenter.of(read.data.augment or (), seed, read.task.columns, otherwise)
        self._now: tuple[int, Encoded] | None = None

    def __call__(self, epoch: int) -> Encoded:
        """The examples of an epoch, counted from 0."""
        if self._now is None or self._now[0] != epoch:
            self._now = None  # its folder goes
            self._cache.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=".augmented-", dir=self._cache))
            rows = enumerate(self._split.rows())
            try:
                encoded = encode(rows, lambda part: self._encoded(part, epoch), folder / "train", self._bound.costs)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            weakref.finalize(encoded, shutil.rmtree, folder, ignore_errors=True)
            self._now = epoch, encoded
        return self._now[1]

    def _encoded(self, rows: list[tuple[int, Row]], epoch: int) -> list[Fields]:
        changed = [self._augmenter.row(row, epoch, index) for index, row in rows]
        try:
            return self._bound.encode(changed)
        except DataError:  # of a changed text nothing is left to this tokenizer: that row stays as it was
            return [self._either(new, row) for new, (_, row) in zip(changed, rows, strict=True)]

    def _either(self, changed: Row, row: Row) -> Fields:
        try:
            return self._bound.encode([changed])[0]
        except DataError:
            return self._bound.encode([row])[0]
