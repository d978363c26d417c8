"""Faults of data before training: `tunesmith data check PATH|RECIPE`.

Each file is streamed twice: first for faults of single rows and counts, then for the texts of near-duplicate
candidates and a sample of rows whose tokens are counted. About a hundred bytes are kept per row.
"""

from __future__ import annotations

import re
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data import splits
from tunesmith.data.columns import of_kind, predicts_labels
from tunesmith.data.findings import Fault, Findings, Level
from tunesmith.data.formats import Row, is_folder
from tunesmith.data.formats.raw import BadRow, RawRow
from tunesmith.data.labels import IGNORED
from tunesmith.data.text import duplicates
from tunesmith.data.text.spans import words_of
from tunesmith.data.text.texts import inspect_texts
from tunesmith.errors import DataError, RecipeError, UserError, did_you_mean, shorten
from tunesmith.inspect_data.faults import (
    ColumnScan,
    class_faults,
    length_summary,
    private_faults,
    size_faults,
    unknown_labels,
)
from tunesmith.inspect_data.files import (
    File,
    ResolvedTarget,
    display_text,
    find_files,
    guess_task,
    open_file,
    resolve_target,
    row_text,
    row_texts,
    skipped_files,
    source_of,
)
from tunesmith.inspect_data.row_index import RowIndex
from tunesmith.models import load as models
from tunesmith.run.prepare import max_length
from tunesmith.tasks import Inspection, Task
from tunesmith.training import dataset
from tunesmith.training.notes import merge_notes

