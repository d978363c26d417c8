"""What every format's reader gives: rows as they stand, or what is wrong with one; and text in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tunesmith.errors import DataError, shorten

MAX_CHARS = 16 * 2**20
"""Of one line, and of one field."""
ENCODING_HINT = "from Windows: iconv -f cp1252 -t utf-8, if it is Chinese: iconv -f gb18030 -t utf-8"
"""What a file that is not UTF-8 mostly is; cp1252 has the quotation marks that Latin-1 lacks."""
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class RawRow:
    """Column name (or number, where there is no header) -> value. `line` counts from 1."""

    line: int
    values: dict[Any, Any]
    file: str = ""
    """Where a folder is read, the file within it."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read: what is wrong with which value, the way out, and a short reason to count by."""

    line: int
    what: str
    hint: str
    reason: str
    file: str = ""


Rows = Callable[[], Iterator[RawRow | BadRow]]


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """A file of a known format: the names of its columns, the line they stand on, and a fresh reader of its rows.

    Where the first line may be data, `sample` holds the first lines and `by_number` reads all of them by column number.
    """

    names: list[str]
    rows: Rows
    line: int = 1
    sample: list[list[str]] = field(default_factory=list)
    by_number: Rows | None = None


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The file as text: UTF-8 (with or without BOM) or UTF-16 with BOM, gzip or not; line ends left as they are.

    A byte that is not UTF-8 comes as half a surrogate pair, so that `unreadable` can name its row.

    Raises:
        DataError: the file is damaged.
    """
    with path.open("rb") as probe:
        compressed = probe.read(2) == b"\x1f\x8b"
    opened: Any = gzip.open(path, "rb") if compressed else path.open("rb")
    with opened as binary:
        try:
            head = binary.read(4)
            binary.seek(0)
            wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and head != codecs.BOM_UTF32_LE
            encoding, errors = ("utf-16", "strict") if wide else ("utf-8-sig", "surrogateescape")
            yield io.TextIOWrapper(binary, encoding=encoding, errors=errors, newline="")
        except UnicodeDecodeError as error:
            raise DataError(f"damaged UTF-16 ({error.reason})", where=str(path), hint="save it as UTF-8") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"the gzip file is damaged ({error})", where=str(path), hint="download it again") from None


def lines(file: TextIO) -> Iterator[str]:
    """Lines with their ends. Of a line beyond MAX_CHARS only the beginning is given, one character too long."""
    while line := file.readline(MAX_CHARS + 1):
        yield line
        while len(line) > MAX_CHARS and not line.endswith(("\n", "\r")):
            line = file.readline(MAX_CHARS + 1)


def check_line(text: str, line: int) -> BadRow | None:
    """What makes a line unreadable in any format."""
    if len(text) > MAX_CHARS:
        what = f"over {MAX_CHARS:,} characters in one line, {shorten(text[:100], 40)}"
        return BadRow(line, what, "is a line end or a quotation mark missing?", "line too long")
    if text.isascii():
        return None
    if found := _ESCAPED_BYTE.search(text):
        near = text[max(0, found.start() - 20) : found.start() + 20].strip()
        byte = ord(found[0]) - 0xDC00
        what = f"byte 0x{byte:02x} is not UTF-8 in {shorten(near.encode(errors='replace').decode())}"
        return BadRow(line, what, f"save the file as UTF-8 (if it is {ENCODING_HINT})", "not UTF-8")
    return None
