"""What every format's reader gives: rows as they stand, or what is wrong with one; and text opened strictly."""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from tunesmith.errors import DataError


@dataclass(frozen=True, slots=True)
class RawRow:
    """Column name (or number, where there is no header) -> value. `line` counts from 1."""

    line: int
    values: dict[Any, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read: what is wrong with which value, the way out, and a short reason to count by."""

    line: int
    what: str
    hint: str
    reason: str


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The file as text: UTF-8 (with or without BOM) or UTF-16 with BOM, gzip or not; line ends left as they are.

    Raises:
        DataError: the bytes are no such text; names line and byte.
    """
    with path.open("rb") as probe:
        compressed = probe.read(2) == b"\x1f\x8b"
    opened: Any = gzip.open(path, "rb") if compressed else path.open("rb")
    with opened as binary:
        head = binary.read(4)
        binary.seek(0)
        wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and head != codecs.BOM_UTF32_LE
        try:
            yield io.TextIOWrapper(binary, encoding="utf-16" if wide else "utf-8-sig", errors="strict", newline="")
        except UnicodeDecodeError as error:
            raise _not_text(path, error, compressed) from None
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"the gzip file is damaged ({error})", where=str(path), hint="download it again") from None


def _not_text(path: Path, error: UnicodeDecodeError, compressed: bool) -> DataError:
    """Find the first offending line by reading the bytes line by line."""
    opened: BinaryIO = gzip.open(path, "rb") if compressed else path.open("rb")  # type: ignore[assignment]
    with opened as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as bad:
                byte = line[bad.start]
                hint = f"convert it: iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}"
                return DataError(f"byte 0x{byte:02x} is not UTF-8", where=f"{path}:{number}", hint=hint)
    return DataError(f"not UTF-8 ({error.reason})", where=str(path), hint="save it as UTF-8")
