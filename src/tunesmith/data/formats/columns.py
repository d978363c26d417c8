"""Which column plays which role: by the user's word, by its usual names, or by what it holds."""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import DataError, RecipeError, did_you_mean

Columns = dict[str, str | int]


def find_columns(
    path: Path,
    header: list[str],
    sample: list[list[str]],
    roles: dict[str, tuple[str, ...]],
    required: frozenset[str],
    chosen: Columns | None,
) -> tuple[Columns, str | None, bool]:
    """Role -> column, what the user should be told, and whether the first line is a header.

    `sample` holds the first lines of a format whose first line may be data; it is empty where names are certain.
    """
    if chosen and all(isinstance(column, int) for column in chosen.values()) and sample:
        _check_numbers(path, chosen, len(sample[0]))
        return dict(chosen), None, _looks_like_header(header, sample, roles)
    found = _by_name(header, roles) | _chosen_names(path, header, roles, chosen or {})
    if required <= found.keys():
        return found, None, True
    if sample and not found and not _looks_like_header(header, sample, roles):
        guessed = _by_content(sample)
        if guessed is not None and required <= guessed.keys():
            told = ", ".join(f"column {number + 1} is {role}" for role, number in guessed.items())
            return dict(guessed), f"{path}: no header; {told} (data.columns says otherwise)", False
    missing = ", ".join(sorted(required - found.keys()))
    columns = ", ".join(header[:20])
    role = missing.split(",")[0]
    raise DataError(f"no column for {missing} among: {columns}", where=f"{path}:1", hint=f"data.columns.{role}=NAME")


def _plain(name: str) -> str:
    return name.strip().strip("\ufeff\"'").lower().replace(" ", "_").replace("-", "_")


def _by_name(header: list[str], roles: dict[str, tuple[str, ...]]) -> Columns:
    plain = {_plain(name): name for name in reversed(header)}
    found: Columns = {}
    for role, usual in roles.items():
        name = next((plain[name] for name in usual if name in plain and plain[name] not in found.values()), None)
        if name is not None:
            found[role] = name
    return found


def _chosen_names(path: Path, header: list[str], roles: dict[str, tuple[str, ...]], chosen: Columns) -> Columns:
    found: Columns = {}
    for role, column in chosen.items():
        if role not in roles:
            raise RecipeError(f"data.columns.{role}: no such role", hint=did_you_mean(role, roles))
        name = header[column] if isinstance(column, int) and 0 <= column < len(header) else str(column)
        if name not in header:
            raise DataError(f"no column '{column}'", where=f"{path}:1", hint=did_you_mean(str(column), header))
        found[role] = name
    return found


def _check_numbers(path: Path, chosen: Columns, width: int) -> None:
    for role, number in chosen.items():
        if not 0 <= int(number) < width:
            raise DataError(f"data.columns.{role}: no column {number}", where=f"{path}:1", hint=f"0 to {width - 1}")


def _looks_like_header(header: list[str], sample: list[list[str]], roles: dict[str, tuple[str, ...]]) -> bool:
    """A header names a role, or differs in kind from what stands below it: short words over long texts or numbers."""
    usual = {name for names in roles.values() for name in names}
    if any(_plain(name) in usual for name in header):
        return True
    below = [row for row in sample[1:] if len(row) == len(header)]
    if not below or any(_is_number(name) for name in header):
        return False
    for column, name in enumerate(header):
        values = [row[column] for row in below]
        if all(_is_number(value) for value in values):
            return True  # words over nothing but numbers
        if name in values:
            return False  # it recurs below: a value
    lengths = [sum(len(row[column]) for row in below) / len(below) for column in range(len(header))]
    return len(header[lengths.index(max(lengths))]) < 0.2 * max(lengths) and max(len(name) for name in header) < 30


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _by_content(sample: list[list[str]]) -> dict[str, int] | None:
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
    return {"text": text, "label": label}
