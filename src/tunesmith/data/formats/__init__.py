"""Readers of data files: formats are detected by content, rows are streamed, every error has file and line.

A table can be read several times. A role is the name under which a task reads a column (`text`, `label`). The file's
column for each role is found by `data.columns`, by common names, or by its values if the file has no header.
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
    """One row. `place` is `reviews.csv:7`. `values` maps roles to values; an empty optional column is absent."""

    place: str
    values: dict[str, object]
    by_line: bool = False
    """True if each list element is on a line of its own (CoNLL)."""
    columns: Mapping[str, str | int] = field(default_factory=dict)
    """Role -> column of the file, if columns have names."""

    def column_name(self, role: str) -> str:
        """Return the file's name for a role."""
        return _display_name(self.columns.get(role, role))

    def fault(self, role: str, what: str, hint: str, index: int | None = None) -> DataError:
        """Return the error for the value of a role, or for one element of its list."""
        place = self.place if index is None else self.place_of(index)
        return DataError(f"{self.column_name(role)}: {what}", where=place, hint=hint)

    def place_of(self, index: int) -> str:
        """Return file and line of a list element: its own line if it has one, else the row's."""
        file, _, line = self.place.rpartition(":")
        return f"{file}:{int(line) + index}" if self.by_line else self.place


@dataclass
class Table:
    """Rows of one file. Each iteration reads the file again; `skipped` counts the bad rows skipped in the last one."""

    path: Path
    format: Format
    schema: dict[str, Column]
    """Role -> the task's column."""
    columns: dict[str, str | int]
    """Role -> column of the file."""
    on_bad_row: Literal["stop", "skip"]
    note: str | None
    raw_rows: Rows = field(repr=False)
    limit: int | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    state: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.state = _state(self.path)

    @cached_property
    def display_path(self) -> Path:
        """The path as error messages show it, with both files of a parallel pair."""
        return (
            parallel.display_path(self.path, list(map(str, self.columns.values())))
            if self.format == "parallel"
            else self.path
        )

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the file, or of the names and hashes of a folder's files."""
        self._check_unchanged()
        if self.path.is_file():
            return file_sha256(self.path)
        folder = self.path if self.path.is_dir() else self.path.parent
        hashes = [f"{path.relative_to(folder).as_posix()} {file_sha256(path)}" for path in files_of(self.path)]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def _check_unchanged(self) -> None:
        if _state(self.path) != self.state:
            what = "the file has changed since it was first read"
            raise DataError(what, where=str(self.path), hint="do not edit it during a run; start again")

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
        """Yield all rows in order; for a row that cannot be read, its error."""
        self._check_unchanged()
        for raw in self.raw_rows():
            row = self.parse_row(raw)
            yield row if isinstance(row, Row) else _row_error(self.place_of(row), row, skippable=False)

    def parse_row(self, raw: RawRow | BadRow) -> Row | BadRow:
        """Convert a raw row to a `Row`, or to a `BadRow` with the fault."""
        values = raw if isinstance(raw, BadRow) else self._values(raw)
        if isinstance(values, BadRow):
            return values
        if self.format == "conll":
            return Row(self.place_of(raw), values, by_line=True)
        return Row(self.place_of(raw), values, columns=self.columns)

    def place_of(self, raw: RawRow | BadRow) -> str:
        """Return file and line of a row."""
        return f"{self.display_path / raw.file}:{raw.line}"

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
                    what = f"{_display_name(column)}: {'empty' if column in raw.values else 'missing'}"
                    return BadRow(raw.line, what, "fill it in or remove the row", f"empty {role}", raw.file)
                continue
            validated_by_task = kind in LIST_KINDS and isinstance(value, list)
            if not validated_by_task and (fault := _value_fault(self.schema[role], value)) is not None:
                what, hint, reason = fault
                return BadRow(raw.line, f"{_display_name(column)}: {what}", hint, reason, raw.file)
            values[role] = value
        return values


def _display_name(column: str | int) -> str:
    return f"column {column}" if isinstance(column, int) else shorten(column)[1:-1]


def _state(path: Path) -> tuple[int, int]:
    try:
        stats = [file.stat() for file in files_of(path)]
    except OSError as error:
        raise unreachable_error(path, error) from None
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def check_exists(path: Path) -> None:
    """Check that a file, a folder or a parallel pair exists at a path.

    Raises:
        DataError: nothing exists there.
    """
    if not os.path.exists(path) and not parallel.sides_of(path):
        format_of(path)  # raises the error


