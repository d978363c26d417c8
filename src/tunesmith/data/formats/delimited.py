"""CSV, TSV and similar files. The delimiter and the meaning of quotation marks are detected from a sample."""

from __future__ import annotations

import csv
import io
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tunesmith.data.formats.raw import MAX_CHARS, BadRow, OpenedFile, RawRow, check_line, lines, open_text
from tunesmith.errors import DataError, counted, shorten

DELIMITERS = ("\t", ",", ";", "|")
SAMPLE_CHARS = 65536
SAMPLE_ROWS = 200
MIN_EVEN_SHARE = 0.8
"""Share of the first lines that must have the same number of fields for a text to count as a table."""

csv.field_size_limit(2**31 - 1)  # this module limits records itself, with an error that names the line


@dataclass(frozen=True, slots=True)
class _Dialect:
    delimiter: str
    literal: bool
    """True if quotation marks are ordinary characters."""
    spaced: bool
    """True if a space separates delimiter and quotation mark."""

    def reader(self, text: Iterable[str]) -> Any:
        if self.literal:
            return csv.reader(text, delimiter=self.delimiter, quoting=csv.QUOTE_NONE)
        return csv.reader(text, delimiter=self.delimiter, strict=True, skipinitialspace=self.spaced)


def delimiter_of(sample: str) -> str:
    """Return the delimiter that splits most rows, including the first, into the same number (two or more) of fields.

    Ties go to the delimiter that is followed by a space less often: punctuation in sentences usually is.
    """
    text = [line for line in _split(sample) if line.strip()]
    scores = {delimiter: _evenness(text, delimiter) for delimiter in DELIMITERS}
    best = max(scores, key=lambda delimiter: (scores[delimiter], -_share_before_spaces(sample, delimiter)))
    return best if scores[best] else ","


def looks_like_table(sample: str) -> bool:
    """Return whether a delimiter splits most rows into equally many fields and is not sentence punctuation."""
    text = [line for line in _split(sample) if line.strip()]
    even = (delimiter for delimiter in DELIMITERS if _evenness(text, delimiter) >= MIN_EVEN_SHARE)
    return any(_share_before_spaces(sample, delimiter) <= 0.5 for delimiter in even)


def _split(sample: str) -> list[str]:
    """Split into lines as a file does; `str.splitlines` splits at more characters."""
    return list(io.StringIO(sample, newline=""))


def _evenness(text: list[str], delimiter: str) -> float:
    """Return the share of rows with the most frequent number of fields, by lines or by records (quoted line ends).

    The last record is left out: the sample may end inside it.
    """
    by_line = [len(next(csv.reader([line], delimiter=delimiter))) for line in text[:50]]
    by_record = [len(row) for row in islice(csv.reader(text, delimiter=delimiter), 50)]
    scores = []
    for widths in (by_line, by_record[:-1] or by_record):
        usual, times = max(Counter(widths).items(), key=lambda item: (item[1], item[0]), default=(1, 0))
        share = times / max(len(widths), 1) if usual > 1 else 0.0
        scores.append(share if widths and widths[0] == usual else share / 2)
    return round(max(scores), 3)


def _share_before_spaces(sample: str, delimiter: str) -> float:
    return sample.count(f"{delimiter} ") / max(sample.count(delimiter), 1)


def open_rows(path: Path) -> OpenedFile:
    """Open a file: the first line as names, a sample of rows, and readers of the rows by name and by number.

    Raises:
        DataError: the first line cannot be read.
    """
    dialect = _dialect(path)
    first = list(islice(_records(path, dialect), SAMPLE_ROWS))
    if not first:
        raise DataError("the file has no values", where=str(path), hint="check that it is the right file")
    if isinstance(first[0], BadRow):
        raise DataError(first[0].what, where=f"{path}:{first[0].line}", hint=first[0].hint)
    line, header = first[0]
    names = [name.strip() or f"column {number}" for number, name in enumerate(header)]
    return OpenedFile(
        names,
        lambda: _rows(path, dialect, names),
        line=line,
        sample=[record[1] for record in first if not isinstance(record, BadRow)],
        by_number=lambda: _rows(path, dialect, None),
    )


def _rows(path: Path, dialect: _Dialect, header: list[str] | None) -> Iterator[RawRow | BadRow]:
    """Yield rows with the header's names as keys, or column numbers if there is no header."""
    records = _records(path, dialect)
    names: list[str] | range | None = header
    if header is not None:
        next(records)
    for record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        line, row = record
        if names is None:
            names = range(len(row))
        if len(row) != len(names):
            other = "the header" if header else "the first line"
            what = f"{counted(len(row), 'field')}, but {other} has {len(names)}: {_preview(row)}"
            yield BadRow(line, what, _field_hint(row, len(names)), "wrong number of fields")
            continue
        yield RawRow(line, dict(zip(names, row, strict=True)))


