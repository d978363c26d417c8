"""One JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.data.formats.raw import BadRow, RawRow, open_text
from tunesmith.errors import shorten

SAMPLE_ROWS = 200
MAX_DIGITS = 4000


def open_rows(path: Path) -> tuple[list[str], Callable[[], Iterator[RawRow | BadRow]], list[list[str]]]:
    """Keys seen in the first lines, and a fresh reader."""
    names: dict[str, None] = {}
    for row in islice(_rows(path), SAMPLE_ROWS):
        if isinstance(row, RawRow):
            names |= dict.fromkeys(row.values)
    return list(names), lambda: _rows(path), []


def _rows(path: Path) -> Iterator[RawRow | BadRow]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield parse(line, number)


def parse(text: str, line: int) -> RawRow | BadRow:
    """One object; NaN, infinity, keys given twice and lone surrogates are refused."""
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except RecursionError:
        return BadRow(line, "nested too deep", "", "nested too deep")
    except ValueError as error:
        what = f"not valid JSON: {getattr(error, 'msg', error)} in {shorten(text.strip())}"
        return BadRow(line, what, _way_out(text, str(error)), "not valid JSON")
    if not isinstance(value, dict):
        what = f"{shorten(text.strip())} is not an object"
        return BadRow(line, what, 'each line is {"text": ..., "label": ...}', "not an object")
    return check_surrogates(value, line)


def check_surrogates(value: dict[str, Any], line: int) -> RawRow | BadRow:
    """Half a character cannot be encoded, so it is refused here rather than in the tokenizer."""
    for key, item in value.items():
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                what = (
                    f"{key}: a lone surrogate (half a character) in {shorten(item.encode(errors='replace').decode())}"
                )
                return BadRow(line, what, "it was cut in the middle of an emoji", "lone surrogate")
    return RawRow(line, value)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key {max(keys, key=keys.count)!r} is there twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _way_out(text: str, error: str) -> str:
    text = text.strip()
    if text.startswith("{'") or "property name enclosed in double quotes" in error and "'" in text[:20]:
        return "JSON wants double quotation marks"
    if text.startswith("{") and not text.endswith("}"):
        return "the line is cut off"
    if ",}" in text.replace(" ", "") or ",]" in text.replace(" ", ""):
        return "remove the comma before the closing bracket"
    return ""
