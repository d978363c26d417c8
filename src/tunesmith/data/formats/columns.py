"""Mapping of a task's columns (roles) to the columns of a file: by `data.columns`, by common names, or by content."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection
from pathlib import Path

from tunesmith.data import columns as schema
from tunesmith.data import languages
from tunesmith.data.columns import Column
from tunesmith.data.formats.raw import OpenedFile
from tunesmith.errors import DataError, RecipeError, did_you_mean, shorten

ColumnMap = dict[str, str | int]
Aliases = dict[str, tuple[str, ...]]
TAG = re.compile(r"O|[BIESLUM]-\S+")
_NAMES = (
    "id", "index", "name", "text", "sentence", "review", "label", "instruction", "input", "output", "prompt",
    "response", "completion", "question", "answer", "context", "source", "target", "tokens", "tags", "messages",
    "conversations",
)  # fmt: skip
COMMON_NAMES: Aliases = {name: (name,) for name in _NAMES}
"""Common column names of any task."""
CHAT_NAMES = ("messages", "conversations", "conversation", "dialog", "dialogue")
SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")


def find_columns(
    path: Path, opened: OpenedFile, columns: schema.Columns, chosen: ColumnMap
) -> tuple[ColumnMap, str | None, bool]:
    """Return role -> column of the file, a note for the user, and whether the first line is a header.

    Raises:
        DataError: no column, or more than one, matches a required role.
    """
    where, names = f"{path}:{opened.line}", opened.names
    roles, required = {column.name: column.names for column in columns}, schema.required_of(columns)
    for role in chosen:
        if role not in roles:
            raise RecipeError(f"data.columns.{role}: the task has no such column", hint=did_you_mean(role, roles))
    numbers = {role: column for role, column in chosen.items() if isinstance(column, int)}
    wrong = next((role for role, number in numbers.items() if not 0 <= number < len(names)), None)
    if wrong is not None:
        raise DataError(f"data.columns.{wrong}: no column {numbers[wrong]}", where=where, hint=f"0 to {len(names) - 1}")
    if not chosen and opened.sample and (tags := _tags(opened.sample)) is not None:
        what = f"the file has one word and tag per line ({shorten(tags)}), not one text per row"
        hint = "for task=token-classification, separate word and tag by a tab and sentences by a blank line (CoNLL)"
        raise DataError(what, where=where, hint=hint)
    if len(numbers) == len(chosen) and opened.sample and not _looks_like_header(opened, roles):
        return _without_header(where, opened, columns, numbers)
    refuse_duplicate_names(names, where)
    mapping: ColumnMap = {role: _existing_name(column, names, where) for role, column in chosen.items()}
    mapping |= _by_alias(where, names, {role: roles[role] for role in roles if role not in mapping}, mapping)
    mapping |= _other_language(names, {role: roles[role] for role in required - mapping.keys()}, mapping)
    if not mapping or not required <= mapping.keys():
        raise _missing(where, opened, columns, required - mapping.keys(), taken=mapping)
    note = f"{where}: read as column names, not as a row: {_name_list(names)}"
    return mapping, note if numbers and opened.sample and not match_aliases(names, roles) else None, True


def refuse_duplicate_names(names: list[str], where: str) -> None:
    """Refuse two columns of the same name.

    Raises:
        DataError: a name occurs twice.
    """
    duplicate = next((name for name in names if name and names.count(name) > 1), None)
    if duplicate is not None:
        raise DataError(f"two columns have the name {shorten(duplicate)}", where=where, hint="rename one of them")


def _without_header(
    where: str, opened: OpenedFile, columns: schema.Columns, numbers: dict[str, int]
) -> tuple[ColumnMap, str | None, bool]:
    roles, required = {column.name: column.names for column in columns}, schema.required_of(columns)
    if numbers and required <= numbers.keys():
        return dict(numbers), None, False
    below = next(
        (row for row in opened.sample[1:20] if required and required <= match_aliases(row, roles).keys()), None
    )
    if below is not None:
        what = f"the header is not on the first line: {shorten(', '.join(below))}"
        raise DataError(what, where=where, hint="remove the lines above it")
    guessed = (
        _by_order(opened.sample, columns) if schema.predicts_text(columns) else _by_content(opened.sample, columns)
    )
    mapping = (guessed or {}) | numbers
    if not required <= mapping.keys() or len(set(mapping.values())) < len(mapping):
        raise _missing(where, opened, columns, required - numbers.keys(), taken=None)
    keys = " and ".join(f"data.columns.{role}={number}" for role, number in mapping.items())
    return dict(mapping), f"{where.rpartition(':')[0]}: no header; assuming {keys} (set these keys to change it)", False


def has_header(opened: OpenedFile) -> bool:
    """Return whether the first line is a header, judged without knowing the task."""
    return not opened.sample or _looks_like_header(opened, COMMON_NAMES)


def _joined_names(missing: Collection[str], roles: Aliases) -> str:
    """Return the missing roles joined by "and"; if none is required, all roles joined by "or"."""
    return " and ".join(role for role in roles if role in missing) or " or ".join(roles)


def _missing(
    where: str, opened: OpenedFile, columns: schema.Columns, missing: Collection[str], *, taken: ColumnMap | None
) -> DataError:
    """Return the error for roles without a column, with candidates. `taken` is None if there is no header."""
    roles = {column.name: column.names for column in columns}
    has_names, listed = taken is not None, _name_list(opened.names)
    free = [name for name in opened.names if name not in (taken or {}).values()]
    near = {role: _closest_name(role, roles, free) for role in roles if role in missing or not missing}
    near = near if missing else {role: name for role, name in near.items() if name} or {"ROLE": None}
    what = f"no column for {_joined_names(missing, roles)} among: {listed}"
    hint = "set " + " ".join(f"data.columns.{role}={'NAME' if has_names else 'NUMBER'}" for role in near)
    texts = {column.name for column in columns if column.target and column.kind == "text"}
    if texts & set(missing) and not _is_language_alias(missing, roles) and len(spoken := _languages(free)) > 1:
        what = f"the direction of translation is not set; languages: {_name_list(spoken)}"
        hint = f"set task.source_lang={spoken[0]} task.target_lang={spoken[1]}, or the reverse"
    elif any(name.strip().lower() in CHAT_NAMES for name in opened.names):
        what = f"the file has conversations ({listed}), but no column for {_joined_names(missing, roles)}"
        hint = f"write {_joined_names(missing, roles)} as columns of each row"
    elif opened.sample and len(opened.names) == 1 and schema.of_kind(columns, "words"):
        hint = "give one word and tag per line with a blank line after each sentence, or JSON lines of tokens and tags"
    elif opened.sample and len(opened.names) == 1:
        hint = f"add {_joined_names(missing, roles)}, or separate the columns by comma, tab, semicolon or |"
    elif not has_names:
        what = f"no header, and the values do not show which column is {_joined_names(missing, roles)}: {listed}"
        hint += ", counted from 0"
    elif any(near.values()):
        words = (shlex.quote(f"data.columns.{role}={name or 'NAME'}") for role, name in near.items())
        hint = f"did you mean {' '.join(words)}?"
    return DataError(what, where=where, hint=hint)


def _closest_name(role: str, roles: Aliases, names: list[str]) -> str | None:
    """Return the name that is most similar to a common name of the role."""
    plain = {_normalized(name): name for name in names}
    close = [(usual, near) for usual in roles[role] for near in difflib.get_close_matches(usual, plain, 1, 0.7)]
    best = max(close, key=lambda pair: difflib.SequenceMatcher(None, *pair).ratio(), default=None)
    return shorten(plain[best[1]])[1:-1] if best is not None else None


def _normalized(name: str) -> str:
    return name.strip().strip("\ufeff\"'").lower().replace(" ", "_").replace("-", "_")


def match_aliases(names: list[str], roles: Aliases) -> dict[str, str]:
    """Return role -> the first of its aliases that is among the names, both normalized."""
    normalized = {_normalized(name) for name in names}
    matches: dict[str, str] = {}
    for role, aliases in roles.items():
        name = next((name for name in aliases if name in normalized and name not in matches.values()), None)
        if name is not None:
            matches[role] = name
    return matches


def _by_alias(where: str, names: list[str], roles: Aliases, taken: ColumnMap) -> ColumnMap:
    free = [name for name in names if name not in taken.values()]
    mapping: ColumnMap = {}
    for role, alias in match_aliases(free, roles).items():
        candidates = [name for name in free if _normalized(name) == alias]
        if len(candidates) > 1:
            what = f"both {shorten(candidates[0])} and {shorten(candidates[1])} match {role}"
            raise DataError(what, where=where, hint=f"choose one with data.columns.{role}=NAME")
        mapping[role] = candidates[0]
    return mapping


def _languages(names: list[str]) -> list[str]:
    """Return the names that are languages."""
    return [name for name in names if languages.language(name) is not None]


def _is_language_alias(missing: Collection[str], roles: Aliases) -> bool:
    """Return whether a missing role has languages among its aliases (the recipe names a language)."""
    return any(_languages(list(roles[role])) for role in missing)


def _other_language(names: list[str], missing: Aliases, taken: ColumnMap) -> ColumnMap:
    """Map the one missing side of a translation to the one remaining language, unless the recipe names a language."""
    spoken = _languages([name for name in names if name not in taken.values()])
    alone = len(missing) == 1 == len(spoken) and not _is_language_alias(missing, missing)
    return {role: spoken[0] for role in missing} if taken and alone else {}


def _existing_name(column: str | int, names: list[str], where: str) -> str:
    name = names[column] if isinstance(column, int) else column
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {shorten(near[0])}?" if near else f"known: {_name_list(names)}"
        raise DataError(f"no column {shorten(name)}", where=where, hint=hint)
    return name


def _name_list(names: list[str]) -> str:
    listed = ", ".join(shorten(name, 40)[1:-1] for name in names[:40])
    return listed if len(listed) <= 160 else f"{listed[:159]}…"


def _looks_like_header(opened: OpenedFile, roles: Aliases) -> bool:
    """Return whether the first line matches an alias, or differs from the rows: short words above texts or numbers."""
    header = opened.names
    if match_aliases(header, roles):
        return True
    below = [row for row in opened.sample[1:] if len(row) == len(header)]
    if not below or any(is_number(name) for name in header):
        return False
    for column, name in enumerate(header):
        values = [row[column] for row in below]
        if all(is_number(value) for value in values):
            return True  # a word above numbers only
        if name in values:
            return False  # it occurs in a row too: a value
    if any(_closest_name(role, roles, header) for role in roles):
        return True  # a misspelled alias
    if any(name.strip().endswith(SENTENCE_ENDS) for name in header):
        return False
    lengths = [sum(len(row[column]) for row in below) / len(below) for column in range(len(header))]
    return len(header[lengths.index(max(lengths))]) < 0.2 * max(lengths) and max(len(name) for name in header) < 30


def is_number(text: str) -> bool:
    """Return whether a text is a number, including infinity and NaN."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _tags(sample: list[list[str]]) -> str | None:
    """Return tags of a CoNLL file if a column has only tags below an optional name; else None."""
    for column in range(1, len(sample[0])):
        named = not TAG.fullmatch(sample[0][column])
        tags = sorted({row[column] for row in sample[named:] if len(row) == len(sample[0])} - {""})
        if "O" in tags and all(TAG.fullmatch(tag) for tag in tags):
            return ", ".join(tags[:4])
    return None


