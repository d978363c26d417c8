"""Parallel files, one per language, aligned by line: `train.en` and `train.de` (or .gz) are named by the stem `train`.

A column is a language, and line n of each file is row n. Nested objects, `{"translation": {"en": ..., "de": ...}}`,
are read the same way. Files with different numbers of lines are refused, because their alignment is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from tunesmith.data import languages
from tunesmith.data.formats.raw import BadRow, OpenedFile, RawRow, check_line, lines, open_text
from tunesmith.errors import DataError, counted

NESTED = "translation"
"""Column with an object of one text per language."""

_NAME = re.compile(rf".+?\.(?P<side>{languages.CODE.pattern}|source|target)(\.txt)?(\.gz)?")
_NO_LANGUAGE = frozenset("csv tsv txt md gz zip log xml sgm tmx bz xz bio iob py sh tar pdf png jpg".split())


def sides_of(prefix: Path) -> dict[str, Path]:
    """Return language -> file for the files named `prefix` plus a language; empty if there are fewer than two."""
    try:
        paths = sorted(prefix.parent.iterdir())
    except OSError:
        return {}
    return _pairs(paths).get(prefix.name, {})


def stems_in(folder: Path) -> dict[str, dict[str, Path]]:
    """Return stem -> language -> file for the parallel files in a folder."""
    return _pairs(sorted(folder.iterdir()))


def _pairs(paths: Sequence[Path]) -> dict[str, dict[str, Path]]:
    stems: dict[str, dict[str, Path]] = {}
    for path in paths:
        if (side := language_of(path)) and path.is_file():
            stems.setdefault(path.name.rpartition(f".{side}")[0], {})[side] = path
    return {stem: sides for stem, sides in stems.items() if len(sides) > 1}


def display_path(prefix: Path, sides: Sequence[str]) -> Path:
    """Return the files of several languages in shell notation: `train.{en,de}.gz`."""
    files = sides_of(prefix)
    ends = {files[side].name.removeprefix(f"{prefix.name}.{side}") for side in sides}
    return prefix.with_name(f"{prefix.name}.{{{','.join(sides)}}}{ends.pop() if len(ends) == 1 else '*'}")


def language_of(path: Path) -> str | None:
    """Return the language at the end of a file's name (`test.de.gz`); None if there is none."""
    match = _NAME.fullmatch(path.name)
    return match["side"] if match and match["side"].lower() not in _NO_LANGUAGE else None


def open_rows(sides: Mapping[str, Path]) -> OpenedFile:
    """Open parallel files: the languages as names, and a reader of rows."""
    return OpenedFile(list(sides), lambda: _rows(sides))


def _rows(sides: Mapping[str, Path]) -> Iterator[RawRow | BadRow]:
    with ExitStack() as stack:
        files = [stack.enter_context(open_text(path)) for path in sides.values()]
        for number, row in enumerate(zip_longest(*map(lines, files)), start=1):
            texts = dict(zip(sides.values(), row, strict=True))
            if None in row:
                raise _unequal(texts, number)
            bad = next(((path, bad) for path, text in texts.items() if (bad := check_line(text, number))), None)
            if bad is not None:
                yield replace(bad[1], what=f"{bad[0].name}: {bad[1].what}")
            else:
                yield RawRow(number, {side: text.strip() for side, text in zip(sides, row, strict=True)})


def _unequal(texts: Mapping[Path, str | None], number: int) -> DataError:
    ended = next(path.name for path, text in texts.items() if text is None)
    longer = next(path for path, text in texts.items() if text is not None)
    what = f"{ended} ends after {counted(number - 1, 'line')}, but {longer.name} has more"
    hint = "the files must be aligned line by line: find the missing line, or download the files again"
    return DataError(what, where=f"{longer}:{number}", hint=hint)


def flatten_translations(opened: OpenedFile) -> OpenedFile:
    """Turn an object of texts into one column per language.

    The object is in the column `translation`, or in the first column whose first value is an object of texts.
    """
    nested = NESTED if NESTED in opened.names else _nested(opened)
    if nested is None:
        return opened
    inner_names: dict[str, None] = {}
    for raw in opened.rows():
        if isinstance(raw, RawRow) and isinstance(inside := raw.values.get(nested), dict):
            inner_names |= dict.fromkeys(inside)
    if not inner_names:
        return opened
    names = [name for name in opened.names if name != nested and name not in inner_names]

    def rows() -> Iterator[RawRow | BadRow]:
        for raw in opened.rows():
            if isinstance(raw, RawRow) and isinstance(inside := raw.values.get(nested), dict):
                raw = replace(raw, values={**raw.values, **inside})
            yield raw

    return OpenedFile([*names, *inner_names], rows, line=opened.line)


def _nested(opened: OpenedFile) -> str | None:
    """Return the first column whose value in the first row is an object of several texts; None if there is none."""
    first = next(opened.rows(), None)
    for name, value in first.values.items() if isinstance(first, RawRow) else ():
        if isinstance(value, dict) and len(value) > 1 and all(isinstance(text, str) for text in value.values()):
            return str(name)
    return None
