"""Reads what users have, as it is: recognised by content, row by row, every fault with its place.

A table is read as a stream and can be read again. Columns are found by role (`text`, `label` ...): by the user's own
naming, by the usual names, or by what is in them where there is no header.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

from tunesmith.data.columns import JSON_LIST_KINDS, LIST_KINDS, Column, Columns, predicts_text
from tunesmith.data.columns import of_kind as column_of_kind
from tunesmith.data.encoded import file_sha256
from tunesmith.data.formats import conll, delimited, json_array, json_lines, parallel, parquet, plain
from tunesmith.data.formats.columns import find_columns, has_header, refuse_duplicate_names
from tunesmith.data.formats.folders import find_splits, holds_text, is_folder
from tunesmith.data.formats.json_values import parse_json
from tunesmith.data.formats.raw import MAX_CHARS, BadRow, OpenedFile, RawRow, Rows, check_line, lines, open_text
from tunesmith.data.formats.recognize import Format, format_of, unreachable_error
from tunesmith.errors import DataError, counted, shorten

__all__ = [
    "Row",
    "Table",
    "check_exists",
    "files_of",
    "find_splits",
    "holds_text",
    "is_folder",
    "read_lines",
    "read_raw",
    "read_table",
]


@dataclass(frozen=True, slots=True)
class Row:
    """One example as read: `place` is `reviews.csv:7`; an optional role without a value is absent."""

    place: str
    values: dict[str, object]
    by_line: bool = False
    """Whether the parts of its lists stand on a line each."""
    columns: Mapping[str, str | int] = field(default_factory=dict)
    """Role -> the column that it was read from, where columns have names."""

    def named(self, role: str) -> str:
        """A role as the file calls it."""
        return _shown(self.columns.get(role, role))

    def fault(self, role: str, what: str, hint: str, index: int | None = None) -> DataError:
        """What is wrong with the value of a role, or with a part of its list."""
        place = self.place if index is None else self.place_of(index)
        return DataError(f"{self.named(role)}: {what}", where=place, hint=hint)

    def place_of(self, index: int) -> str:
        """Where the part of a list stands: its own line, or the row."""
        file, _, line = self.place.rpartition(":")
        return f"{file}:{int(line) + index}" if self.by_line else self.place


@dataclass
class Table:
    """Rows of one file under roles; iterating reads the file anew. `skipped` counts what the last reading left out."""

    path: Path
    format: Format
    schema: dict[str, Column]
    """The columns that the task reads, by name."""
    columns: dict[str, str | int]
    """Their names -> those in the file."""
    on_bad_row: Literal["stop", "skip"]
    note: str | None
    raw_rows: Rows = field(repr=False)
    limit: int | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    state: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.state = _state(self.path)

    @cached_property
    def shown(self) -> Path:
        """The path as places name it: with both files of a pair."""
        return (
            parallel.display_path(self.path, list(map(str, self.columns.values())))
            if self.format == "parallel"
            else self.path
        )

    @cached_property
    def sha256(self) -> str:
        """Of the bytes of the file, or of the texts of the folder with their names."""
        self._check_unchanged()
        if self.path.is_file():
            return file_sha256(self.path)
        beside = self.path if self.path.is_dir() else self.path.parent
        known = [f"{path.relative_to(beside).as_posix()} {file_sha256(path)}" for path in files_of(self.path)]
        return hashlib.sha256("\n".join(known).encode()).hexdigest()

    def _check_unchanged(self) -> None:
        if _state(self.path) != self.state:
            what = "the file has changed since it was first read"
            raise DataError(what, where=str(self.path), hint="leave it alone while a run reads it, and start again")

    def __iter__(self) -> Iterator[Row]:
        self._check_unchanged()
        self.skipped = Counter()
        return islice(self._good_rows(), self.limit)

    def _good_rows(self) -> Iterator[Row]:
        for raw in self.raw_rows():
            row = self.parse_row(raw)
            if isinstance(row, Row):
                yield row
            elif self.on_bad_row == "stop":
                raise _row_error(self.place_of(row), row, skippable=True)
            else:
                self.skipped[row.reason] += 1

    def rows_or_errors(self) -> Iterator[Row | DataError]:
        """All rows in their order; of one that cannot be read, why."""
        self._check_unchanged()
        for raw in self.raw_rows():
            row = self.parse_row(raw)
            yield row if isinstance(row, Row) else _row_error(self.place_of(row), row, skippable=False)

    def parse_row(self, raw: RawRow | BadRow) -> Row | BadRow:
        """A row as read under its roles, or what is wrong with it."""
        values = raw if isinstance(raw, BadRow) else self._values(raw)
        if isinstance(values, BadRow):
            return values
        if self.format == "conll":
            return Row(self.place_of(raw), values, by_line=True)
        return Row(self.place_of(raw), values, columns=self.columns)

    def place_of(self, raw: RawRow | BadRow) -> str:
        """File and line of a row."""
        return f"{self.shown / raw.file}:{raw.line}"

    def _values(self, raw: RawRow) -> dict[str, object] | BadRow:
        values: dict[str, object] = {}
        for role, column in self.columns.items():
            value = raw.values.get(column)
            if isinstance(value, Decimal):
                value = float(value)
            kind = self.schema[role].kind
            if isinstance(value, str) and kind in ("label", "tags"):
                value = value.strip()
            if kind in JSON_LIST_KINDS:
                value = parse_json(value)
            if _is_missing(value) or (isinstance(value, str) and not value.strip()):
                if self.schema[role].required:
                    what = f"{_shown(column)}: {'empty' if column in raw.values else 'not there'}"
                    return BadRow(raw.line, what, "fill it in or remove the row", f"empty {role}", raw.file)
                continue
            judged_by_task = kind in LIST_KINDS and isinstance(value, list)
            if not judged_by_task and (fault := _value_fault(self.schema[role], value)) is not None:
                what, hint, reason = fault
                return BadRow(raw.line, f"{_shown(column)}: {what}", hint, reason, raw.file)
            values[role] = value
        return values


def _shown(column: str | int) -> str:
    return f"column {column}" if isinstance(column, int) else shorten(column)[1:-1]


def _state(path: Path) -> tuple[int, int]:
    try:
        found = [file.stat() for file in files_of(path)]
    except OSError as error:
        raise unreachable_error(path, error) from None
    return sum(one.st_size for one in found), max((one.st_mtime_ns for one in found), default=0)


def check_exists(path: Path) -> None:
    """See that there is something, whatever it is.

    Raises:
        DataError: there is not.
    """
    if not os.path.exists(path) and not parallel.sides_of(path):
        format_of(path)  # says why


def files_of(path: Path) -> list[Path]:
    """The files that a path names: itself, the texts in a folder, or those of its languages."""
    if path.is_dir():
        return plain.texts_in(path)
    return [path] if path.exists() else list(parallel.sides_of(path).values()) or [path]


def _row_error(place: str, bad: BadRow, *, skippable: bool) -> DataError:
    ways = [bad.hint or "mend it", *(["or data.on_bad_row=skip"] if skippable else [])]
    return DataError(bad.what, where=place, hint=", ".join(ways))


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # Parquet has NaN where a value is missing


def _value_fault(column: Column, value: object) -> tuple[str, str, str] | None:
    """What is wrong with a value, the way out, and a short reason."""
    role = column.name
    if column.kind == "image" and isinstance(value, bytes):
        return None
    if column.kind == "text" and not isinstance(value, str):
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            what = f"a conversation of {counted(len(value), 'turn')} is not a text: {shorten(value[:3])}"
            return what, "write what is to be told apart as one text", f"{role} is not a text"
        hint = "give one text a row" if isinstance(value, list | dict) else "put it in quotes"
        return f"{shorten(value)} is not a text", hint, f"{role} is not a text"
    if isinstance(value, str):
        if len(value) <= MAX_CHARS:
            return None
        what = f"{len(value):,} characters in one field {shorten(value[:100], 40)}"
        return what, "is a quotation mark left open?", "field too long"
    parts = value if isinstance(value, list) else [value]
    if all(isinstance(part, str | int | float) and not _is_missing(part) for part in parts):
        return None
    return f"{shorten(value)} is no value", "give a text, a number, or a list of them", f"{role} is no value"


def read_table(
    path: str | Path,
    columns: Columns,
    *,
    named: Mapping[str, str | int] | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    limit: int | None = None,
    plain_text: bool = False,
) -> Table:
    """Open a file as rows of `columns`; `named` are the user's own names for some of them (`data.columns`).

    With `plain_text` a file that is no table, or a folder of such files, gives texts of the first column.

    Raises:
        DataError: not a file we can read, or a required column is not in it.
    """
    path = Path(path)
    schema, chosen = {column.name: column for column in columns}, dict(named or {})

    def table(kind: Format, found: dict[str, str | int], note: str | None, rows: Rows) -> Table:
        return Table(path, kind, schema, found, on_bad_row, note, rows, limit)

    if predicts_text(columns) and not path.exists() and (sides := parallel.sides_of(path)):
        opened = parallel.open_rows(sides)
        found, note, _ = find_columns(path, opened, columns, chosen)
        opened = parallel.open_rows({side: file for side, file in sides.items() if side in found.values()})
        return table("parallel", found, note, opened.rows)
    tagged = column_of_kind(columns, "words") is not None
    kind: Format = "text" if plain_text and is_folder(path) else format_of(path, tagged=tagged)
    if plain_text and not chosen and kind in ("csv", "tsv") and plain.is_plain_text(path, columns):
        kind = "text"
    opened = plain.open_rows(path, columns[0].name) if kind == "text" else _OPENERS[kind](path)
    opened = parallel.unpacked(opened) if predicts_text(columns) else opened
    if not opened.names:
        raise _no_columns_error(path, opened)
    if kind == "conll":
        found, note = conll.find_columns(path, opened, columns, chosen)
        return table(kind, found, note, opened.rows)
    found, note, headed = find_columns(path, opened, columns, chosen)
    raw_rows = opened.rows if headed else opened.by_number
    assert raw_rows is not None, "only where the first line may be data is there no header"
    if kind != "text" and not any(True for _ in islice(raw_rows(), 1)):
        raise DataError("there is a header but no row below it", where=str(path), hint="add rows")
    return table(kind, found, note, raw_rows)


def read_raw(path: str | Path, header: bool | None = None) -> tuple[Sequence[str | int], Rows]:
    """Names (numbers, where there is no header) of all columns, and a reader of the rows as they stand.

    Raises:
        DataError: not a file we can read, or a name stands above two columns.
    """
    path = Path(path)
    if not path.exists() and (sides := parallel.sides_of(path)):
        return (opened := parallel.open_rows(sides)).names, opened.rows
    if holds_text(path):
        opened = plain.open_rows(path, "text")
        return opened.names, opened.rows
    kind = format_of(path, tagged=True)
    opened = _OPENERS[kind](path)
    if not opened.names:
        raise _no_columns_error(path, opened)
    if kind == "conll":
        return conll.with_names(opened)
    if opened.by_number is None or (has_header(opened) if header is None else header):
        refuse_duplicate_names(opened.names, f"{path}:{opened.line}")
        return opened.names, opened.rows
    return range(len(opened.names)), opened.by_number


_OPENERS: dict[Format, Callable[[Path], OpenedFile]] = {
    "csv": delimited.open_rows,
    "tsv": delimited.open_rows,
    "jsonl": json_lines.open_rows,
    "json": json_array.open_rows,
    "parquet": parquet.open_rows,
    "conll": conll.open_rows,
}


def read_lines(path: str | Path, role: str) -> list[Row | DataError]:
    """A plain text: each line is a row with one role; of a blank one, or one that cannot be read, why it is none.

    Raises:
        DataError: not a file we can read.
    """
    path = Path(path)
    format_of(path)
    rows: list[Row | DataError] = []
    with open_text(path) as file:
        for number, line in enumerate(lines(file), start=1):
            text, place = line.strip(), f"{path}:{number}"
            bad = check_line(line, number)
            if bad is None and not text:
                bad = BadRow(number, f"{role}: empty", "fill it in", "empty line")
            rows.append(Row(place, {role: text}) if bad is None else _row_error(place, bad, skippable=False))
    return rows


def _no_columns_error(path: Path, opened: OpenedFile) -> DataError:
    """Why a file has no names of columns: its rows are bad, or it has none."""
    first = next(opened.rows(), None)
    if isinstance(first, BadRow):
        return _row_error(f"{path}:{first.line}", first, skippable=False)
    return DataError("there is no row in it", where=str(path), hint="is it the right file?")
