"""Strict decoding of JSON values: NaN, infinity, duplicate keys, huge numbers and lone surrogates are faults."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

from tunesmith.data.formats.raw import BadRow, OpenedFile, RawRow, Rows, check_line
from tunesmith.errors import shorten

MAX_DIGITS = 4000


def open_objects(rows: Rows) -> OpenedFile:
    """Collect the keys of all objects (an optional key may first occur late), and keep the reader."""
    names: dict[str, None] = {}
    for row in rows():
        if isinstance(row, RawRow):
            names |= dict.fromkeys(row.values)
    return OpenedFile(list(names), rows)


class Decoder:
    """Decoder of values one after the other. A value that is well-formed but faulty does not stop the reading."""

    def __init__(self) -> None:
        self._faults: list[tuple[str, str]] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._int, parse_float=self._float
        )

    def row(self, text: str, start: int, number: int) -> tuple[RawRow | BadRow, int]:
        """Decode the value at `start` as row `number`; return it and its end.

        Raises:
            ValueError: not JSON. It is a `json.JSONDecodeError` if more text could complete it.
        """
        self._faults.clear()
        try:
            value, end = self._decoder.raw_decode(text, start)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        return self._as_row(text[start:end], value, number), end

    def _as_row(self, text: str, value: Any, number: int) -> RawRow | BadRow:
        if (bad := check_line(text, number)) is not None:
            return bad
        if self._faults:
            what, hint = self._faults[0]
            return BadRow(number, f"{what} in {shorten(text)}", hint, "not valid JSON")
        if not isinstance(value, dict):
            return BadRow(
                number, f"{shorten(text)} is not an object", "write an object, one key per column", "not an object"
            )
        broken = next((key for key in value if _has_lone_surrogate([key, value[key]])), None) if "\\u" in text else None
        if broken is not None:
            excerpt = shorten(str(value[broken]).encode(errors="replace").decode())
            what = f"{shorten(broken)[1:-1]}: a lone surrogate (half a character) in {excerpt}"
            return BadRow(number, what, "remove it: the text was cut inside a character", "lone surrogate")
        return RawRow(number, value)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            self._faults.append((f"duplicate key {shorten(max(keys, key=keys.count))}", "keep one"))
        return value

    def _constant(self, name: str) -> None:
        self._faults.append((f"{name} is not JSON", "write null, or a number"))

    def _int(self, digits: str) -> int:
        if len(digits) <= MAX_DIGITS:
            return int(digits)
        self._faults.append((f"a number of {len(digits):,} digits", "quote it if it is an identifier"))
        return 0

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self._faults.append((f"{shorten(digits)} overflows a float", "correct the exponent"))
        return value


def parse_json(value: Any) -> Any:
    """Decode a text that is a JSON list or object, as in a table cell; return other values unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _has_lone_surrogate(value: Any) -> bool:
    """Return whether a text in the value has a lone surrogate, which no tokenizer can encode."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            try:
                part.encode()
            except UnicodeEncodeError:
                return True
        elif isinstance(part, list):
            left += part
        elif isinstance(part, dict):
            left += [*part.keys(), *part.values()]
    return False


def fix_hint(near: str, error: str) -> str:
    """Return a hint for text that is not JSON, from the text around the fault."""
    near = near.strip()
    close = near.replace(" ", "").replace("\n", "")
    if near in ("{", "["):
        return "write one object per line, or an array of objects"
    if near.startswith("{'") or ("property name" in error and "'" in near):
        return "use double quotation marks"
    if ",}" in close or ",]" in close:
        return "remove the comma before the closing bracket"
    if "nested" in error:
        return "flatten the objects"
    if near.startswith("{") and not near.endswith("}"):
        return "the line is truncated: write it again, or remove it"
    return ""
