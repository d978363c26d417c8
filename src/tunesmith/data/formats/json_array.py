"""JSON array of objects, streamed through a window over the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TextIO

from tunesmith.data.formats.json_values import Decoder, fix_hint, open_objects
from tunesmith.data.formats.raw import MAX_CHARS, BadRow, OpenedFile, RawRow, open_text
from tunesmith.errors import DataError, shorten

CHUNK_CHARS = 2**20
TRUNCATED = "the array is truncated"
_BLANK = re.compile(r"[ \t\r\n]*")


def open_rows(path: Path) -> OpenedFile:
    """Open a file: the keys of all objects as names, and a reader. `line` is the object's number in the array."""
    return open_objects(lambda: _rows(path))


def _rows(path: Path) -> Iterator[RawRow | BadRow]:
    with open_text(path) as file:
        window = _Window(path, file)
        window.take("[", "the array does not start with a bracket")
        numbers = count(1) if window.next_character() != "]" else ()
        for number in numbers:
            yield window.row(number)
            if window.next_character() == "]":
                break
            window.take(",", "missing comma between two objects")
        window.take("]", "the array is not closed")
        if window.next_character():
            raise window.error("unexpected text after the array", "write one array of objects")


class _Window:
    """A part of the file's text, and the position read so far."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._text, self._at, self._line = "", 0, 1
        self._decoder = Decoder()

    def next_character(self) -> str:
        """Return the next non-blank character; an empty string at the end of the file."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            assert blank is not None, "the pattern matches the empty string"
            self._move_to(blank.end())
            if self._at < len(self._text) or not self._read_on():
                return self._text[self._at : self._at + 1]

    def take(self, character: str, fault: str) -> None:
        """Skip a required bracket or comma; `fault` describes its absence."""
        if self.next_character() != character:
            raise self.error(fault if self.next_character() else TRUNCATED, "write or download it again")
        self._move_to(self._at + 1)

    def row(self, number: int) -> RawRow | BadRow:
        """Read the object at the current position."""
        self.next_character()
        while True:
            try:
                row, end = self._decoder.row(self._text, self._at, number)
            except json.JSONDecodeError as error:
                if self._read_on():
                    continue
                self._move_to(error.pos)
                if not self.next_character() or error.msg.startswith("Unterminated"):
                    raise self.error(TRUNCATED, "write or download it again") from None
                near = self._text[max(0, error.pos - 30) : error.pos + 10]
                raise self.error(f"not valid JSON: {error.msg}", fix_hint(near, error.msg)) from None
            except ValueError as error:
                raise self.error(f"not valid JSON: {error}", fix_hint("", str(error))) from None
            if end == len(self._text) and self._read_on():
                continue  # a number may continue
            self._move_to(end)
            return row

    def error(self, what: str, hint: str) -> DataError:
        """Return the error for the current position."""
        near = self._text[max(0, self._at - 30) : self._at + 10].encode(errors="replace").decode()
        return DataError(f"{what} near {shorten(near)}", where=f"{self._path}:{self._line}", hint=hint or "correct it")

    def _move_to(self, position: int) -> None:
        self._line += self._text.count("\n", self._at, position)
        self._at = position

    def _read_on(self) -> bool:
        """Append more of the file to the unread text; return whether that was possible within MAX_CHARS."""
        unread = len(self._text) - self._at
        more = self._file.read(max(CHUNK_CHARS, unread)) if unread <= MAX_CHARS else ""
        if more:
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)
