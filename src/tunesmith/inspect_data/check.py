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
from tunesmith.data.findings import Fault, Findings, Level
from tunesmith.data.formats import Row, is_folder
from tunesmith.data.formats.raw import BadRow, RawRow
from tunesmith.data.labels import IGNORED
from tunesmith.data.text import duplicates
from tunesmith.data.text.texts import inspect_texts
from tunesmith.errors import DataError, RecipeError, UserError, did_you_mean, shorten
from tunesmith.inspect_data.comparison import RowComparison
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
    resolved = resolve_target(target, overrides, model, stage)
    check = _Check(resolved, group, {"offline": offline, "allow_pickle": allow_pickle})
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
    """Findings, notes and counts of one check: `read` collects faults of single rows, `compare` those of several."""

    def __init__(self, target: ResolvedTarget, group: str | None, source_options: dict[str, bool]) -> None:
        recipe, guess, self.model, note = target
        self.recipe, self.group, self.source_options = recipe, group or recipe.data.group, source_options
        self.findings, self.notes = Findings(), [note] if note else list[str]()
        self.data, named, self.are_splits = find_files(recipe.data, recipe.task, guess=guess)
        first = next(iter(named.values()))
        self.guess = guess
        self.task, misfit = guess_task(recipe.task, first, self.data) if guess else (recipe.task, None)
        self.fitted: Task | None = None
        self.files = list(self._opened(named))
        self.index = RowIndex([file.path for file in self.files])
        self.comparison = RowComparison(self.task, self.files, self.are_splits, self.index)
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
        columns, chunk, lengths = ColumnScan(file), list[tuple[int, str]](), array("q")
        for raw in file.raw_rows():
            columns.add(raw)
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
            is_first, normalized = self._index(number, file, raw, row), duplicates.normalize(text)
            if is_first and len(normalized) >= duplicates.MIN_CHARS:
                chunk.append((len(self.index.file) - 1, normalized))
            if len(chunk) == CHUNK_ROWS:
                self.index.hash(chunk)
            file.rows += 1
            if file.rows == file.limit:
                break
        self.index.hash(chunk)
        self.findings.add(columns.faults())
        if lengths:
            file.lengths = {"unit": "words", **length_summary(np.frombuffer(lengths, dtype=np.int64))}

    def _index(self, number: int, file: File, raw: RawRow, row: Row) -> bool:
        """Add a good row to the index; return whether it is the first with these inputs."""
        index, row_number = self.index, len(self.index.file)
        target = self._target(file, row)
        code = -1 if target is None else index.targets.setdefault(target, len(index.targets))
        value = raw.values.get(self.group, raw.values.get(_number(self.group))) if self.group is not None else None
        group = "" if value is None else str(value).strip()
        index.file.append(number)
        index.line.append(raw.line)
        if raw.file:
            index.text[row_number] = raw.file
        index.target.append(code)
        index.group.append(index.groups.setdefault(group, len(index.groups)) if group else -1)
        earlier = index.by_digest.setdefault(splits.digest(row, file.schema, "NFKC"), row_number)
        if earlier != row_number:
            self.findings.add(self.comparison.duplicate_faults(file, row, target, earlier))
        return earlier == row_number

    def _target(self, file: File, row: Row) -> Any:
        """Return the target of a row and count its classes; None if the row has no valid target."""
        if self.task is None:
            return None
        try:
            target = self.task.parse_target(row)
        except DataError as error:
            kind, what = "bad-row", "the row cannot be used for training"
            if self.comparison.labeled:
                kind, what = "bad-label", "invalid label"
            self.findings.add([Fault(kind, what, row.place, error.what, error.hint, self.row_level)])
            return None
        if target == IGNORED:  # a run skips such rows
            return None
        if self.comparison.labeled and isinstance(target, str | tuple):
            file.classes.update([target] if isinstance(target, str) else target)
        return target

    def compare(self) -> None:
        """Collect faults that concern several rows, and those for which a run would stop."""
        parts = np.array(self.index.file, dtype=np.int64)
        names = [file.name for file in self.files]
        if self.task is not None and names[:1] == ["train"] and self.files[0].rows:
            self._fit_and_split(self.task, parts, names)
        if (task := self.fitted or self.task) is not None:
            for file in self.files:
                self.findings.add(task.faults(file.good_rows()))
        pairs = self.index.candidates(parts)
        texts = self._read_again(set(pairs.ravel().tolist()))
        self.findings.add(self.comparison.near_duplicate_faults(pairs, texts, parts, names))
        if self.group is not None:
            self.findings.add(self.comparison.group_faults(self.group, parts, names))

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
                rows = ((self.index.place(row), targets[self.index.target[row]]) for row in numbers)
                self.findings.add(unknown_labels(file, set(train.classes), rows, self.row_level))
        else:  # regression, or a tag for each word
            for file in self.files:
                file.classes.clear()

    def _try_reading(self, task: Task, keys: dict[str, Any]) -> dataset.Examples | None:
        """Return the data as a run reads it; None if the run would stop."""
        try:
            return dataset.read(task, self.data.model_copy(update=keys), self.recipe.train.seed)
        except DataError as error:
            place = error.where or str(keys["train"])
            self.findings.add([Fault("refused", "the run would stop here", place, error.what, error.hint, "error")])
            return None

    def _read_again(self, wanted: set[int]) -> dict[int, str]:
        """Read all files again: return the texts of the wanted rows, and inspect the tokens of a sample."""
        tokenizer, texts, number = self._tokenizer(), dict[int, str](), 0
        for file in self.files if wanted or tokenizer else ():
            stride, sample = -(-file.rows // MAX_TOKENIZED_ROWS), list[Row]()
            for index, row in enumerate(file.good_rows()):
                if number in wanted:
                    texts[number] = row_text(row, file.schema)
                if tokenizer and index % stride == 0 and row_text(row, file.schema):
                    sample.append(row)
                number += 1
            if tokenizer and sample:
                self._inspect_tokens(file, sample, *tokenizer)
        return texts

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
        """Return tokenizer, maximum length and config of the model; None if no model is named or available."""
        task, technique = self.task or self.recipe.task, self.recipe.technique
        if self.model is None:
            return None
        try:
            source = source_of(self.model, **self.source_options)
            processor = models.load_processor(source, task.auto_class, task.added_tokens, kind=task.processor)
            shape = models.load_shape(source, task.auto_class, processor)
            return processor, max_length(self.data.max_length, shape, processor, technique, task), shape.config
        except UserError as error:
            self.notes.append(f"lengths are in words because the model cannot be loaded ({error})")
            return None


def _number(column: str) -> int | None:
    return int(column) if column.isdigit() else None