def files_of(path: Path) -> list[Path]:
    """Return the files of a path: the file itself, the texts in a folder, or the files of a parallel pair."""
    if path.is_dir():
        return plain.texts_in(path)
    return [path] if path.exists() else list(parallel.sides_of(path).values()) or [path]


def _row_error(place: str, bad: BadRow, *, skippable: bool) -> DataError:
    hints = [bad.hint or "correct it", *(["or set data.on_bad_row=skip"] if skippable else [])]
    return DataError(bad.what, where=place, hint=", ".join(hints))


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # Parquet has NaN where a value is missing


def _value_fault(column: Column, value: object) -> tuple[str, str, str] | None:
    """Return (fault, hint, short reason) of a value; None if it is valid."""
    role = column.name
    if column.kind == "image" and isinstance(value, bytes):
        return None
    if column.kind == "text" and not isinstance(value, str):
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            what = f"expected a text, got a conversation of {counted(len(value), 'turn')}: {shorten(value[:3])}"
            return what, "join its messages into one text", f"{role} is not a text"
        hint = "give one text a row" if isinstance(value, list | dict) else "put it in quotes"
        return f"{shorten(value)} is not a text", hint, f"{role} is not a text"
    if isinstance(value, str):
        if len(value) <= MAX_CHARS:
            return None
        what = f"{len(value):,} characters in one field {shorten(value[:100], 40)}"
        return what, "check for an unclosed quotation mark", "field too long"
    parts = value if isinstance(value, list) else [value]
    if all(isinstance(part, str | int | float) and not _is_missing(part) for part in parts):
        return None
    hint, reason = "give a text, a number, or a list of them", f"{role} has an unsupported type"
    return f"{shorten(value)} has an unsupported type", hint, reason


def read_table(
    path: str | Path,
    columns: Columns,
    *,
    named: Mapping[str, str | int] | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    limit: int | None = None,
    plain_text: bool = False,
) -> Table:
    """Open a file as rows of `columns`. `named` maps roles to columns of the file (`data.columns`).

    With `plain_text`, a plain text file or a folder of them is read as values of the first column.

    Raises:
        DataError: the file cannot be read, or a required column is missing.
    """
    path = Path(path)
    schema, chosen = {column.name: column for column in columns}, dict(named or {})

    def table(kind: Format, mapping: dict[str, str | int], note: str | None, rows: Rows) -> Table:
        return Table(path, kind, schema, mapping, on_bad_row, note, rows, limit)

    if predicts_text(columns) and not path.exists() and (sides := parallel.sides_of(path)):
        opened = parallel.open_rows(sides)
        mapping, note, _ = find_columns(path, opened, columns, chosen)
        opened = parallel.open_rows({side: file for side, file in sides.items() if side in mapping.values()})
        return table("parallel", mapping, note, opened.rows)
    tagged = column_of_kind(columns, "words") is not None
    kind: Format = "text" if plain_text and is_folder(path) else format_of(path, tagged=tagged)
    if plain_text and not chosen and kind in ("csv", "tsv") and plain.is_plain_text(path, columns):
        kind = "text"
    opened = plain.open_rows(path, columns[0].name) if kind == "text" else _OPENERS[kind](path)
    opened = parallel.flatten_translations(opened) if predicts_text(columns) else opened
    if not opened.names:
        raise _no_columns_error(path, opened)
    if kind == "conll":
        mapping, note = conll.find_columns(path, opened, columns, chosen)
        return table(kind, mapping, note, opened.rows)
    mapping, note, has_names = find_columns(path, opened, columns, chosen)
    raw_rows = opened.rows if has_names else opened.by_number
    assert raw_rows is not None, "only delimited files may lack a header"
    if kind != "text" and not any(True for _ in islice(raw_rows(), 1)):
        raise DataError("the file has a header but no rows", where=str(path), hint="add rows")
    return table(kind, mapping, note, raw_rows)


def read_raw(path: str | Path, header: bool | None = None) -> tuple[Sequence[str | int], Rows]:
    """Return the names of all columns (numbers if there is no header) and a reader of the raw rows.

    Raises:
        DataError: the file cannot be read, or two columns have the same name.
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
    """Read a plain text file: each line is a row with one role, or the error of a blank or unreadable line.

    Raises:
        DataError: the file cannot be read.
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
    """Return the error for a file without column names: its first row is bad, or it has no rows."""
    first = next(opened.rows(), None)
    if isinstance(first, BadRow):
        return _row_error(f"{path}:{first.line}", first, skippable=False)
    return DataError("the file has no rows", where=str(path), hint="check that it is the right file")