CHUNK_ROWS = 1024
MAX_LEAK_SHARE = 0.01
"""Share of near duplicates of train in a split from which on its scores are invalid."""
MAX_TOKENIZED_ROWS = 10_000
"""Rows per file whose tokens are counted."""
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def check(
    target: str | None,
    overrides: Sequence[str] = (),
    *,
    group: str | None = None,
    model: str | None = None,
    stage: int | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Check a file, a folder or the data of a recipe; return findings and counts.

    Errors stop a run or invalidate its scores. `group`: column whose values must not occur in two splits. `model`:
    model whose tokens are counted.

    Raises:
        RecipeError: the recipe is invalid, or there is no column `group`.
        DataError: the file does not exist.
    """
    began = time.perf_counter()
    check = _Check(
        resolve_target(target, overrides, model, stage), group, {"offline": offline, "allow_pickle": allow_pickle}
    )
    check.read()
    check.compare()
    findings = check.findings.dump()
    counts = Counter(finding["level"] for finding in findings)
    return {
        "data": target or str(check.data.train),
        "task": check.task.name if check.task else None,
        "guessed": check.guess,
        "splits": {file.name: file.dump() for file in check.files},
        "notes": check.notes,
        "findings": findings,
        "errors": counts["error"],
        "warnings": counts["warning"],
        "seconds": round(time.perf_counter() - began, 3),
    }


class _Check:
    """State of one check."""

    def __init__(self, target: ResolvedTarget, group: str | None, allowed: dict[str, bool]) -> None:
        recipe, guess, self.model, note = target
        self.recipe, self.group, self.allowed = recipe, group or recipe.data.group, allowed
        self.findings, self.notes, self.index = Findings(), [note] if note else list[str](), RowIndex()
        self.data, named, self.are_splits = find_files(recipe.data, recipe.task, guess=guess)
        first = next(iter(named.values()))
        self.guess = guess
        self.task, misfit = guess_task(recipe.task, first, self.data) if guess else (recipe.task, None)
        self.fitted: Task | None = None
        self.files = list(self._opened(named))
        if misfit is not None and self.files:
            self.notes.append(f"no task fits these columns: {misfit.what}; {misfit.hint}, or set task=NAME")
        noted = [(str(file.path), file.note) for file in self.files if file.note]
        self.notes += merge_notes((path, note.removeprefix(path)) for path, note in noted)
        if is_folder(folder := str(recipe.data.train)) and (left := skipped_files(Path(folder), named)):
            self.notes.append(f"skipped files in {folder}: {', '.join(left)}")
        self.row_level: Level = "warning" if self.data.on_bad_row == "skip" else "error"

    def _opened(self, named: dict[str, Path]) -> Iterator[File]:
        for name, path in named.items():
            try:
                yield open_file(name, path, self.task, self.data)
            except DataError as error:
                place = error.where or str(path)
                self.findings.add(
                    [Fault("unreadable", "a file cannot be read", place, error.what, error.hint, "error")]
                )

    def read(self) -> None:
        """Read all files once and collect faults of single rows and columns."""
        for number, file in enumerate(self.files):
            if self.group is not None and self.group not in map(str, file.names):
                hint = did_you_mean(self.group, map(str, file.names))
                raise RecipeError(f"--group: no column {shorten(self.group)}", where=str(file.path), hint=hint)
            self._read(number, file)

    def _read(self, number: int, file: File) -> None:
        fields, chunk, lengths = ColumnScan(file), list[tuple[int, str]](), array("q")
        for raw in file.raw_rows():
            fields.take(raw)
            row = file.parse_row(raw)
            if isinstance(row, BadRow):
                file.bad_rows += 1
                place, fix = f"{file.path / row.file}:{row.line}", row.hint or "correct it"
                self.findings.add([Fault("bad-row", row.reason, place, row.what, fix, self.row_level)])
                continue
            assert isinstance(raw, RawRow)
            text = row_text(row, file.schema)
            lengths.append(len(text.split()) + (0 if text.isascii() else len(_CJK.findall(text))))
            self.findings.add(private_faults(row, file.schema))
            is_first, plain = self._index(number, file, raw, row), duplicates.normalize(text)
            if is_first and len(plain) >= duplicates.MIN_CHARS:
                chunk.append((len(self.index.file) - 1, plain))
            if len(chunk) == CHUNK_ROWS:
                self.index.hash(chunk)
            file.rows += 1
            if file.rows == file.limit:
                break
        self.index.hash(chunk)
        self.findings.add(fields.faults())
        if lengths:
            file.lengths = {"unit": "words", **length_summary(np.frombuffer(lengths, dtype=np.int64))}

    def _index(self, number: int, file: File, raw: RawRow, row: Row) -> bool:
        """Add a good row to the index; return whether it is the first with these inputs."""
        index, mine = self.index, len(self.index.file)
        target = self._target(file, row)
        code = -1 if target is None else index.targets.setdefault(target, len(index.targets))
        value = raw.values.get(self.group, raw.values.get(_number(self.group))) if self.group is not None else None
        group = "" if value is None else str(value).strip()
        index.file.append(number)
        index.line.append(raw.line)
        if raw.file:
            index.text[mine] = raw.file
        index.target.append(code)
        index.group.append(index.groups.setdefault(group, len(index.groups)) if group else -1)
        earlier = index.by_digest.setdefault(splits.digest(row, file.schema, "NFKC"), mine)
        if earlier != mine:
            self.findings.add(self._duplicate_faults(file, row, target, earlier))
        return earlier == mine

    def _target(self, file: File, row: Row) -> Any:
        if self.task is None:
            return None
        try:
            target = self.task.parse_target(row)
        except DataError as error:
            kind, what = "bad-row", "the row cannot be used for training"
            if self._labeled:
                kind, what = "bad-label", "invalid label"
            self.findings.add([Fault(kind, what, row.place, error.what, error.hint, self.row_level)])
            return None
        if target == IGNORED:  # a run leaves it out
            return None
        if self._labeled and isinstance(target, str | tuple):
            file.classes.update([target] if isinstance(target, str) else target)
        return target

    def _duplicate_faults(self, file: File, row: Row, target: Any, earlier: int) -> Iterator[Fault]:
        """Yield the faults of a row that duplicates an earlier one: duplicate or leak, and conflicting labels."""
        see, other = self._place_of(earlier), self.files[self.index.file[earlier]]
        if other is file:
            what = f"a row of {file.name} duplicates an earlier one"
            yield Fault("duplicate", what, row.place, display_text(row, file.schema), "keep one of them", see=see)
        else:
            what, level = f"a row of {file.name} duplicates a row of {other.name}", self._leak_level
            kind, fix = "leak" if self.are_splits else "duplicate", "remove it from one of the two"
            yield Fault(kind, what, row.place, display_text(row, file.schema), fix, level, see)
        there = self.index.target[earlier]
        if self._labeled and target is not None and there not in (self.index.targets[target], -1):
            labels = self._label_difference(row, target, list(self.index.targets)[there])
            what, fix = "identical texts have different labels", "correct one of the labels"
            yield Fault("label-conflict", what, row.place, f"{labels}: {display_text(row, file.schema)}", fix, see=see)

    def _label_difference(self, row: Row, here: Any, there: Any) -> str:
        """Describe two different targets of one text; for tags, the first word whose tags differ."""
        if self._tagged and len(here) == len(there):
            at = next(at for at, (mine, other) in enumerate(zip(here, there, strict=True)) if mine != other)
            return f"{words_of(row).words[at]} is {here[at]} here, {there[at]} there"
        return f"{_label(here)} here, {_label(there)} there"

    @property
    def _labeled(self) -> bool:
        """True if targets are classes, numbers or tags; a text may have several valid translations."""
        return self.task is not None and predicts_labels(self.task.columns)

    @property
    def _tagged(self) -> bool:
        return self.task is not None and of_kind(self.task.columns, "tags") is not None

    @property
    def _leak_level(self) -> Level:
        return "error" if self.are_splits else "warning"

    def _place_of(self, number: int) -> str:
        path = self.files[self.index.file[number]].path / self.index.text.get(number, "")
        return f"{path}:{self.index.line[number]}"

    def compare(self) -> None:
        """Collect faults that concern several rows, and those for which a run would stop."""
        parts = np.array(self.index.file, dtype=np.int64)
        names = [file.name for file in self.files]
        if self.task is not None and names[:1] == ["train"] and self.files[0].rows:
            self._fit_and_split(self.task, parts, names)
        if (task := self.fitted or self.task) is not None:
            for file in self.files:
                self.findings.add(task.faults(file.good_rows()))
        self._near_duplicates(parts, names)
        if self.group is not None:
            self.findings.add(self._group_faults(parts, names))

    def _fit_and_split(self, task: Task, parts: splits.Indices, names: list[str]) -> None:
        """Fit the task and draw the splits as a run does; mark the drawn rows in `parts` and `names`."""
        train = self.files[0]
        files = {"train": str(train.named or train.path), "on_bad_row": "skip"}
        files |= {file.name: str(file.named or file.path) for file in self.files}
        drawn = {name: None for name in files.keys() & {"validation", "test"}}
        read = self._try_reading(task, files | drawn)
        if read is None:
            return
        self.fitted = read.task
        if drawn:
            self._try_reading(task, files)
        for name, split in read.splits.items():
            if name not in names and split.indices is not None:
                parts[split.indices] = len(names)
                train.drawn[name] = len(split.indices)
                names.append(name)
        if train.classes and read.task.strata(()) is not None:
            self.findings.add(class_faults(self.files))
            targets, number = [*self.index.targets, ()], train.rows
            for file in self.files[1:]:
                numbers = range(number, number := number + file.rows)
                rows = ((self._place_of(row), targets[self.index.target[row]]) for row in numbers)
                self.findings.add(unknown_labels(file, set(train.classes), rows, self.row_level))
        else:  # numbers, or a tag for each word
            for file in self.files:
                file.classes.clear()

    def _try_reading(self, task: Task, keys: dict[str, Any]) -> dataset.Examples | None:
        """Read the data as a run does; None if the run would stop."""
        try:
            return dataset.read(task, self.data.model_copy(update=keys), self.recipe.train.seed)
        except DataError as error:
            place = error.where or str(keys["train"])
            self.findings.add([Fault("refused", "the run would stop here", place, error.what, error.hint, "error")])
            return None

    def _near_duplicates(self, parts: splits.Indices, names: list[str]) -> None:
        """Add faults for near duplicates: candidates by MinHash, then exact similarity of their texts."""
        pairs = self.index.candidates(parts)
        candidates = self._read_again(set(pairs.ravel().tolist()))
        normalized = {number: duplicates.normalize(text) for number, text in candidates.items()}
        similar = [
            (later, earlier, similarity) if parts[later] < parts[earlier] else (earlier, later, similarity)
            for earlier, later, similarity in duplicates.near_duplicates(pairs, normalized, parts)
        ]
        leaks = Counter(int(parts[later]) for earlier, later, _ in similar if parts[earlier] != parts[later])
        share = {part: count / np.count_nonzero(parts == part) for part, count in leaks.items()}
        for earlier, later, similarity in similar:
            mine, other = names[parts[later]], names[parts[earlier]]
            kind, level, fix = "near-duplicate", "warning", "keep one of them"
            what = f"a row of {mine} nearly duplicates {'an earlier one' if mine == other else f'a row of {other}'}"
            if mine != other and self.are_splits:
                kind, fix = "near-leak", "keep such rows in one split, or remove one of them"
                level = "error" if share[int(parts[later])] >= MAX_LEAK_SHARE else "warning"
                what += " (splits drawn by the recipe)" if {mine, other} & self.files[0].drawn.keys() else ""
            see = f"{self._place_of(earlier)} ({similarity:.0%} similar{self._other_label(later, earlier)})"
            self.findings.add([Fault(kind, what, self._place_of(later), candidates[later], fix, level, see)])  # type: ignore[arg-type]

    def _other_label(self, row: int, other: int) -> str:
        """Describe the labels of two near duplicates if they differ."""
        here, there = self.index.target[row], self.index.target[other]
        if not self._labeled or self._tagged or here == there:
            return ""
        names = list(self.index.targets)
        return f", {_label(names[here])} here and {_label(names[there])} there" if min(here, there) >= 0 else ""

    def _is_train(self, parts: splits.Indices, row: int, other: int) -> bool:
        """Return whether `row` is a training row and `other` is not."""
        return self.files[0].name == "train" and parts[row] == 0 != parts[other]

    def _read_again(self, wanted: set[int]) -> dict[int, str]:
        """Read all files again: return the texts of the wanted rows, and count the tokens of a sample."""
        tokens, wanted_texts, number = self._tokenizer(), dict[int, str](), 0
        for file in self.files if wanted or tokens else ():
            every, sample = -(-file.rows // MAX_TOKENIZED_ROWS), list[Row]()
            for index, row in enumerate(file.good_rows()):
                if number in wanted:
                    wanted_texts[number] = row_text(row, file.schema)
                if tokens and index % every == 0 and row_text(row, file.schema):
                    sample.append(row)
                number += 1
            if tokens and sample:
                self._inspect_tokens(file, sample, *tokens)
        return wanted_texts

    def _inspect_tokens(self, file: File, rows: list[Row], processor: Any, limit: int | None, config: Any) -> None:
        """Add the faults of rows after tokenization by the task."""
        task, data = self.fitted or self.task, self.data.model_copy(update={"max_length": limit})
        try:
            if task is None:
                sizes = inspect_texts([row_texts(row, file.schema) for row in rows], processor)
                inspection: Inspection | None = Inspection(*sizes, limit, "data.max_length")
            else:
                inspection = task.bind(processor, config, data).inspect(rows)
        except UserError as error:
            self.findings.add(
                [Fault("refused", "the run would stop here", str(file.path), error.what, error.hint, "error")]
            )
            return
        if inspection is not None:
            self.findings.add(inspection.faults)
            self.findings.add(size_faults(file, rows, inspection, task.unit if task else Task.unit))

    def _tokenizer(self) -> tuple[Any, int | None, Any] | None:
        """The model's tokenizer, its maximum length and its config; None if no model is named or available."""
        task, technique = self.task or self.recipe.task, self.recipe.technique
        if self.model is None:
            return None
        try:
            source = source_of(self.model, **self.allowed)
            processor = models.load_processor(source, task.auto_class, task.added_tokens, kind=task.processor)
            shape = models.load_shape(source, task.auto_class, processor)
            return processor, max_length(self.data.max_length, shape, processor, technique, task), shape.config
        except UserError as error:
            self.notes.append(f"lengths are in words because the model cannot be loaded ({error})")
            return None

    def _group_faults(self, parts: splits.Indices, names: list[str]) -> Iterator[Fault]:
        """Yield a fault for each group value that occurs in two splits, or would if a split were drawn."""
        groups, first = list(self.index.groups), dict[int, int]()
        undrawn = self.are_splits and len(names) == 1
        for number, (code, part) in enumerate(zip(self.index.group, parts.tolist(), strict=True)):
            earlier = first.setdefault(code, number)
            if code < 0 or earlier == number or not (undrawn or part != parts[earlier]):
                continue
            if self._is_train(parts, number, earlier):
                number, earlier = earlier, number
            kind, level = ("group", "warning") if undrawn else ("group-leak", self._leak_level)
            what = f"a row of {names[parts[number]]} shares its {self.group} with {names[parts[earlier]]}"
            fix = f"put all rows of a {self.group} in one split"
            if undrawn:
                what = f"a row shares its {self.group} with an earlier one; a random split could separate them"
                fix = f"set data.group={self.group} to keep them in one split"
            value = f"{self.group}={groups[code]}"
            yield Fault(kind, what, self._place_of(number), value, fix, level, self._place_of(earlier))  # type: ignore[arg-type]


def _number(column: str) -> int | None:
    return int(column) if column.isdigit() else None


def _label(target: Any) -> str:
    label = ", ".join(target) if isinstance(target, tuple) else str(target)
    return label if len(label) <= 24 else f"{label[:23]}…"
