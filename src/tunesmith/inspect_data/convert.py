"""Conversion between formats: `tunesmith data convert reviews.csv reviews.jsonl`.

Entities are written as words with one tag each (as in CoNLL), or as a text with character spans. Each form can be
converted to the other.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith import registry
from tunesmith.data.formats import read_raw, read_table
from tunesmith.data.formats.json_values import parse_json
from tunesmith.data.formats.raw import BadRow, RawRow, Rows
from tunesmith.data.formats.write import WRITERS, format_by_name, write_table
from tunesmith.data.text.spans import read_tags, words_of
from tunesmith.data.text.tags import TagSet
from tunesmith.errors import DataError, RecipeError, did_you_mean
from tunesmith.storage.files import disk_error
from tunesmith.tasks import Task

Values = dict[str, Any]


def convert(
    source: str | Path,
    output: Path,
    *,
    to: str | None = None,
    header: bool | None = None,
    skip: bool = False,
    spans: bool = False,
) -> dict[str, Any]:
    """Convert a file; return the number of rows, the columns, the skipped rows and the columns `left_out`.

    `header`: whether the first line is a header (default: detected). `spans`: write entities as character spans
    instead of tags. Columns without a name become `column_0` and so on. A bad row raises, unless `skip`.

    Raises:
        RecipeError: the format is unknown, or the output exists.
        DataError: the source or one of its rows cannot be read, or the format cannot represent a row.
    """
    kind = to or format_by_name(output)
    if kind not in WRITERS:
        raise RecipeError(f"--to: unknown format {kind}", hint=did_you_mean(kind, WRITERS))
    if spans and kind == "conll":
        raise RecipeError("--spans: CoNLL cannot represent spans", hint="write jsonl, or remove --spans")
    if output.exists():
        raise RecipeError("the file exists and is not overwritten", where=str(output), hint="choose another name")
    if not output.absolute().parent.is_dir():
        raise RecipeError("the folder does not exist", where=str(output.parent), hint="create it first")
    read = _open_entities(Path(source), spans) if spans or kind == "conll" else _open_as_is(Path(source), header)
    skipped, count = Counter[str](), 0

    def rows() -> Iterator[tuple[str, Values]]:
        nonlocal count
        skipped.clear()
        count = 0
        for raw in read.rows():
            place, bad = f"{Path(source, raw.file)}:{raw.line}", raw
            if isinstance(raw, RawRow):
                try:
                    values = read.values(raw)
                except DataError as error:
                    bad = BadRow(raw.line, error.what, error.hint, "unusable tags", raw.file)
                else:
                    count += 1
                    yield place, values
                    continue
            assert isinstance(bad, BadRow), "good rows are written above"
            if not skip:
                raise DataError(bad.what, where=place, hint=f"{bad.hint or 'correct it'}, or set --skip-bad-rows")
            skipped[bad.reason] += 1

    writing = output.with_name(f".tmp-{os.getpid()}-{output.name}")
    try:
        write_table(writing, kind, read.names, rows)
        output.open("x").close()  # unlike a rename, it fails if the file exists by now
        writing.replace(output)
    except FileExistsError:
        raise RecipeError("the file exists by now and is not overwritten", where=str(output)) from None
    except DataError as error:
        raise DataError(error.what, where=error.where or str(source), hint=error.hint) from None
    except OSError as error:
        raise disk_error(error, output) from error
    finally:
        writing.unlink(missing_ok=True)
    about = {"input": str(source), "output": str(output), "format": kind, "rows": count}
    return about | {"columns": list(read.names), "left_out": read.left_out, "skipped": dict(skipped)}


@dataclass(frozen=True)
class _Source:
    """Names of the output columns, a reader of rows, and a function from a row to its output values."""

    names: Sequence[str]
    rows: Rows
    values: Callable[[RawRow], Values]
    left_out: list[str] = field(default_factory=list)


def _open_as_is(path: Path, header: bool | None) -> _Source:
    columns, rows = read_raw(path, header)
    names = {column: _name(column) for column in columns}
    lists = _list_columns(rows)

    def values(raw: RawRow) -> Values:
        decoded = {**raw.values, **{column: parse_json(raw.values.get(column)) for column in lists}}
        return {names[column]: value for column, value in decoded.items()}

    return _Source(list(names.values()), rows, values)


def _open_entities(path: Path, spans: bool) -> _Source:
    """Open sentences with entities in any annotation.

    Other columns are kept if they fit: beside tags, those with one value per word; beside a text, those with one
    value per row.
    """
    task = registry.get("task", "token-classification")
    assert isinstance(task, type) and issubclass(task, Task)
    try:
        table = read_table(path, task().columns)
    except DataError as error:
        hint = "give words with tags (tokens, tags), or a text with spans"
        raise DataError(error.what, where=error.where, hint=hint) from None
    first = next((raw for raw in table.raw_rows() if isinstance(raw, RawRow)), RawRow(1, {}))
    others = [column for column in first.values if column not in table.columns.values()]
    kept = [column for column in others if isinstance(parse_json(first.values[column]), list) != spans]
    own = ("text", "spans") if spans else ("tokens", "tags")

    def values(raw: RawRow) -> Values:
        row = table.parse_row(raw)
        if isinstance(row, BadRow):
            raise DataError(row.what, hint=row.hint)
        sentence, tags = words_of(row), read_tags(row, None)
        other_values: Values = {_name(column): parse_json(raw.values.get(column)) for column in kept}
        if not spans:
            return {own[0]: sentence.words, **other_values, own[1]: list(tags)}
        entities = [
            {"start": sentence.offsets[begin][0], "end": sentence.offsets[end - 1][1], "label": label}
            for begin, end, label in TagSet(sorted(set(tags))).spans(tags)
        ]
        return {own[0]: sentence.text, own[1]: entities, **other_values}

    names = [_name(column) for column in kept]
    ordered = [*own, *names] if spans else [own[0], *names, own[1]]
    return _Source(ordered, table.raw_rows, values, [_name(column) for column in others if column not in kept])


def _name(column: str | int) -> str:
    return f"column_{column}" if isinstance(column, int) else column


def _list_columns(rows: Rows) -> list[Any]:
    """Return the columns whose non-empty cells are all JSON lists or objects written as text."""
    is_json: dict[Any, bool] = {}
    for raw in rows():
        for column, value in raw.values.items() if isinstance(raw, RawRow) else ():
            if value and is_json.get(column, True):
                is_json[column] = isinstance(value, str) and not isinstance(parse_json(value), str)
    return [column for column, all_json in is_json.items() if all_json]
