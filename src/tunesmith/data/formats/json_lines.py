"""JSON lines: one JSON object per line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tunesmith.data.formats.json_values import Decoder, fix_hint, open_objects
from tunesmith.data.formats.raw import BadRow, OpenedFile, RawRow, check_line, lines, open_text
from tunesmith.errors import shorten


def open_rows(path: Path) -> OpenedFile:
    """Open a file: the keys of all objects as names, and a reader."""
    return open_objects(lambda: _rows(path))


def _rows(path: Path) -> Iterator[RawRow | BadRow]:
    decoder = Decoder()
    with open_text(path) as file:
        for number, line in enumerate(lines(file), start=1):
            if text := line.strip():
                yield check_line(line, number) or _row(decoder, text, number)


def _row(decoder: Decoder, text: str, number: int) -> RawRow | BadRow:
    try:
        row, end = decoder.row(text, 0, number)
    except ValueError as error:
        what = f"not valid JSON: {getattr(error, 'msg', error)} in {shorten(text)}"
        return BadRow(number, what, fix_hint(text, str(error)), "not valid JSON")
    if end < len(text):
        what = f"unexpected text after the object: {shorten(text[end:])}"
        return BadRow(number, what, "write one object per line", "not valid JSON")
    return row
