"""What the types of the keys have against values, one line for each key: where, what was wanted, what was given."""

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
"""Dotted key -> (value, where it was written)."""

_KINDS = {
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "string_too_short": "a text",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_NUMBER = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)


def checked(model: type[K], values: dict[str, Any], at: Key, leaves: Leaves) -> K:
    """The values as the section of a recipe that `at` names.

    Raises:
        RecipeError: all that is wrong, a line each.
    """
    try:
        return model(**values)
    except ValidationError as error:
        problems: dict[Key, list[Any]] = {}
        for problem in error.errors():
            problems.setdefault(_key_of(problem["loc"], at, leaves), []).append(problem)
        exact = [key for key in problems if not any(other != key and other[: len(key)] == key for other in problems)]
        given = [
            key for key in exact if key in leaves or problems[key][0]["type"] in ("value_error", "extra_forbidden")
        ] or exact
        raise RecipeError("\n".join(_explain(problems[key], model, key, leaves) for key in given)) from None


def _key_of(place: tuple[Any, ...], at: Key, leaves: Leaves) -> Key:
    """The key that was written: deeper parts of a place name the branches of a union, or a key of a mapping."""
    key = (*at, *(str(part) for part in place[:1]))
    return next((below for part in place[1:] if (below := (*key, str(part))) in leaves), key)


def _explain(problems: list[Any], model: type[Keys], key: Key, leaves: Leaves) -> str:
    """One line for a key, whatever the branches of its type have against the value."""
    where, first = place_of(leaves, key), max(problems, key=lambda problem: problem["type"] == "extra_forbidden")
    if first["type"] == "extra_forbidden" and len(first["loc"]) > 1:  # inside a value
        return f"{where}: unknown key {shorten(first['loc'][-1])} in it; remove it"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_suggestion(key, model)}"
    if first["type"] == "missing" and len(first["loc"]) > 1:
        return f"{where}: {shorten(first['loc'][-1])} is missing in it"
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}"
    if first["type"] == "literal_error" and any(isinstance(part, int) for part in first["loc"]):  # inside a list
        near = did_you_mean(str(first["input"]), re.findall("'(.+?)'", first["ctx"]["expected"]))
        return f"{where}: {first['loc'][-1]}: no {shorten(first['input'])}; {near}"
    wanted = dict.fromkeys(_wanted(problem) for problem in problems)
    given = leaves[key][0] if key in leaves else first["input"]
    quoted = isinstance(given, str) and _NUMBER.fullmatch(given) and any("number" in kind for kind in wanted)
    shown = "null" if given is None else str(given).lower() if isinstance(given, bool) else given
    return f"{where}: must be {' or '.join(wanted)}, not {shorten(shown)}{'; leave the quotes out' if quoted else ''}"


def _suggestion(key: Key, model: type[Keys]) -> str:
    """The nearest key, a short one also where the word begins with it: 'r' for 'rank'; else whose key it is."""
    word, known = key[-1], model.model_fields
    near = did_you_mean(word, known)
    if "mean" in near:
        return near
    if issubclass(model, Plugin):
        kind: Kind = "task" if key[0] == "task" else "technique"
        owners = [one.name for one in registry.about(kind) if word in one.keys]
        if owners:
            return f"it is one of {', '.join(owners)}, not of {model.name}: {kind}={owners[0]}, or leave it out"
        if not known:
            return f"{model.name} has no keys: leave it out"
    begun = [name for name in known if word.startswith(name)]
    return did_you_mean(begun[0], begun) if begun else near


def _wanted(problem: Any) -> str:
    if problem["type"] in _KINDS:
        return _KINDS[problem["type"]]
    for name, word in _BOUNDS.items():
        if name in problem.get("ctx", {}):
            bound = problem["ctx"][name]
            return f"{word} {int(bound) if bound == int(bound) else bound}"
    return str(problem["ctx"]["expected"] if "expected" in problem.get("ctx", {}) else problem["msg"]).removeprefix(
        "Input should be "
    )


def place_of(leaves: Leaves, key: Key) -> str:
    """The place of a key, or of the first key below it."""
    if key in leaves:
        return leaves[key][1]
    below = [where for path, (_, where) in leaves.items() if key and path[: len(key)] == key]
    return below[0].rpartition(": ")[0] + f": {'.'.join(key)}" if below else ".".join(key) or "recipe"
