"""A recipe as it is written: YAML 1.2, mappings and `key=value` words, read as plain values with the place of each.

Which keys there are is not known here. What is broken, or made to take all memory, is refused with its line.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError, RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from tunesmith.errors import RecipeError, shorten

MAX_YAML_BYTES, MAX_YAML_DEPTH, MAX_YAML_ALIASES, MAX_YAML_VALUES = 2**20, 20, 100, 100_000

Key = tuple[str, ...]
Written = tuple[dict[str, Any], Callable[[Key], str]]
"""Plain values, and where each key was written."""


def read_file(path: Path) -> Written:
    """A recipe's file.

    Raises:
        RecipeError: cannot be read, or is no YAML that a recipe may be.
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES and path.is_file():
            raise RecipeError("a recipe is at most 1 MiB", where=str(path), hint=_what_else(path))
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        hint = "`tunesmith init TASK` writes a starter recipe" if isinstance(error, FileNotFoundError) else ""
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RecipeError(f"cannot read the recipe: {reason}", where=str(path), hint=hint or _what_else(path)) from None
    try:
        tree = _parse(text, str(path))
    except RecipeError as error:
        raise RecipeError(error.what, where=error.where, hint=error.hint or _what_else(path)) from None
    if not isinstance(tree, Mapping) or not tree:
        raise RecipeError("a recipe is a list of `key: value` lines", where=f"{path}:1", hint=_what_else(path))
    return _plain(tree), lambda key: f"{path}:{_line(tree, key)}: {'.'.join(key)}"


def _what_else(path: Path) -> str:
    """What was meant, perhaps, where something that is no recipe is given as one."""
    if path.is_dir():
        return f"data.train={path} if it holds data, --resume {path} if it is a run"
    if path.suffix.lower() in (".yaml", ".yml"):
        return "`tunesmith init TASK` writes a starter recipe"
    return f"data.train={path} if it is data: recipes are called NAME.yaml"


def read_mapping(values: Mapping[str, Any]) -> Written:
    """A recipe's keys as Python gives them."""
    return _plain(values), lambda key: f"recipe: {'.'.join(key)}"


def read_words(words: Iterable[str]) -> Written:
    """The `KEY=VALUE` words of a command line, keys dotted, values YAML. Their order is no matter, but that of two for
    one key the later holds: a section comes before what is in it.
    """
    tree: dict[str, Any] = {}
    for key, value in sorted(map(_read_word, words), key=lambda word: len(word[0])):
        node = tree
        for part in key[:-1]:
            section = node.get(part)
            if isinstance(section, str):  # the short form of a name
                section = {"name": section}
            elif section is not None and not isinstance(section, dict):
                what = f"{part} is {shorten(section)}, which has no keys"
                raise RecipeError(what, where=f"command line: {'.'.join(key)}", hint="keep one of the two")
            node[part] = section = section or {}
            node = section
        node[key[-1]] = value
    return _plain(tree), lambda key: f"command line: {'.'.join(key)}"


def _read_word(word: str) -> tuple[Key, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{shorten(word)} is not KEY=VALUE", where="command line", hint="e.g. train.epochs=1")
    return tuple(key.strip().split(".")), _parse(text, f"command line: {key}") if text.strip() else None


class _Constructor(RoundTripConstructor):
    """YAML 1.2 knows no dates: they are texts."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", lambda constructor, node: node.value)


def _parse(text: str, where: str) -> Any:
    """YAML 1.2: `2e-4` is a number, `no` a string, a key given twice an error."""
    try:
        _check_size(YAML().parse(text), where)
        yaml = YAML(typ="rt")
        yaml.Constructor = _Constructor
        return yaml.load(io.StringIO(text))
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1
        key = str(error.problem).split('"')[1]
        raise RecipeError(f"{key}: the key is given twice", where=f"{where}:{line}", hint="keep one") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{where}:{mark.line + 1}" if mark else where
        raise RecipeError(f"not valid YAML: {error.problem or error.context}", where=at) from None
    except (YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"not valid YAML: {error}", where=where) from None


def _check_size(events: Iterable[Any], where: str) -> None:
    """Stop at the first event too many: what is deeply nested takes minutes to parse to its end."""
    depth = aliases = values = 0
    for event in events:
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        aliases += isinstance(event, AliasEvent)
        values += isinstance(event, ScalarEvent)
        if depth > MAX_YAML_DEPTH:
            what = f"a recipe is at most {MAX_YAML_DEPTH} levels deep"
            raise RecipeError(what, where=f"{where}:{event.start_mark.line + 1}")
        if aliases > MAX_YAML_ALIASES or values > MAX_YAML_VALUES:
            most = f"{MAX_YAML_ALIASES} YAML aliases and {MAX_YAML_VALUES:,} values"
            raise RecipeError(f"a recipe holds at most {most}", where=where)


def _line(tree: Any, key: Key) -> int:
    line = 1
    for part in key:
        if isinstance(tree, CommentedMap) and part in tree:
            if part in (tree.lc.data or {}):  # not if it was merged in from elsewhere
                line = tree.lc.key(part)[0] + 1
            tree = tree[part]
        elif isinstance(tree, CommentedSeq) and part.isdigit() and 0 < int(part) <= len(tree):  # counted from 1
            line = tree.lc.item(int(part) - 1)[0] + 1
            tree = tree[int(part) - 1]
    return line


def _plain(value: Any, depth: int = 0, seen: Iterator[int] | None = None) -> Any:
    """Without the YAML library's own types, so that strict types hold."""
    seen = seen or itertools.count()
    if next(seen) > MAX_YAML_VALUES:
        raise RecipeError(f"its aliases unfold to more than {MAX_YAML_VALUES:,} values")
    if depth > MAX_YAML_DEPTH:
        raise RecipeError(f"a recipe is at most {MAX_YAML_DEPTH} levels deep")
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
    """The tree as block-style YAML 1.2, keys in the given order."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 2**20  # a long path stays on its line
    text = io.StringIO()
    yaml.dump(dict(tree), text)
    return text.getvalue()
