"""Raw rows and bad rows, which every format's reader yields, and reading of text in bounded memory."""

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
"""Maximum characters of a line or a field."""
ENCODING_HINT = "from Windows: iconv -f cp1252 -t utf-8, if it is Chinese: iconv -f gb18030 -t utf-8"
"""The most frequent encodings besides UTF-8; cp1252 has the quotation marks that Latin-1 lacks."""
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class RawRow:
    """Row as read: column name (or number, if there is no header) -> value. `line` counts from 1."""

    line: int
    values: dict[Any, Any]
    file: str = ""
    """The file within a folder, if a folder is read."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """Row that cannot be read: what is wrong, a hint, and a short reason for counts."""

    line: int
    what: str
    hint: str
    reason: str
    file: str = ""


Rows = Callable[[], Iterator[RawRow | BadRow]]


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """File of a known format: its column names, their line, and a function that reads the rows.

    If the first line may be data, `sample` has the first lines, and `by_number` reads all lines by column number.
    """

    names: list[str]
    rows: Rows
    line: int = 1
    sample: list[list[str]] = field(default_factory=list)
    by_number: Rows | None = None


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a file as text: UTF-8 (with or without BOM) or UTF-16 with BOM, optionally gzip; line ends are kept.

    A byte that is not UTF-8 becomes a lone surrogate, so that `check_line` can report its row.

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
    """Yield lines with their ends. A line beyond MAX_CHARS is cut to MAX_CHARS + 1 characters."""
    while line := file.readline(MAX_CHARS + 1):
        yield line
        while len(line) > MAX_CHARS and not line.endswith(("\n", "\r")):
            line = file.readline(MAX_CHARS + 1)


def check_line(text: str, line: int) -> BadRow | None:
    """Return a line as a bad row if it is unreadable in any format, else None."""
    if len(text) > MAX_CHARS:
        what = f"over {MAX_CHARS:,} characters in one line, {shorten(text[:100], 40)}"
        return BadRow(line, what, "check for a missing line end or quotation mark", "line too long")
    if text.isascii():
        return None
    if match := _ESCAPED_BYTE.search(text):
        near = text[max(0, match.start() - 20) : match.start() + 20].strip()
        byte = ord(match[0]) - 0xDC00
        what = f"byte 0x{byte:02x} is not UTF-8 in {shorten(near.encode(errors='replace').decode())}"
        return BadRow(line, what, f"save the file as UTF-8 (if it is {ENCODING_HINT})", "not UTF-8")
    return None
