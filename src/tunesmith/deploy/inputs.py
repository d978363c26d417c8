"""Predictions for the rows of a file: for each row an answer or an error, in order, so that no row is lost."""

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
from tunesmith.deploy.predict import FineTunedModel
from tunesmith.errors import DataError, counted
from tunesmith.tasks import BoundTask, Task
from tunesmith.training import evaluate

Input = Row | DataError
"""A row, or the error that it cannot be read."""


def read_inputs(file: Path, task: Task, columns: Mapping[str, str | int] | None) -> list[Input]:
    """Read the rows of a table, or the lines of a plain text.

    A `.txt` file, or a file named after a language (`test.en`), is a table only if it names its columns or has tagged
    words.

    Raises:
        DataError: the format is not supported.
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
    model: FineTunedModel,
    rows: Sequence[Input],
    warn: Callable[[str], None],
    show: evaluate.Show = evaluate.no_progress,
) -> list[dict[str, Any]]:
    """Return an answer for each row, in their order; a row that cannot be an input has an `error` instead.

    Warns of the number of such rows and of truncated texts.

    Raises:
        DataError: no row can be an input.
    """
    inputs: list[Row] = []
    refused: dict[int, DataError] = {}

    def fields() -> Iterator[Fields]:
        numbered = enumerate(rows)
        while chunk := list(islice(numbered, CHUNK_ROWS)):
            for row, one in _encode(model, chunk, refused):
                inputs.append(row)
                yield one

    encoded = encode_in_memory(fields(), lambda chunk: chunk, model.bound.costs)
    if refused and not inputs:
        raise next(iter(refused.values()))
    _warn(model, encoded, refused, warn)
    given = evaluate.answers(model.model, model.bound, encoded, model.machine, show)
    answers = (model.bound.postprocess(answer, row) for answer, row in zip(given, inputs, strict=True))
    return [
        {"error": f"{refused[number].where}: {refused[number].what}"} if number in refused else next(answers)
        for number in range(len(rows))
    ]


def _encode(
    model: FineTunedModel, rows: Sequence[tuple[int, Input]], refused: dict[int, DataError]
) -> list[tuple[Row, Fields]]:
    """Return rows as inputs with their fields; on an error, halve the rows until the faulty one is found."""
    try:
        prompts = [_prompt(model.bound, row) for _, row in rows]
        return list(zip(prompts, model.bound.encode(prompts), strict=True))
    except DataError as error:
        if len(rows) == 1:
            refused[rows[0][0]] = error
            return []
    half = len(rows) // 2
    return _encode(model, rows[:half], refused) + _encode(model, rows[half:], refused)


def _prompt(bound: BoundTask, row: Input) -> Row:
    if isinstance(row, DataError):
        raise row
    if not row.values:
        raise DataError("empty row", where=row.place, hint="fill it in or remove it")
    return bound.as_prompt(row)


def _warn(
    model: FineTunedModel, encoded: Encoded, refused: Mapping[int, DataError], warn: Callable[[str], None]
) -> None:
    """Warn of rows without an answer and of truncated texts."""
    if refused:
        total, (first, *_) = len(encoded) + len(refused), refused.values()
        which = f"{len(refused)} of {counted(total, 'row')} {'has' if len(refused) == 1 else 'have'} no answer"
        warn(f"{which}; first error: {first.where}: {first.what}")
    if "cut" in encoded and (cut := np.count_nonzero(encoded.column("cut"))):
        read = f"{model.data.max_length} tokens (the run's data.max_length)"
        which = f"{cut} of {counted(len(encoded), 'text')}"
        warn(f"{which} {'is longer' if cut == 1 else 'are longer'} than {read} and truncated")