def _by_order(sample: list[list[str]], columns: schema.Columns) -> dict[str, int] | None:
    """Choose the first two columns that are not numeric as source and target."""
    rows = [row for row in sample if len(row) == len(sample[0])]
    texts = [column for column in range(len(sample[0])) if not all(is_number(row[column]) for row in rows)]
    names = (_first(schema.inputs_of(columns), "text"), _first(schema.targets_of(columns), "text"))
    return dict(zip(names, texts[:2], strict=True)) if len(texts) > 1 else None


def _first(columns: schema.Columns, kind: schema.Kind) -> str:
    column: Column | None = schema.of_kind(columns, kind)
    return column.name if column is not None else kind


def _by_content(sample: list[list[str]], columns: schema.Columns) -> dict[str, int] | None:
    """Choose the column with the longest values as text, and the one with the fewest distinct values as label."""
    width = len(sample[0])
    rows = [row for row in sample if len(row) == width]
    if width < 2 or len(rows) < 2:
        return None
    lengths = [sum(len(row[column]) for row in rows) / len(rows) for column in range(width)]
    text = lengths.index(max(lengths))
    others = [column for column in range(width) if column != text]
    label = min(others, key=lambda column: len({row[column] for row in rows}))
    if lengths[text] < 2 * lengths[label] or len({row[label] for row in rows}) > max(2, len(rows) * 0.5):
        return None
    return {_first(schema.inputs_of(columns), "text"): text, _first(schema.targets_of(columns), "label"): label}
