"""Plain text: documents separated by blank lines, one document per line if there are none, or a folder of documents.

A file counts as plain text if its first line names no column of the task and its lines do not form a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tunesmith.data.columns import Columns
from tunesmith.data.formats.columns import match_aliases
from tunesmith.data.formats.delimited import DELIMITERS, SAMPLE_CHARS, looks_like_table
from tunesmith.data.formats.raw import MAX_CHARS, BadRow, OpenedFile, RawRow, check_line, lines, open_text
from tunesmith.errors import DataError

DOCUMENTATION_NAMES = frozenset({"readme", "license", "licence", "notice", "source", "changelog"})
SUFFIXES = (".txt", ".text", ".md", ".txt.gz", ".text.gz", ".md.gz")


MAX_NAME_CHARS = 100
"""Maximum characters of a column name; a longer text such as a sentence with `, target, ` is no header."""


def is_plain_text(path: Path, columns: Columns) -> bool:
    """Return whether a file that could be a delimited table is plain text."""
    roles = {column.name: column.names for column in columns}
    with open_text(path) as file:
        sample = file.read(SAMPLE_CHARS)
    first = sample.lstrip().partition("\n")[0]
    headers = (first.split(delimiter) for delimiter in DELIMITERS)
    named = any(match_aliases(names, roles) for names in headers if max(map(len, names)) <= MAX_NAME_CHARS)
    return not named and not looks_like_table(sample)


def open_rows(path: Path, column: str) -> OpenedFile:
    """Open a file or folder of documents, which are the values of `column`.

    Raises:
        DataError: the folder has no text files.
    """
    if not path.is_dir():
        return OpenedFile([column], lambda: _documents(path, column))
    files = texts_in(path)
    if not files:
        kinds = ", ".join(SUFFIXES[:3])
        raise DataError(f"no text files ({kinds}) in this folder", where=str(path), hint="name the file to read")
    return OpenedFile([column], lambda: (row for file in files for row in _whole_file(path, file, column)))


def texts_in(folder: Path) -> list[Path]:
    """Return the text files in a folder and its subfolders, without hidden files and top-level documentation."""
    paths = (path for path in sorted(folder.rglob("*")) if path.name.lower().endswith(SUFFIXES))
    return [path for path in paths if path.is_file() and not is_documentation(path, within=folder)]


def is_documentation(path: Path, *, within: Path) -> bool:
    """Return whether a file is hidden, or a readme, license or the like at the top of the folder."""
    return path.name.startswith(".") or (
        path.parent == within and path.name.lower().partition(".")[0] in DOCUMENTATION_NAMES
    )


def _whole_file(folder: Path, path: Path, column: str) -> Iterator[RawRow | BadRow]:
    """Yield a file as one document."""
    name = path.relative_to(folder).as_posix()
    parts: list[str] = []
    size = 0
    with open_text(path) as file:
        for number, line in enumerate(lines(file), start=1):
            size += len(line)
            bad = check_line(line, number) or (_too_long(1) if size > MAX_CHARS else None)
            if bad is not None:
                yield BadRow(bad.line, bad.what, bad.hint, bad.reason, name)
                return
            parts.append(line)
    yield RawRow(1, {column: "".join(parts).strip()}, name)


def _documents(path: Path, column: str) -> Iterator[RawRow | BadRow]:
    """Yield the documents between blank lines, or each line if there are no blank lines."""
    divided = _has_blank_lines(path)
    parts: list[str] = []
    first = size = 0
    bad: BadRow | None = None
    with open_text(path) as file:
        for number, line in enumerate(lines(file), start=1):
            text = bool(line.strip())
            if text:
                first, size = first if parts else number, size + len(line)
                bad = bad or check_line(line, number) or (_too_long(first) if size > MAX_CHARS else None)
                parts += [] if bad else [line]
            if (parts or bad) and not (text and divided):
                yield bad or RawRow(first, {column: "".join(parts).strip()})
                parts, size, bad = [], 0, None
    if parts or bad:
        yield bad or RawRow(first, {column: "".join(parts).strip()})


def _has_blank_lines(path: Path) -> bool:
    """Return whether a blank line separates two non-blank lines."""
    begun = gap = False
    with open_text(path) as file:
        for line in lines(file):
            if line.strip():
                if gap:
                    return True
                begun = True
            else:
                gap = begun
    return False


def _too_long(line: int) -> BadRow:
    what = f"over {MAX_CHARS:,} characters in one document"
    return BadRow(line, what, "split it by blank lines, or into several files", "document too long")
