"""Rows of a file that a run is asked: for each an answer, or what is wrong with it, so that none is lost or shifted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.columns import inputs_of
from tunesmith.data.encoded import CHUNK_ROWS, Encoded, Fields, encode_in_memory
from tunesmith.data.formats import Row, read_lines, read_table
from tunesmith.data.formats.parallel import language_of
from tunesmith.deploy.predict import Tuned
from tunesmith.errors import DataError, counted
from tunesmith.tasks import BoundTask, Task
from tunesmith.training import evaluate

Asked = Row | DataError
"""A row as read, or why it cannot be."""


def read_inputs(file: Path, task: Task, columns: Mapping[str, str | int] | None) -> list[Asked]:
    """The rows of a table, or the lines of a plain text: a `.txt`, or what is named after a language (`test.en`), is a
    table only if it names its columns, or has words with tags.

    Raises:
        DataError: not a file we can read.
    """
    wanted = inputs_of(task.columns)
    names = {column.name for column in wanted}
    chosen = {name: column for name, column in (columns or {}).items() if name in names} or None
    plain = file.suffix == ".txt" or language_of(file) is not None
    try:
        table = read_table(file, wanted, named=chosen)
        named = any(isinstance(column, str) for column in table.columns.values())
        if not plain or chosen or named or table.format == "conll":
            return list(table.rows_or_errors())
    except DataError:
        if not plain:
            raise
    return read_lines(file, wanted[0].name)


def answer_rows(
    tuned: Tuned, rows: Sequence[Asked], warn: Callable[[str], None], show: evaluate.Show = evaluate.no_progress
) -> list[dict[str, Any]]:
    """An answer for each row, in their order. In its place stands the `error` of a row that cannot be asked, and how
    many of these there are is told, as is how many texts were cut.

    Raises:
        DataError: none of the rows can be asked.
    """
    asked: list[Row] = []
    refused: dict[int, DataError] = {}

    def fields() -> Iterator[Fields]:
        numbered = enumerate(rows)
        while chunk := list(islice(numbered, CHUNK_ROWS)):
            for row, one in _fields(tuned, chunk, refused):
                asked.append(row)
                yield one

    encoded = encode_in_memory(fields(), lambda chunk: chunk, tuned.bound.costs)
    if refused and not asked:
        raise next(iter(refused.values()))
    _tell(tuned, encoded, refused, warn)
    given = evaluate.answers(tuned.model, tuned.bound, encoded, tuned.machine, show)
    answers = (tuned.bound.postprocess(answer, row) for answer, row in zip(given, asked, strict=True))
    return [
        {"error": f"{refused[number].where}: {refused[number].what}"} if number in refused else next(answers)
        for number in range(len(rows))
    ]


def _fields(tuned: Tuned, rows: Sequence[tuple[int, Asked]], refused: dict[int, DataError]) -> list[tuple[Row, Fields]]:
    """Rows as they are asked, with their fields; by halves, where one of them cannot be, until it is found."""
    try:
        asked = [_asked(tuned.bound, row) for _, row in rows]
        return list(zip(asked, tuned.bound.encode(asked), strict=True))
    except DataError as error:
        if len(rows) == 1:
            refused[rows[0][0]] = error
            return []
    half = len(rows) // 2
    return _fields(tuned, rows[:half], refused) + _fields(tuned, rows[half:], refused)


def _asked(bound: BoundTask, row: Asked) -> Row:
    if isinstance(row, DataError):
        raise row
    if not row.values:
        raise DataError("nothing in it", where=row.place, hint="fill it in or remove the row")
    return bound.as_prompt(row)


def _tell(tuned: Tuned, encoded: Encoded, refused: Mapping[int, DataError], warn: Callable[[str], None]) -> None:
    """What should be known beside the answers."""
    if refused:
        total, (first, *_) = len(encoded) + len(refused), refused.values()
        which = f"{len(refused)} of {counted(total, 'row')} {'has' if len(refused) == 1 else 'have'} no answer"
        warn(f"{which}, the first at {first.where}: {first.what}")
    if "cut" in encoded and (cut := np.count_nonzero(encoded.column("cut"))):
        read = f"{tuned.data.max_length} tokens (the run's data.max_length)"
        which = f"{cut} of {counted(len(encoded), 'text')}"
        warn(f"{which} {'is longer' if cut == 1 else 'are longer'} than {read} and cut there")
