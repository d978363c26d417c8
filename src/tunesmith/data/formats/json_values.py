"""One JSON value, strictly: NaN, infinity, keys given twice, endless numbers and half characters are faults."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

from tunesmith.data.formats.raw import BadRow, OpenedFile, RawRow, Rows, check_line
from tunesmith.errors import shorten

MAX_DIGITS = 4000


def open_objects(rows: Rows) -> OpenedFile:
    """The keys of all objects, since any may be the first with a second text, and the reader."""
    names: dict[str, None] = {}
    for row in rows():
        if isinstance(row, RawRow):
            names |= dict.fromkeys(row.values)
    return OpenedFile(list(names), rows)


class Decoder:
    """Decodes one value after the other. What is JSON by its form and still wrong is kept as a fault, so that reading
    goes on behind it.
    """

    def __init__(self) -> None:
        self._faults: list[tuple[str, str]] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._int, parse_float=self._float
        )

    def row(self, text: str, start: int, number: int) -> tuple[RawRow | BadRow, int]:
        """The value that starts at `start` as row `number`, and where it ends.

        Raises:
            ValueError: not JSON; a `json.JSONDecodeError` where more text might mend it.
        """
        self._faults.clear()
        try:
            value, end = self._decoder.raw_decode(text, start)
        except RecursionError:
            raise ValueError("nested too deep") from None
        return self._as_row(text[start:end], value, number), end

    def _as_row(self, text: str, value: Any, number: int) -> RawRow | BadRow:
        if (bad := check_line(text, number)) is not None:
            return bad
        if self._faults:
            what, hint = self._faults[0]
            return BadRow(number, f"{what} in {shorten(text)}", hint, "not valid JSON")
        if not isinstance(value, dict):
            return BadRow(
                number, f"{shorten(text)} is not an object", "give one, with a key for each column", "not an object"
            )
        half = next((key for key in value if _has_half_a_character([key, value[key]])), None) if "\\u" in text else None
        if half is not None:
            shown = shorten(str(value[half]).encode(errors="replace").decode())
            what = f"{shorten(half)[1:-1]}: a lone surrogate (half a character) in {shown}"
            return BadRow(number, what, "it was cut in the middle of an emoji", "lone surrogate")
        return RawRow(number, value)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            self._faults.append((f"the key {shorten(max(keys, key=keys.count))} is there twice", "keep one"))
        return value

    def _constant(self, name: str) -> None:
        self._faults.append((f"{name} is not JSON", "write null, or a number"))

    def _int(self, digits: str) -> int:
        if len(digits) <= MAX_DIGITS:
            return int(digits)
        self._faults.append((f"a number of {len(digits):,} digits", "put it in quotes if it is no number"))
        return 0

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self._faults.append((f"{shorten(digits)} is beyond any number", "mend the exponent"))
        return value


def parse_json(value: Any) -> Any:
    """A list or an object that is written as JSON in a text, as in a cell of a table; else the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _has_half_a_character(value: Any) -> bool:
    """Half a character cannot be encoded, so it is refused here rather than in the tokenizer."""
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
    """What to do about text that is not JSON, from what stands around the fault."""
    near = near.strip()
    close = near.replace(" ", "").replace("\n", "")
    if near in ("{", "["):
        return "write one object a line, or an array of objects"
    if near.startswith("{'") or ("property name" in error and "'" in near):
        return "JSON wants double quotation marks"
    if ",}" in close or ",]" in close:
        return "remove the comma before the closing bracket"
    if "nested" in error:
        return "give flat objects"
    if near.startswith("{") and not near.endswith("}"):
        return "the line is cut off: write it again, or remove it"
    return ""
