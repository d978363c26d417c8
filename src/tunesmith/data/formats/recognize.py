"""Detection of a file's format from its first bytes, and the errors for files that cannot be read."""

from __future__ import annotations

import difflib
import stat
from pathlib import Path
from typing import Literal

from tunesmith.data.formats.conll import looks_tagged
from tunesmith.data.formats.delimited import delimiter_of
from tunesmith.data.formats.raw import open_text
from tunesmith.errors import DataError, shorten

Format = Literal["csv", "tsv", "jsonl", "json", "parquet", "text", "conll", "parallel"]
UNSUPPORTED_FORMATS = {
    b"PK\x03\x04": ("a zip, Excel or Word file", "unpack it, or save its table as CSV (UTF-8)"),
    b"\xd0\xcf\x11\xe0": ("an old Excel file", "save it as CSV (UTF-8)"),
    b"%PDF": ("a PDF", "extract its text first"),
    b"\x89PNG": ("a PNG picture", "give a table of texts, as CSV or JSONL"),
    b"\xff\xd8\xff": ("a JPEG picture", "give a table of texts, as CSV or JSONL"),
    b"\x80\x04": ("a pickle", "export it as CSV or JSONL: pickles can run code"),
    b"\x80\x05": ("a pickle", "export it as CSV or JSONL: pickles can run code"),
    b"BZh": ("bzip2-compressed", "unpack it first"),
    b"\xfd7zXZ": ("xz-compressed", "unpack it first"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it first"),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed", "unpack it first"),
    b"SQLite format": ("an SQLite database", "export the table as CSV"),
    b"<!DOCTYPE": ("an HTML page", "download the file itself"),
    b"<html": ("an HTML page", "download the file itself"),
}


def format_of(path: Path, *, tagged: bool = False) -> Format:
    """Detect the format of a file. CoNLL is detected only if `tagged`; otherwise it counts as a delimited table.

    Raises:
        DataError: the file cannot be read, is empty, or has an unsupported format.
    """
    head = _head(path)
    if head.startswith(b"PAR1"):
        return "parquet"
    for magic, (what, hint) in UNSUPPORTED_FORMATS.items():
        if head.startswith(magic) or (magic.startswith(b"<") and head.lstrip().lower().startswith(magic.lower())):
            raise DataError(f"unsupported format: the content is {what}", where=str(path), hint=hint)
    with open_text(path) as file:
        start = file.read(65536)
    text = start.lstrip()
    if not text:
        hint = "check that it is the right file and that its download has finished"
        raise DataError("the file is empty", where=str(path), hint=hint)
    if start.count("\0") > len(start) / 20:
        hint = "it is binary, or UTF-16 without a byte order mark: save it as UTF-8 text"
        raise DataError("contains NUL bytes", where=f"{path}:1", hint=hint)
    if text[0] == "[" and text[1:].lstrip()[:1] in ("{", "[", "]", '"', ""):
        return "json"
    if text[0] == "{" or any(_is_braced(line) for line in text.splitlines()[1:5]):
        return "jsonl"
    if tagged and looks_tagged(start):
        return "conll"
    return "tsv" if delimiter_of(start) == "\t" else "csv"


def _is_braced(line: str) -> bool:
    return line.startswith("{") and line.rstrip().endswith("}")


def _head(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError("a folder, not a file", where=str(path), hint="name a file in it")
        if not stat.S_ISREG(mode):
            raise DataError("not a regular file (a pipe or a device)", where=str(path), hint="write it to a file first")
        with path.open("rb") as file:
            return file.read(16)
    except (OSError, ValueError) as error:
        raise unreachable_error(path, error) from None


def _similar_name(path: Path) -> str | None:
    """Return the most similar file name in the same folder, compared without suffixes; None if none is similar."""
    names = sorted(other.name for other in path.parent.iterdir())
    stems = [name.partition(".")[0] for name in names]
    near = difflib.get_close_matches(path.name.partition(".")[0], stems, 1, 0.7)
    return max(
        (name for name, stem in zip(names, stems, strict=True) if stem in near),
        key=lambda name: difflib.SequenceMatcher(None, path.name, name).ratio(),
        default=None,
    )


def unreachable_error(path: Path, error: OSError | ValueError) -> DataError:
    """Return the error for a path that does not exist or cannot be accessed."""
    where = shorten(str(path), 200)[1:-1]
    if isinstance(error, FileNotFoundError):
        try:
            near = _similar_name(path)
        except OSError:
            near = None
        hint = "check the path" if path.is_absolute() else f"check the path, which is relative to {Path.cwd()}"
        return DataError("no such file", where=where, hint=f"did you mean '{near}'?" if near else hint)
    why = error.strerror if isinstance(error, OSError) else str(error)
    return DataError(f"cannot be read ({why})", where=where, hint="check the path and its permissions")
