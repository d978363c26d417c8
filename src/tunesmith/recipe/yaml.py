"""Layers of a recipe: YAML 1.2, mappings and `KEY=VALUE` words as plain values, with the place of each key.

This module knows no recipe keys. It refuses malformed YAML, and YAML that would exhaust memory, with the line.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError, RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent
from ruamel.yaml.parser import RoundTripParser

from tunesmith.errors import RecipeError, shorten

MAX_YAML_BYTES, MAX_YAML_DEPTH, MAX_YAML_ALIASES, MAX_YAML_VALUES = 2**20, 20, 100, 100_000

Key = tuple[str, ...]


class Layer(NamedTuple):
    """Plain values from one origin, and the place of each key: `recipe.yaml:7: train.epochs`."""

    values: dict[str, Any]
    place: Callable[[Key], str]


def read_file(path: Path) -> Layer:
    """Read a recipe file.

    Raises:
        RecipeError: the file cannot be read, or is not the YAML of a recipe.
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES and path.is_file():
            raise RecipeError("a recipe file has at most 1 MiB", where=str(path), hint=_hint(path))
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        hint = "`tunesmith init TASK` writes a starter recipe" if isinstance(error, FileNotFoundError) else ""
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RecipeError(f"cannot read the recipe: {reason}", where=str(path), hint=hint or _hint(path)) from None
    try:
        tree = _parse(text, str(path))
    except RecipeError as error:
        raise RecipeError(error.what, where=error.where, hint=error.hint or _hint(path)) from None
    if not isinstance(tree, Mapping) or not tree:
        raise RecipeError("a recipe consists of `key: value` lines", where=f"{path}:1", hint=_hint(path))
    return Layer(_plain(tree), lambda key: f"{path}:{_line(tree, key)}: {'.'.join(key)}")


def _hint(path: Path) -> str:
    """A suggestion for a path that is not a recipe."""
    if path.is_dir():
        return f"use data.train={path} for data, --resume {path} for a run"
    if path.suffix.lower() in (".yaml", ".yml"):
        return "`tunesmith init TASK` writes a starter recipe"
    return f"use data.train={path} for data; recipe files end in .yaml"


def read_mapping(values: Mapping[str, Any]) -> Layer:
    """Read keys that are given as Python values."""
    return Layer(_plain(values), lambda key: f"recipe: {'.'.join(key)}")


def read_words(words: Iterable[str]) -> Layer:
    """Read `KEY=VALUE` words of the command line: dotted keys, YAML values.

    A section is read before the keys in it, whatever their order; of two words for one key the later takes precedence.
    """
    tree: dict[str, Any] = {}
    for key, value in sorted(map(_read_word, words), key=lambda word: len(word[0])):
        node = tree
        for part in key[:-1]:
            section = node.get(part)
            if isinstance(section, str):  # short form of {name: ...}
                section = {"name": section}
            elif section is not None and not isinstance(section, dict):
                what = f"{part} is set to {shorten(section)}, which has no keys"
                raise RecipeError(what, where=f"command line: {'.'.join(key)}", hint="keep one of the two words")
            node[part] = section = section or {}
            node = section
        node[key[-1]] = value
    return Layer(_plain(tree), lambda key: f"command line: {'.'.join(key)}")


def _read_word(word: str) -> tuple[Key, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{shorten(word)} is not KEY=VALUE", where="command line", hint="e.g. train.epochs=1")
    return tuple(key.strip().split(".")), _parse(text, f"command line: {key}") if text.strip() else None


class _Constructor(RoundTripConstructor):
    """YAML 1.2 constructor: dates are strings."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", lambda constructor, node: node.value)


class _LimitError(MarkedYAMLError):
    """The YAML is larger than that of any recipe."""


class _Parser(RoundTripParser):
    """Parser that stops at the first event beyond a limit: parsing deeply nested YAML to its end takes minutes."""

    depth = aliases = values = 0

    def get_event(self) -> Any:
        event = super().get_event()
        self.depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        self.aliases += isinstance(event, AliasEvent)
        self.values += isinstance(event, ScalarEvent)
        if self.depth > MAX_YAML_DEPTH:
            raise _LimitError(problem=f"a recipe has at most {MAX_YAML_DEPTH} levels", problem_mark=event.start_mark)
        if self.aliases > MAX_YAML_ALIASES or self.values > MAX_YAML_VALUES:
            limits = f"{MAX_YAML_ALIASES} YAML aliases and {MAX_YAML_VALUES:,} values"
            raise _LimitError(problem=f"a recipe has at most {limits}", problem_mark=event.start_mark)
        return event


def _parse(text: str, where: str) -> Any:
    """Parse YAML 1.2: `2e-4` is a number, `no` a string, a duplicate key an error."""
    try:
        yaml = YAML(typ="rt")
        yaml.Parser, yaml.Constructor = _Parser, _Constructor
        return yaml.load(io.StringIO(text))
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1
        key = str(error.problem).split('"')[1]
        raise RecipeError(f"{key}: duplicate key", where=f"{where}:{line}", hint="keep one") from None
    except _LimitError as error:
        raise RecipeError(error.problem, where=f"{where}:{error.problem_mark.line + 1}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{where}:{mark.line + 1}" if mark else where
        raise RecipeError(f"not valid YAML: {error.problem or error.context}", where=at) from None
    except (YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"not valid YAML: {error}", where=where) from None


def _line(tree: Any, key: Key) -> int:
    line = 1
    for part in key:
        if isinstance(tree, CommentedMap) and part in tree:
            if part in (tree.lc.data or {}):  # a merged key has no line of its own
                line = tree.lc.key(part)[0] + 1
            tree = tree[part]
        elif isinstance(tree, CommentedSeq) and part.isdigit() and 0 < int(part) <= len(tree):  # from 1
            line = tree.lc.item(int(part) - 1)[0] + 1
            tree = tree[int(part) - 1]
    return line


def _plain(value: Any, depth: int = 0, seen: Iterator[int] | None = None) -> Any:
    """The value without the YAML library's own types, which strict validation would refuse."""
    seen = seen or itertools.count()
    if next(seen) > MAX_YAML_VALUES:
        raise RecipeError(f"YAML aliases expand to more than {MAX_YAML_VALUES:,} values")
    if depth > MAX_YAML_DEPTH:
        raise RecipeError(f"a recipe has at most {MAX_YAML_DEPTH} levels")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1, seen) for key, item in value.items()}
    if isinstance(value, list | tuple | CommentedSeq):
        return [_plain(item, depth + 1, seen) for item in value]
    if isinstance(value, Path):
        return str(value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Return the tree as block-style YAML 1.2, keys in the given order."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 2**20  # never wrap a long path
    text = io.StringIO()
    yaml.dump(dict(tree), text)
    return text.getvalue()
