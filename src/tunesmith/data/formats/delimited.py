"""CSV, TSV and their kin. The delimiter is read off the first lines; quotes are honoured where quoting holds up."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.data.formats.raw import BadRow, RawRow, open_text
from tunesmith.errors import DataError

DELIMITERS = ("\t", ",", ";", "|")
SAMPLE_ROWS = 200
MAX_QUOTED_LINES = 1000
csv.field_size_limit(2**31 - 1)  # the table bounds fields itself, with a message that names the line


def delimiter_of(sample: str) -> str:
    """The delimiter that gives most of the sample's lines the same number (two or more) of fields."""
    lines = [line for line in sample.splitlines()[:50] if line.strip()]
    best, most = ",", 0.0
    for delimiter in DELIMITERS:
        counts = [len(row) for row in csv.reader(lines, delimiter=delimiter)]
        usual = max(set(counts), key=counts.count) if counts else 1
        score = counts.count(usual) / max(len(counts), 1) if usual > 1 else 0.0
        if score > most + 1e-9:
            best, most = delimiter, score
    return best


def open_rows(path: Path) -> tuple[list[str], Callable[[], Iterator[RawRow | BadRow]], list[list[str]]]:
    """First line, a fresh reader of what follows it by name, and a sample of lines (the first included)."""
    sample = [row for _, row, _ in islice(_lines(path), SAMPLE_ROWS)]
    header = [name.strip() for name in sample[0]]

    def rows() -> Iterator[RawRow | BadRow]:
        return _named(path, header)

    return header, rows, sample


def without_header(path: Path) -> Iterator[RawRow | BadRow]:
    """Rows by column number, counted from 0, the first line included."""
    return _named(path, None)


def _named(path: Path, header: list[str] | None) -> Iterator[RawRow | BadRow]:
    lines = _lines(path)
    names: list[str] | range | None = header
    if header is not None:
        next(lines)
        doubled = sorted({name for name in header if name and header.count(name) > 1})
        if doubled:
            raise DataError(f"the column '{doubled[0]}' is there twice", where=f"{path}:1", hint="rename one of them")
    for line, row, fault in lines:
        if fault:
            yield BadRow(line, fault, "close it, or double it inside a quoted field", "quotation mark left open")
            continue
        if names is None:
            names = range(len(row))
        if len(row) != len(names):
            what = f"{len(row)} fields, but {'the header' if header else 'the first line'} has {len(names)}"
            yield BadRow(line, what, "quote a field that holds the delimiter", "wrong number of fields")
            continue
        yield RawRow(line, dict(zip(names, row, strict=True)))


def _lines(path: Path) -> Iterator[tuple[int, list[str], str]]:
    """(line the row starts on, fields, what is wrong with its quotes)."""
    with open_text(path) as file:
        sample = file.read(65536)
    delimiter = delimiter_of(sample)
    literal = _quotes_are_literal(sample, delimiter)
    with open_text(path) as file:
        text = _without_nul(file, path)
        options: Any = {"quoting": csv.QUOTE_NONE} if literal else {"strict": True}
        reader = csv.reader(text, delimiter=delimiter, **options)
        start = 1
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fault = "a quotation mark is left open" if "end of data" in str(error) else f"quoting: {error}"
                yield start, [], fault
                start = reader.line_num + 1
                continue
            if row:
                runs_on = reader.line_num - start >= MAX_QUOTED_LINES
                yield start, row, "a quotation mark is left open" if runs_on else ""
            start = reader.line_num + 1


def _without_nul(lines: Iterator[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            hint = "it is binary, or UTF-16 without its mark: save it as UTF-8"
            raise DataError("holds a NUL byte", where=f"{path}:{number}", hint=hint)
        yield line


def _quotes_are_literal(sample: str, delimiter: str) -> bool:
    """Whether quotation marks are plain characters: in a TSV unless some field is fully quoted and parses so."""
    if delimiter != "\t" or '"' not in sample:
        return False
    lines = [line for line in sample.splitlines()[:-1] if line]
    quoted = [field for line in lines for field in line.split("\t") if field.startswith('"')]
    whole = [field for field in quoted if len(field) > 1 and field.endswith('"') and field[1:-1].count('"') % 2 == 0]
    return len(whole) < len(quoted) or not quoted
