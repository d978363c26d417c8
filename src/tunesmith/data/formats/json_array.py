"""A JSON array of objects; read whole, so bounded in size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.formats.json_lines import _no_constant, _no_key_twice, _way_out, check_surrogates
from tunesmith.data.formats.raw import BadRow, RawRow, open_text
from tunesmith.errors import DataError, shorten

MAX_BYTES = 512 * 2**20
SAMPLE_ROWS = 200


def open_rows(path: Path) -> tuple[list[str], Callable[[], Iterator[RawRow | BadRow]], list[list[str]]]:
    """Keys seen in the first objects, and a fresh reader. `line` is the object's number in the array."""
    items = _items(path)
    names = dict.fromkeys(key for item in items[:SAMPLE_ROWS] if isinstance(item, dict) for key in item)
    return list(names), lambda: _rows(items), []


def _items(path: Path) -> list[Any]:
    if path.stat().st_size > MAX_BYTES:
        raise DataError(
            "a JSON array of over 512 MiB", where=str(path), hint="write one object a line (JSONL): it is streamed"
        )
    with open_text(path) as file:
        text = file.read()
    try:
        items = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 30) : error.pos + 10]
        what = f"not valid JSON: {error.msg} near {shorten(near)}"
        raise DataError(what, where=f"{path}:{error.lineno}", hint=_way_out(near, error.msg)) from None
    except RecursionError:
        raise DataError("nested too deep", where=str(path)) from None
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}", where=str(path)) from None
    if not items:
        raise DataError("an empty array", where=str(path), hint="is it the right file?")
    return list(items)


def _rows(items: list[Any]) -> Iterator[RawRow | BadRow]:
    for number, item in enumerate(items, start=1):
        if isinstance(item, dict):
            yield check_surrogates(item, number)
        else:
            yield BadRow(number, f"{shorten(item)} is not an object", "", "not an object")
