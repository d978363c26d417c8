"""Parsing of labels (names, numbers, lists of names), and the classes and weights of a set of labels.

A label is one class (`single`), several classes at once (`multi`), or a number (`regression`).
"""

from __future__ import annotations

import ast
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from tunesmith.data.formats import Row
from tunesmith.errors import DataError, RecipeError, did_you_mean, shorten

LabelKind = Literal["auto", "single", "multi", "regression"]
"""`auto`: inferred from the data."""
Label = str | tuple[str, ...] | float
IGNORED = "-100"
"""Class of rows without a label: PyTorch's `ignore_index`."""
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_INVISIBLE = string.whitespace + "\u00a0\u3000\u200b\u2060\ufeff"


def read_label(row: Row, kind: LabelKind, classes: list[str] | None, column: str = "label") -> Label:
    """Parse the label in a row's `column`: a class name, a tuple of class names, or a number.

    `classes` are the valid class names; None accepts any.

    Raises:
        DataError: the value is no valid label.
    """
    value = row.values[column]
    if kind == "regression":
        return _number(value, row, column)
    parts = value if isinstance(value, list | tuple) else None
    if parts is None and kind != "multi":
        return _known(_single(value, row, column, kind == "single"), row, column, classes)
    if kind == "single":
        what = f"{shorten(value)} is a list, but the other rows have one class each"
        raise row.fault(column, what, "set task.labels=multi")
    names = [class_name(part) for part in (_split_list(str(value)) if parts is None else parts)]
    if len(names) > 2 and {"0", "1"}.issuperset(names):
        what = f"{shorten(value)} looks like a 0/1 flag per class, but the class names are unknown"
        raise row.fault(column, what, "list the names of the classes that apply, such as ['a', 'c']")
    return tuple(sorted({_known(name, row, column, classes) for name in names if name}))


def _single(value: object, row: Row, column: str, brackets: bool) -> str:
    """Parse a class name; a name in brackets is refused as a probable list unless `brackets`."""
    name = class_name(value)
    if not name:
        raise row.fault(column, "nothing but invisible characters", "fill it in or remove the row")
    if name.startswith("[") and name.endswith("]") and not brackets:
        raise row.fault(column, f"{shorten(name)} is a list written as text", "set task.labels=multi")
    return name


def _known(name: str, row: Row, column: str, classes: list[str] | None) -> str:
    if classes is None or name in classes:
        return name
    what = f"{shorten(name)} is not among the {len(classes)} classes of train"
    raise row.fault(column, what, did_you_mean(name, classes[:20]))


