"""Which column plays which role: by the user's word, by its usual names, or by what it holds."""

from __future__ import annotations

import difflib
import re
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
"""What columns are often called, whatever they are for."""
CHAT_NAMES = ("messages", "conversations", "conversation", "dialog", "dialogue")
SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")


def find_columns(
    path: Path, opened: OpenedFile, columns: schema.Columns, chosen: ColumnMap
) -> tuple[ColumnMap, str | None, bool]:
    """Role -> column, what the user should be told, and whether the first line is a header.

    Raises:
        DataError: a required role has no column, or several that look alike.
    """
    where, names = f"{path}:{opened.line}", opened.names
    roles, required = {column.name: column.names for column in columns}, schema.required_of(columns)
    for role in chosen:
        if role not in roles:
            raise RecipeError(f"data.columns.{role}: no such role", hint=did_you_mean(role, roles))
    numbers = {role: column for role, column in chosen.items() if isinstance(column, int)}
    wrong = next((role for role, number in numbers.items() if not 0 <= number < len(names)), None)
    if wrong is not None:
        raise DataError(f"data.columns.{wrong}: no column {numbers[wrong]}", where=where, hint=f"0 to {len(names) - 1}")
    if not chosen and opened.sample and (tags := _tags(opened.sample)) is not None:
        what = f"these are words with tags, one a line ({shorten(tags)}), and not sentences"
        hint = (
            "a tab between word and tag and a blank line between sentences is CoNLL, which token-classification reads"
        )
        raise DataError(what, where=where, hint=hint)
    if len(numbers) == len(chosen) and opened.sample and not _looks_like_header(opened, roles):
        return _without_header(where, opened, columns, numbers)
    refuse_duplicate_names(names, where)
    found: ColumnMap = {role: _existing_name(column, names, where) for role, column in chosen.items()}
    found |= _by_usual_name(where, names, {role: roles[role] for role in roles if role not in found}, found)
    found |= _other_language(names, {role: roles[role] for role in required - found.keys()}, found)
    if not found or not required <= found.keys():
        raise _missing(where, opened, columns, required - found.keys(), taken=found)
    note = f"{where}: taken for the names of the columns, not for a row: {_listed(names)}"
    return found, note if numbers and opened.sample and not match_aliases(names, roles) else None, True


def refuse_duplicate_names(names: list[str], where: str) -> None:
    """Refuse a name that stands above two columns: one of them would be lost.

    Raises:
        DataError: there is one.
    """
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"the column {shorten(twice)} is there twice", where=where, hint="rename one of them")


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
        what = f"the names of the columns stand below something else: {shorten(', '.join(below))}"
        raise DataError(what, where=where, hint="remove the lines above them")
    guessed = (
        _by_order(opened.sample, columns) if schema.predicts_text(columns) else _by_content(opened.sample, columns)
    )
    found = (guessed or {}) | numbers
    if not required <= found.keys() or len(set(found.values())) < len(found):
        raise _missing(where, opened, columns, required - numbers.keys(), taken=None)
    told = " and ".join(f"data.columns.{role}={number}" for role, number in found.items())
    return dict(found), f"{where.rpartition(':')[0]}: no header, so read with {told}; say so if it is otherwise", False


def has_header(opened: OpenedFile) -> bool:
    """Whether the first line names the columns, as far as that can be seen without knowing what they are for."""
    return not opened.sample or _looks_like_header(opened, COMMON_NAMES)


def _joined_names(some: Collection[str], roles: Aliases) -> str:
    """What is missing: some roles, or where none is required any of them."""
    return " and ".join(role for role in roles if role in some) or " or ".join(roles)


def _missing(
    where: str, opened: OpenedFile, columns: schema.Columns, missing: Collection[str], *, taken: ColumnMap | None
) -> DataError:
    """What to say when a role has no column: where it may be. `taken` is None where there is no header."""
    roles = {column.name: column.names for column in columns}
    named, shown = taken is not None, _listed(opened.names)
    free = [name for name in opened.names if name not in (taken or {}).values()]
    near = {role: _closest_name(role, roles, free) for role in roles if role in missing or not missing}
    near = near if missing else {role: name for role, name in near.items() if name} or {"ROLE": None}
    what = f"no column for {_joined_names(missing, roles)} among: {shown}"
    way_out = " ".join(f"data.columns.{role}={'NAME' if named else 'NUMBER'}" for role in near)
    texts = {column.name for column in columns if column.target and column.kind == "text"}
    if texts & set(missing) and not _is_language_alias(missing, roles) and len(spoken := _languages(free)) > 1:
        what = f"which of these is translated into which is not said: {_listed(spoken)}"
        way_out = f"task.source_lang={spoken[0]} task.target_lang={spoken[1]}, or the other way round"
    elif any(name.strip().lower() in CHAT_NAMES for name in opened.names):
        what = f"these are conversations ({shown}), without a column for {_joined_names(missing, roles)}"
        way_out = f"write {_joined_names(missing, roles)} into one row"
    elif opened.sample and len(opened.names) == 1 and schema.of_kind(columns, "words"):
        way_out = "give a word and its tag a line, a blank line behind each sentence, or JSON lines of tokens and tags"
    elif opened.sample and len(opened.names) == 1:
        way_out = "columns are told apart by comma, tab, semicolon or |; is the delimiter another one?"
    elif not named:
        what = f"no header, and what the columns hold does not tell which is {_joined_names(missing, roles)}: {shown}"
        way_out += ", counted from 0"
    elif any(near.values()):
        way_out = (
            "did you mean " + " ".join(f"data.columns.{role}={name or 'NAME'}" for role, name in near.items()) + "?"
        )
    return DataError(what, where=where, hint=way_out)