def _preview(row: list[str]) -> str:
    return shorten(" | ".join(part[:100] for part in row[:20]))


def _field_hint(row: list[str], width: int) -> str:
    if row[0].startswith("#"):
        return "remove comment lines"
    return "quote the field that contains the delimiter" if len(row) > width else "add the missing fields"


def _dialect(path: Path) -> _Dialect:
    with open_text(path) as file:
        sample = file.read(SAMPLE_CHARS)
    delimiter = delimiter_of(sample)
    if delimiter == "\t":
        return _Dialect(delimiter, _quotes_are_literal(path), spaced=False)
    parts = [part for row in csv.reader(_split(sample), delimiter=delimiter) for part in row if part.startswith(' "')]
    spaced = any(part.endswith('"') and f"{delimiter}{part}" in sample for part in parts)  # inside quotes it is doubled
    return _Dialect(delimiter, False, spaced)


def _quotes_are_literal(path: Path) -> bool:
    """Return whether quotation marks in a TSV are ordinary characters: without quoting, fewer rows are malformed."""
    text, cut = _lines_with_quotes(path)
    by_line = [line.count("\t") + 1 for line in text]
    by_record: list[int] = []
    reader = _Dialect("\t", literal=False, spaced=False).reader(text)
    while True:
        try:
            by_record.append(len(next(reader)))
        except StopIteration:
            break
        except csv.Error as error:
            by_record += [0] * (not cut or "end of data" not in str(error))
    if len(set(by_record)) == 1 and by_record[0] > 1:
        return False
    usual = Counter(width for width in by_line if width > 1).most_common(1)
    broken = [sum(width != usual[0][0] for width in widths) for widths in (by_line, by_record)] if usual else [0, 0]
    return broken[0] < broken[1]


def _lines_with_quotes(path: Path) -> tuple[list[str], bool]:
    """Return a sample of lines that starts at the first quoted field, and True if the file has more lines."""
    with open_text(path) as file:
        for line in lines(file):
            if line.startswith('"') or '\t"' in line:
                more = _split(file.read(SAMPLE_CHARS))
                cut = bool(file.read(1))
                return [line, *(more[:-1] if cut else more)], cut
    return [], False


class _RecordTooLong(Exception):
    """A record exceeds MAX_CHARS."""


class _RecordLines:
    """Iterator of lines for `csv.reader` that can back up.

    If a record fails, only its first line is dropped and the rest is read again, so that an unclosed quotation mark
    costs one row and not the rest of the file.
    """

    def __init__(self, file: TextIO) -> None:
        self._lines = enumerate(lines(file), start=1)
        self._again: deque[tuple[int, str]] = deque()
        self._record: list[tuple[int, str]] = []
        self._chars = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        item = self._again.popleft() if self._again else next(self._lines)
        self._record.append(item)
        self._chars += len(item[1])
        if self._chars > MAX_CHARS:
            raise _RecordTooLong
        return item[1]

    def begin(self) -> None:
        """Start a new record."""
        self._record, self._chars = [], 0

    def line(self) -> int:
        """Return the line on which the record starts."""
        return self._record[0][0]

    def fault(self) -> BadRow | None:
        """Return the first unreadable line of the record, or None."""
        for number, text in self._record:
            if (bad := check_line(text, number)) is not None:
                return bad
            if "\0" in text:
                what = f"contains a NUL byte: {shorten(text[:100])}"
                return BadRow(number, what, "save the file as UTF-8 text", "NUL byte")
        return None

    def drop_first_line(self, error: str) -> BadRow:
        """Return the record's first line as a bad row, and read the other lines again."""
        (line, text), *rest = self._record
        self._again.extendleft(reversed(rest))
        if (bad := check_line(text, line)) is not None:
            return bad
        unclosed = "end of data" in error or not error
        what = "unclosed quotation mark" if unclosed else f"invalid quoting: {error}"
        hint = "close it, or double it inside a quoted field"
        return BadRow(line, f"{what}: {shorten(text.strip())}", hint, "unclosed quotation mark")


def _records(path: Path, dialect: _Dialect) -> Iterator[tuple[int, list[str]] | BadRow]:
    """Yield (first line, fields) of each record, or a bad row; blank lines are skipped."""
    with open_text(path) as file:
        feed = _RecordLines(file)
        reader = dialect.reader(feed)
        while True:
            feed.begin()
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, _RecordTooLong) as error:
                yield feed.drop_first_line(str(error))
                continue
            if (bad := feed.fault()) is not None:
                yield bad
            elif len(row) > 1 or (row and row[0].strip()):
                yield feed.line(), row