def class_name(value: object) -> str:
    """Normalize a class name: 1, 1.0, "1" and " 1 " become one name; accents are composed (NFC)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = unicodedata.normalize("NFC", str(value)).strip(_INVISIBLE)
    return name[:-2] if name.endswith(".0") and name[:-2].lstrip("-").isdigit() else name


def _number(value: object, row: Row, column: str) -> float:
    if isinstance(value, bool) or not _is_number(str(value)):
        comma = _DECIMAL_COMMA.fullmatch(str(value).strip())
        instead = f" (write {comma[0].replace(',', '.')})" if comma else ""
        if any(character.isdigit() for character in str(value)):
            hint = f"correct it{instead}, or set data.on_bad_row=skip"
        else:
            hint = "set task.labels=single if these are classes; else correct it, or set data.on_bad_row=skip"
        raise row.fault(column, f"{shorten(value)} is not a finite number", hint)
    number = float(str(value))
    if abs(number) > 1e9:
        what = f"{shorten(value)} is larger than 1e9 in magnitude"
        raise row.fault(column, what, "rescale or correct it, or set data.on_bad_row=skip")
    return number


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _split_list(text: str) -> list[str]:
    if text.startswith("["):
        try:
            return [str(part) for part in ast.literal_eval(text)]
        except (ValueError, SyntaxError):
            return [text]
    for separator in (";", "|", ","):
        if separator in text:
            return text.split(separator)
    return [text]


def fit_labels(
    labels: Sequence[Label], kind: LabelKind, classes: list[str] | None, where: str
) -> tuple[LabelKind, list[str] | None, Counter[str]]:
    """Infer from training labels: their kind, the classes in output order, and the count of each class.

    Raises:
        DataError: there is nothing to learn from them, or they probably contain a mistake.
    """
    resolved = _kind(labels, kind, classes, where)
    if resolved == "regression":
        return resolved, None, Counter()
    several = resolved == "multi"
    counts = Counter(name for label in labels for name in _names(label, several))
    ordered = classes or sorted(counts, key=_natural)
    if kind == "auto" and classes is None:
        _check_joined_classes(ordered, where)
    _check_classes(ordered, counts, len(labels), where, several)
    return resolved, ordered, counts


def _kind(labels: Sequence[Label], kind: LabelKind, classes: list[str] | None, where: str) -> LabelKind:
    if kind != "auto":
        return kind
    if any(isinstance(label, tuple) for label in labels):
        return "multi"
    return "single" if classes else _single_or_regression({str(label) for label in labels}, where)


def _names(label: Label, several: bool) -> tuple[str, ...]:
    """Return the classes of a label; if `several`, a label written as text is split into a list."""
    if isinstance(label, tuple):
        return label
    return tuple(name for part in _split_list(str(label)) if (name := class_name(part))) if several else (str(label),)


def _natural(name: str) -> tuple[int, float, str]:
    return (0, float(name), name) if _is_number(name) else (1, 0.0, name)


def _single_or_regression(distinct: set[str], where: str) -> LabelKind:
    """Choose regression for many different fractional numbers; a few words among them are probably mistakes."""
    words = sorted(name for name in distinct if not _is_number(name))
    commas = [name for name in words if _DECIMAL_COMMA.fullmatch(name)]
    if len(distinct) > 10 and len(commas) > len(distinct) / 2:
        what = f"label: {shorten(commas[0])} and {len(commas) - 1} others have a decimal comma"
        hint = f"write {commas[0].replace(',', '.')}, or set task.labels=single if these are classes"
        raise DataError(what, where=where, hint=hint)
    fractions = any(not float(name).is_integer() for name in distinct.difference(words))
    if len(distinct) <= 10 or not fractions or len(words) > len(distinct) / 10:
        return "single"
    if words:
        what = f"label: {shorten(words[0])} is no number, but {len(distinct) - len(words)} other labels are"
        hint = "set task.labels=regression to find its row, or single if all are classes"
        raise DataError(what, where=where, hint=hint)
    return "regression"


def _check_joined_classes(classes: list[str], where: str) -> None:
    """Refuse a class like "a;b" if "a" and "b" are classes too: it is probably two labels of one text."""
    known = set(classes)
    for name in classes:
        parts = [part.strip() for part in _split_list(name)]
        if len(parts) > 1 and known.issuperset(parts):
            hint = "set task.labels=multi, or task.labels=single if it is one class"
            raise DataError(f"label: {shorten(name)} combines classes that also occur alone", where=where, hint=hint)


def _check_classes(classes: list[str], counts: Counter[str], rows: int, where: str, several: bool) -> None:
    if len(counts) < (1 if several else 2):
        what = f"label: all {rows} rows have the class {shorten(next(iter(counts), ''))}"
        hint = "two classes or more are needed; if the file is sorted and read in part, shuffle it or read all of it"
        raise DataError(what, where=where, hint=hint)
    if len(classes) > 50 and len(classes) > rows / 2:
        raise DataError(
            f"label: {len(classes)} classes in {rows} rows look like identifiers",
            where=where,
            hint="set data.columns.label",
        )


def class_weights(
    given: Literal["balanced"] | dict[str, float] | None,
    kind: LabelKind,
    classes: list[str] | None,
    counts: Counter[str],
) -> dict[str, float] | None:
    """Return the weight of every class, from `data.class_weights`.

    Raises:
        RecipeError: the labels are not of kind `single`, a class is unknown, or a weight is not above 0.
    """
    if given is None:
        return None
    if kind == "regression":
        raise RecipeError("data.class_weights: a regression has no classes", hint="remove the key")
    if kind == "multi":
        raise RecipeError("data.class_weights: multi-label data is not supported", hint="remove the key")
    assert classes is not None, "single labels have classes"
    if given == "balanced":
        return {name: counts.total() / (len(classes) * max(counts[name], 1)) for name in classes}
    weights = {class_name(name): weight for name, weight in given.items()}
    if unknown := sorted(weights.keys() - set(classes)):
        raise RecipeError(f"data.class_weights: no class {shorten(unknown[0])}", hint=did_you_mean(unknown[0], classes))
    if wrong := next((name for name in classes if weights.get(name, 1.0) <= 0), None):
        what = f"data.class_weights: {weights[wrong]:g} for {shorten(wrong)}"
        raise RecipeError(what, hint="set a weight above 0; to leave a class out, remove its rows")
    return {name: weights.get(name, 1.0) for name in classes}


def label_fields(label: Label, classes: list[str] | None, weights: dict[str, float]) -> dict[str, Any]:
    """Return the fields of an encoded label: a number, a 0 or 1 per class, or a class index and its weight."""
    if isinstance(label, float):
        return {"label": label}
    assert classes is not None, "call fit_labels first"
    if isinstance(label, tuple):
        return {"label": [float(name in label) for name in classes]}
    return {"label": classes.index(label), "weight": float(weights.get(label, 1.0))}
