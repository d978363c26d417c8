"""Rows of a file that a run is asked: for each an answer, or what is wrong with it, so that none is lost or shifted."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.encoded import CHUNK_ROWS, Encoded, encode
from tunesmith.data.formats import Row, read_lines, read_table
from tunesmith.data.formats.columns import ANSWERS
from tunesmith.data.formats.parallel import language_of
from tunesmith.deploy.predict import Tuned
from tunesmith.errors import DataError, counted
from tunesmith.tasks import Task
from tunesmith.training import evaluate

Asked = Row | DataError
"""A row as read, or why it cannot be."""


def read_inputs(file: Path, task: Task, columns: Mapping[str, str | int] | None) -> list[Asked]:
    """The rows of a table, or the lines of a plain text: a `.txt`, or what is named after a language (`test.en`), is a
    table only if it names its columns, or has words with tags.

    Raises:
        DataError: not a file we can read.
    """
    roles = {role: names for role, names in task.usual_names().items() if role not in ANSWERS}
    chosen = {role: column for role, column in (columns or {}).items() if role not in ANSWERS} or None
    plain = file.suffix == ".txt" or language_of(file) is not None
    try:
        table = read_table(file, roles, required=task.required - ANSWERS, columns=chosen)
        named = any(isinstance(column, str) for column in table.columns.values())
        if not plain or chosen or named or table.format == "conll":
            return list(table.every_row())
    except DataError:
        if not plain:
            raise
    return read_lines(file, next(iter(roles)))


def answer_rows(
    tuned: Tuned, rows: Sequence[Asked], warn: Callable[[str], None], show: evaluate.Show = evaluate.unseen
) -> list[dict[str, Any]]:
    """An answer for each row, in their order. In its place stands the `error` of a row that cannot be asked, and how
    many of these there are is told, as is how many texts were cut.

    Raises:
        DataError: none of the rows can be asked.
    """
    asked: list[Row] = []
    refused: dict[int, DataError] = {}

    def fields() -> Iterator[dict[str, Any]]:
        numbered = enumerate(rows)
        while chunk := list(islice(numbered, CHUNK_ROWS)):
            for row, one in _fields(tuned, chunk, refused):
                asked.append(row)
                yield one

    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        encoded = encode(fields(), lambda chunk: chunk, Path(folder) / "rows")
        if refused and not asked:
            raise next(iter(refused.values()))
        _tell(tuned, encoded, refused, warn)
        given = evaluate.answers(tuned.model, tuned.task, encoded, tuned.machine, show)
    answers = (tuned.task.completed(answer, row) for answer, row in zip(given, asked, strict=True))
    return [
        {"error": f"{refused[number].where}: {refused[number].what}"} if number in refused else next(answers)
        for number in range(len(rows))
    ]


def _fields(
    tuned: Tuned, rows: Sequence[tuple[int, Asked]], refused: dict[int, DataError]
) -> list[tuple[Row, dict[str, Any]]]:
    """Rows as they are asked, with their fields; by halves, where one of them cannot be, until it is found."""
    try:
        asked = [_asked(tuned.task, row) for _, row in rows]
        return list(zip(asked, tuned.task.encode(asked, tuned.processor, tuned.data), strict=True))
    except DataError as error:
        if len(rows) == 1:
            refused[rows[0][0]] = error
            return []
    half = len(rows) // 2
    return _fields(tuned, rows[:half], refused) + _fields(tuned, rows[half:], refused)


def _asked(task: Task, row: Asked) -> Row:
    if isinstance(row, DataError):
        raise row
    if not row.values:
        raise DataError("nothing in it", where=row.place, hint="fill it in or remove the row")
    return task.asked(row)


def _tell(tuned: Tuned, encoded: Encoded, refused: Mapping[int, DataError], warn: Callable[[str], None]) -> None:
    """What should be known beside the answers."""
    if refused:
        total, (first, *_) = len(encoded) + len(refused), refused.values()
        which = f"{len(refused)} of {counted(total, 'row')} {'has' if len(refused) == 1 else 'have'} no answer"
        warn(f"{which}, the first at {first.where}: {first.what}")
    if "cut" in encoded.fields and (cut := np.count_nonzero(encoded.column("cut"))):
        read = f"{tuned.data.max_length} tokens (the run's data.max_length)"
        which = f"{cut} of {counted(len(encoded), 'text')}"
        warn(f"{which} {'is longer' if cut == 1 else 'are longer'} than {read} and cut there")
