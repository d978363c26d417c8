"""Reads what users have, as it is: recognised by content, row by row, every fault with its place.

A table is read as a stream and can be read again; only a JSON array is held in memory. Columns are found by role
(`text`, `label` ...): by the user's own naming, by the usual names, or by what is in them where there is no header.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from tunesmith.data.formats import delimited, json_array, json_lines, parquet
from tunesmith.data.formats.columns import find_columns
from tunesmith.data.formats.raw import BadRow, RawRow, open_text
from tunesmith.errors import DataError, did_you_mean, shorten

__all__ = ["Row", "Table", "find_splits", "read_table"]

MAX_FIELD_CHARS = 16 * 2**20
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".json", ".ndjson", ".parquet", ".csv.gz", ".tsv.gz", ".jsonl.gz")
FOREIGN = {
    b"PK\x03\x04": ("a zip or Excel file", "save it as CSV (UTF-8)"),
    b"\xd0\xcf\x11\xe0": ("an old Excel file", "save it as CSV (UTF-8)"),
    b"%PDF": ("a PDF", "extract its text first"),
    b"\x80\x04": ("a pickle", "export it as CSV or JSONL: pickles can run code"),
    b"\x80\x05": ("a pickle", "export it as CSV or JSONL: pickles can run code"),
    b"BZh": ("bzip2-compressed", "unpack it first"),
    b"\xfd7zXZ": ("xz-compressed", "unpack it first"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it first"),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed", "unpack it first"),
    b"SQLite": ("an SQLite database", "export the table as CSV"),
    b"<!DOCTYPE": ("an HTML page", "download the file itself"),
    b"<html": ("an HTML page", "download the file itself"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One example as read: `place` is `reviews.csv:7`; an optional role without a value is absent."""

    place: str
    values: dict[str, object]


@dataclass
class Table:
    """Rows of one file under roles; iterating reads the file anew. `skipped` counts what the last reading left out."""

    path: Path
    format: Literal["csv", "tsv", "jsonl", "json", "parquet"]
    columns: dict[str, str | int]
    required: frozenset[str]
    on_bad_row: Literal["stop", "skip"]
    note: str | None
    raw_rows: Callable[[], Iterator[RawRow | BadRow]] = field(repr=False)
    limit: int | None = None
    skipped: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[Row]:
        self.skipped = Counter()
        return islice(self._good_rows(), self.limit)

    def _good_rows(self) -> Iterator[Row]:
        for raw in self.raw_rows():
            bad = raw if isinstance(raw, BadRow) else None
            values = {} if isinstance(raw, BadRow) else self._values(raw)
            if isinstance(values, BadRow):
                bad = values
            if bad is None:
                assert isinstance(values, dict)
                yield Row(f"{self.path}:{raw.line}", values)
            elif self.on_bad_row == "stop":
                hint = f"{bad.hint}, or data.on_bad_row=skip" if bad.hint else "mend it, or data.on_bad_row=skip"
                raise DataError(bad.what, where=f"{self.path}:{bad.line}", hint=hint)
            else:
                self.skipped[bad.reason] += 1

    def _values(self, raw: RawRow) -> dict[str, object] | BadRow:
        values: dict[str, object] = {}
        for role, column in self.columns.items():
            value = raw.values.get(column)
            if isinstance(value, str) and role.startswith("label"):
                value = value.strip()
            if value is None or value == "" or (isinstance(value, str) and not value.strip()):
                if role in self.required:
                    return BadRow(raw.line, f"{column}: empty", "fill it in or remove the row", f"empty {role}")
                continue
            if role.startswith("text") and not isinstance(value, str):
                what = f"{column}: {shorten(value)} is not a text"
                return BadRow(raw.line, what, "put it in quotes", f"{role} is not a text")
            if isinstance(value, str) and len(value) > MAX_FIELD_CHARS:
                what = f"{column}: {len(value):,} characters in one field {shorten(value, 40)}"
                return BadRow(raw.line, what, "is a quotation mark left open?", "field too long")
            if isinstance(value, dict) or _holds_object(value):
                what = f"{column}: {shorten(value)} is an object"
                return BadRow(raw.line, what, "give a value, or a list of values", f"{role} is an object")
            values[role] = value
        return values


def _holds_object(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(part, dict | list) for part in value)


def read_table(
    path: str | Path,
    roles: dict[str, tuple[str, ...]],
    *,
    required: frozenset[str],
    columns: dict[str, str | int] | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    limit: int | None = None,
) -> Table:
    """Open a file as rows of `roles` (role -> the names its column usually has).

    Raises:
        DataError: not a file we can read, or a required column is not in it.
    """
    path = Path(path)
    kind = _recognise(path)
    header, rows, sample = _reader(kind)(path)
    chosen, note, has_header = find_columns(path, header, sample, roles, required, columns)
    raw_rows = rows if has_header else lambda: delimited.without_header(path)
    if not any(True for _ in islice(raw_rows(), 1)):
        raise DataError("there is a header but no row below it", where=str(path), hint="add rows")
    return Table(path, kind, chosen, required, on_bad_row, note, raw_rows, limit)


_Reader = Callable[[Path], tuple[list[str], Callable[[], Iterator[RawRow | BadRow]], list[list[str]]]]


def _reader(kind: str) -> _Reader:
    readers: dict[str, _Reader] = {
        "parquet": parquet.open_rows,
        "json": json_array.open_rows,
        "jsonl": json_lines.open_rows,
    }
    return readers.get(kind, delimited.open_rows)


def _recognise(path: Path) -> Literal["csv", "tsv", "jsonl", "json", "parquet"]:
    """By the first bytes; the name of the file does not count."""
    head = _head(path)
    if head.startswith(b"PAR1"):
        return "parquet"
    for magic, (what, hint) in FOREIGN.items():
        if head.lstrip().lower().startswith(magic.lower()):
            raise DataError(f"this is {what}, whatever its name says", where=str(path), hint=hint)
    with open_text(path) as file:
        start = file.read(65536).lstrip()
    if not start.strip():
        raise DataError("the file is empty", where=str(path), hint="is it the right one, and did its download finish?")
    if start[0] == "{":
        return "jsonl"
    if start[0] == "[" and start[1:].lstrip()[:1] in ("{", "]", ""):
        return "json"
    return "tsv" if delimited.delimiter_of(start) == "\t" else "csv"


def _head(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError("this is a folder, not a file", where=str(path), hint="name a file in it")
        if not stat.S_ISREG(mode):
            raise DataError("not a regular file (a pipe or a device)", where=str(path), hint="write it to a file first")
        with path.open("rb") as file:
            return file.read(16)
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError("no such file", where=str(path), hint=near if "mean" in near else "check the path") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(path), hint="check path and rights") from None


def find_splits(folder: str | Path) -> dict[str, Path]:
    """The files of a folder that are named train, validation (valid, val, dev, eval) and test.

    Raises:
        DataError: two files claim to be the same split.
    """
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).iterdir()):
        stem, _, _ = path.name.lower().partition(".")
        for split, names in SPLIT_NAMES.items():
            if path.is_file() and path.name.lower().endswith(SUFFIXES) and stem in names:
                if split in found:
                    raise DataError(
                        f"both {found[split].name} and {path.name} are {split}",
                        where=str(folder),
                        hint="name the one to use",
                    )
                found[split] = path
    return found