def _closest_name(role: str, roles: Aliases, names: list[str]) -> str | None:
    """The name that is most like a usual one of the role."""
    plain = {_normalized(name): name for name in names}
    close = [(usual, near) for usual in roles[role] for near in difflib.get_close_matches(usual, plain, 1, 0.7)]
    best = max(close, key=lambda pair: difflib.SequenceMatcher(None, *pair).ratio(), default=None)
    return shorten(plain[best[1]])[1:-1] if best is not None else None


def _normalized(name: str) -> str:
    return name.strip().strip("\ufeff\"'").lower().replace(" ", "_").replace("-", "_")


def match_aliases(names: list[str], roles: Aliases) -> dict[str, str]:
    """Role -> the first of its usual names that is among these, in plain spelling."""
    plain = {_normalized(name) for name in names}
    found: dict[str, str] = {}
    for role, usual in roles.items():
        name = next((name for name in usual if name in plain and name not in found.values()), None)
        if name is not None:
            found[role] = name
    return found


def _by_usual_name(where: str, names: list[str], roles: Aliases, taken: ColumnMap) -> ColumnMap:
    free = [name for name in names if name not in taken.values()]
    found: ColumnMap = {}
    for role, plain in match_aliases(free, roles).items():
        alike = [name for name in free if _normalized(name) == plain]
        if len(alike) > 1:
            what = f"{shorten(alike[0])} and {shorten(alike[1])} could both be {role}"
            raise DataError(what, where=where, hint=f"data.columns.{role}=NAME says which")
        found[role] = alike[0]
    return found


def _languages(names: list[str]) -> list[str]:
    """The names that are languages."""
    return [name for name in names if languages.language(name) is not None]


def _is_language_alias(missing: Collection[str], roles: Aliases) -> bool:
    """Whether a language is looked for: its names are then usual ones of a role."""
    return any(_languages(list(roles[role])) for role in missing)


def _other_language(names: list[str], missing: Aliases, taken: ColumnMap) -> ColumnMap:
    """Of a translation one side is known: the other, if one language is left and none was asked for."""
    spoken = _languages([name for name in names if name not in taken.values()])
    alone = len(missing) == 1 == len(spoken) and not _is_language_alias(missing, missing)
    return {role: spoken[0] for role in missing} if taken and alone else {}


def _existing_name(column: str | int, names: list[str], where: str) -> str:
    name = names[column] if isinstance(column, int) else column
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {shorten(near[0])}?" if near else f"known: {_listed(names)}"
        raise DataError(f"no column {shorten(name)}", where=where, hint=hint)
    return name


def _listed(names: list[str]) -> str:
    shown = ", ".join(shorten(name, 40)[1:-1] for name in names[:40])
    return shown if len(shown) <= 160 else f"{shown[:159]}…"


def _looks_like_header(opened: OpenedFile, roles: Aliases) -> bool:
    """A header names a role, or differs in kind from what stands below it: short words over long texts or numbers."""
    header = opened.names
    if match_aliases(header, roles):
        return True
    below = [row for row in opened.sample[1:] if len(row) == len(header)]
    if not below or any(is_number(name) for name in header):
        return False
    for column, name in enumerate(header):
        values = [row[column] for row in below]
        if all(is_number(value) for value in values):
            return True  # words over nothing but numbers
        if name in values:
            return False  # it recurs below: a value
    if any(_closest_name(role, roles, header) for role in roles):
        return True  # a usual name, misspelt
    if any(name.strip().endswith(SENTENCE_ENDS) for name in header):
        return False
    lengths = [sum(len(row[column]) for row in below) / len(below) for column in range(len(header))]
    return len(header[lengths.index(max(lengths))]) < 0.2 * max(lengths) and max(len(name) for name in header) < 30


def is_number(text: str) -> bool:
    """Whether a text is a number, infinity and NaN among them."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _tags(sample: list[list[str]]) -> str | None:
    """The tags of a CoNLL file, where a column holds nothing else below its name, if it has one."""
    for column in range(1, len(sample[0])):
        named = not TAG.fullmatch(sample[0][column])
        tags = sorted({row[column] for row in sample[named:] if len(row) == len(sample[0])} - {""})
        if "O" in tags and all(TAG.fullmatch(tag) for tag in tags):
            return ", ".join(tags[:4])
    return None


def _by_order(sample: list[list[str]], columns: schema.Columns) -> dict[str, int] | None:
    """Source and target are the first two columns that hold something else than numbers."""
    rows = [row for row in sample if len(row) == len(sample[0])]
    texts = [column for column in range(len(sample[0])) if not all(is_number(row[column]) for row in rows)]
    names = (_first(schema.inputs_of(columns), "text"), _first(schema.targets_of(columns), "text"))
    return dict(zip(names, texts[:2], strict=True)) if len(texts) > 1 else None


def _first(columns: schema.Columns, kind: schema.Kind) -> str:
    found: Column | None = schema.of_kind(columns, kind)
    return found.name if found is not None else kind


def _by_content(sample: list[list[str]], columns: schema.Columns) -> dict[str, int] | None:
    """Text is the column of the longest values, label the one with the fewest different short ones."""
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
