"""Validation of one section of a recipe, with one line for each invalid key: place, expected value, given value."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from pydantic import ValidationError

from tunesmith import registry
from tunesmith.errors import RecipeError, did_you_mean, shorten
from tunesmith.recipe.yaml import Key
from tunesmith.registry import Keys, Kind, Plugin

K = TypeVar("K", bound=Keys)
Leaves = dict[Key, tuple[Any, str]]
"""Key -> (value, place at which it was written)."""

_TYPES = {
    "finite_number": "a finite number",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "string_too_short": "a non-empty string",
}
"""Type of a pydantic error -> the value it expects."""
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_NUMBER = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)


def validate(model: type[K], values: dict[str, Any], at: Key, leaves: Leaves) -> K:
    """Return the values as the section of a recipe at the key `at`.

    Raises:
        RecipeError: one line for each invalid key.
    """
    try:
        return model(**values)
    except ValidationError as error:
        by_key: dict[Key, list[Any]] = {}
        for problem in error.errors():
            by_key.setdefault(_key_of(problem["loc"], at, leaves), []).append(problem)
        deepest = [key for key in by_key if not any(other != key and other[: len(key)] == key for other in by_key)]
        reported = [
            key for key in deepest if key in leaves or by_key[key][0]["type"] in ("value_error", "extra_forbidden")
        ] or deepest
        raise RecipeError("\n".join(_explain(by_key[key], model, key, leaves) for key in reported)) from None


def _key_of(location: tuple[Any, ...], at: Key, leaves: Leaves) -> Key:
    """The key as written: further parts of a pydantic location name branches of a union, or keys of a mapping."""
    key = (*at, *(str(part) for part in location[:1]))
    return next((below for part in location[1:] if (below := (*key, str(part))) in leaves), key)


def _explain(problems: list[Any], model: type[Keys], key: Key, leaves: Leaves) -> str:
    """One line for a key, from the errors of all branches of its type."""
    place, first = place_of(leaves, key), max(problems, key=lambda problem: problem["type"] == "extra_forbidden")
    nested = len(first["loc"]) > 1
    if first["type"] == "extra_forbidden" and nested:
        return f"{place}: unknown key {shorten(first['loc'][-1])}; leave it out"
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key; {_suggestion(key, model)}"
    if first["type"] == "missing" and nested:
        return f"{place}: key {shorten(first['loc'][-1])} is missing"
    if first["type"] == "value_error":
        return f"{place}: {first['ctx']['error']}"
    if first["type"] == "literal_error" and any(isinstance(part, int) for part in first["loc"]):  # inside a list
        near = did_you_mean(str(first["input"]), re.findall("'(.+?)'", first["ctx"]["expected"]))
        return f"{place}: unknown {first['loc'][-1]} {shorten(first['input'])}; {near}"
    expected = dict.fromkeys(_expected(problem) for problem in problems)
    value = leaves[key][0] if key in leaves else first["input"]
    numeric = any("number" in kind or "integer" in kind for kind in expected)
    quoted = isinstance(value, str) and _NUMBER.fullmatch(value) and numeric
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
    return f"{place}: must be {' or '.join(expected)}, not {shorten(shown)}{'; remove the quotes' if quoted else ''}"


def _suggestion(key: Key, model: type[Keys]) -> str:
    """The nearest key, including one that the word starts with ('r' for 'rank'); else the plug-ins that have it."""
    word, known = key[-1], model.model_fields
    near = did_you_mean(word, known)
    if "mean" in near:
        return near
    if issubclass(model, Plugin):
        kind: Kind = "task" if key[0] == "task" else "technique"
        owners = [plugin.name for plugin in registry.about(kind) if word in plugin.keys]
        if owners:
            return f"it belongs to {' and '.join(owners)}, not to {model.name}: use {kind}={owners[0]}, or leave it out"
        if not known:
            return f"{model.name} has no keys: leave it out"
    prefixes = [name for name in known if word.startswith(name)]
    return did_you_mean(prefixes[0], prefixes) if prefixes else near


def _expected(problem: Any) -> str:
    if problem["type"] in _TYPES:
        return _TYPES[problem["type"]]
    for name, word in _BOUNDS.items():
        if name in problem.get("ctx", {}):
            bound = problem["ctx"][name]
            return f"{word} {int(bound) if bound == int(bound) else bound}"
    return str(problem["ctx"]["expected"] if "expected" in problem.get("ctx", {}) else problem["msg"]).removeprefix(
        "Input should be "
    )


def place_of(leaves: Leaves, key: Key) -> str:
    """Return the place of a key, or of the first key below it."""
    if key in leaves:
        return leaves[key][1]
    below = [place for leaf, (_, place) in leaves.items() if key and leaf[: len(key)] == key]
    return below[0].rpartition(": ")[0] + f": {'.'.join(key)}" if below else ".".join(key) or "recipe"
