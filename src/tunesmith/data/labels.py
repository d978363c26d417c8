"""Labels as people write them: names, numbers, lists of names; and what all of them together say.

A label is one class of two or many (`single`), several classes at once (`multi`), or a number (`regression`).
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
"""`auto`: from the data."""
Label = str | tuple[str, ...] | float
IGNORED = "-100"
"""The class that says that there is none, as PyTorch has it."""
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_INVISIBLE = string.whitespace + "\u00a0\u3000\u200b\u2060\ufeff"


def read_label(row: Row, kind: LabelKind, classes: list[str] | None) -> Label:
    """A row's label as a class name, a tuple of them, or a number; `classes` are those it may be.

    Raises:
        DataError: it is none.
    """
    value = row.values["label"]
    if kind == "regression":
        return _number(value, row)
    parts = value if isinstance(value, list | tuple) else None
    if parts is None and kind != "multi":
        return _known(_single(value, row, kind == "single"), row, classes)
    if kind == "single":
        what = f"{shorten(value)} is a list, and the others are one class a text"
        raise row.fault("label", what, "set task.labels=multi")
    names = [class_name(part) for part in (_listed(str(value)) if parts is None else parts)]
    if len(names) > 2 and {"0", "1"}.issuperset(names):
        what = f"{shorten(value)} looks like a flag for each class, of which no name is known"
        raise row.fault("label", what, "list the names of those that fit, such as ['a', 'c']")
    return tuple(sorted({_known(name, row, classes) for name in names if name}))


def _single(value: object, row: Row, brackets: bool) -> str:
    """A class name; one in brackets is more likely a list, unless one class a text is asked for."""
    name = class_name(value)
    if not name:
        raise row.fault("label", "nothing but invisible characters", "fill it in or remove the row")
    if name.startswith("[") and name.endswith("]") and not brackets:
        raise row.fault("label", f"{shorten(name)} is a list written as text", "set task.labels=multi")
    return name


def _known(name: str, row: Row, classes: list[str] | None) -> str:
    if classes is None or name in classes:
        return name
    what = f"{shorten(name)} is none of the {len(classes)} classes that are learned"
    raise row.fault("label", what, did_you_mean(name, classes[:20]))


def class_name(value: object) -> str:
    """One spelling for the labels 1, 1.0, "1" and " 1 ", and for accents coded in two ways."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = unicodedata.normalize("NFC", str(value)).strip(_INVISIBLE)
    return name[:-2] if name.endswith(".0") and name[:-2].lstrip("-").isdigit() else name


def _number(value: object, row: Row) -> float:
    if isinstance(value, bool) or not _is_number(str(value)):
        comma = _DECIMAL_COMMA.fullmatch(str(value).strip())
        instead = f" (write {comma[0].replace(',', '.')})" if comma else ""
        if any(character.isdigit() for character in str(value)):
            hint = f"mend it{instead}, or data.on_bad_row=skip"
        else:
            hint = "task.labels=single if these are classes, else mend it, or data.on_bad_row=skip"
        raise row.fault("label", f"{shorten(value)} is not a finite number", hint)
    number = float(str(value))
    if abs(number) > 1e9:
        raise row.fault("label", f"{shorten(value)} is out of any scale", "mend it, or data.on_bad_row=skip")
    return number


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _listed(text: str) -> list[str]:
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
    """What training labels say: their kind, the classes in the order of the outputs, how often each occurs.

    Raises:
        DataError: there is nothing to learn from them, or more likely a mistake in them.
    """
    found = _kind(labels, kind, classes, where)
    if found == "regression":
        return found, None, Counter()
    several = found == "multi"
    counts = Counter(name for label in labels for name in _names(label, several))
    ordered = classes or sorted(counts, key=_natural)
    if kind == "auto" and classes is None:
        _check_joined(ordered, where)
    _check_classes(ordered, counts, len(labels), where, several)
    return found, ordered, counts


def _kind(labels: Sequence[Label], kind: LabelKind, classes: list[str] | None, where: str) -> LabelKind:
    if kind != "auto":
        return kind
    if any(isinstance(label, tuple) for label in labels):
        return "multi"
    return "single" if classes else _single_or_regression({str(label) for label in labels}, where)


def _names(label: Label, several: bool) -> tuple[str, ...]:
    """The classes of a label; among lists, a text without one is a list too."""
    if isinstance(label, tuple):
        return label
    return tuple(name for part in _listed(str(label)) if (name := class_name(part))) if several else (str(label),)


def _natural(name: str) -> tuple[int, float, str]:
    return (0, float(name), name) if _is_number(name) else (1, 0.0, name)


def _single_or_regression(distinct: set[str], where: str) -> LabelKind:
    """Many different numbers with fractions are no classes; a word among them is more likely a mistake than a class."""
    words = sorted(name for name in distinct if not _is_number(name))
    commas = [name for name in words if _DECIMAL_COMMA.fullmatch(name)]
    if len(distinct) > 10 and len(commas) > len(distinct) / 2:
        what = f"label: {shorten(commas[0])} has a decimal comma, as have {len(commas) - 1} others"
        hint = f"write {commas[0].replace(',', '.')}, or set task.labels=single if these are classes"
        raise DataError(what, where=where, hint=hint)
    fractions = any(not float(name).is_integer() for name in distinct.difference(words))
    if len(distinct) <= 10 or not fractions or len(words) > len(distinct) / 10:
        return "single"
    if words:
        what = f"label: {shorten(words[0])} stands among numbers ({len(distinct) - len(words)} different ones)"
        raise DataError(
            what, where=where, hint="set task.labels=regression to find its row, or single if all are classes"
        )
    return "regression"


def _check_joined(classes: list[str], where: str) -> None:
    """Refuse a class like "a;b" beside the classes "a" and "b": it is more likely two labels of one text."""
    known = set(classes)
    for name in classes:
        parts = [part.strip() for part in _listed(name)]
        if len(parts) > 1 and known.issuperset(parts):
            hint = "set task.labels=multi, or task.labels=single if it is a class of its own"
            raise DataError(f"label: {shorten(name)} joins classes that also stand alone", where=where, hint=hint)


def _check_classes(classes: list[str], counts: Counter[str], rows: int, where: str, several: bool) -> None:
    if len(counts) < (1 if several else 2):
        only = f"every one of the {rows} rows is labelled {shorten(next(iter(counts), ''))}"
        hint = "a sorted file read in part does this: shuffle it, or read all of it"
        raise DataError(f"label: {only}; there is nothing to tell apart", where=where, hint=hint)
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
    """The weight of every class, from what `data.class_weights` says.

    Raises:
        RecipeError: weights where there is nothing to weigh, of a class that is none, or not above 0.
    """
    if given is None:
        return None
    if kind == "regression":
        raise RecipeError("data.class_weights: a regression has no classes", hint="leave the key out")
    if kind == "multi":
        raise RecipeError("data.class_weights: only for one class a text", hint="leave the key out")
    assert classes is not None, "single labels have classes"
    if given == "balanced":
        return {name: counts.total() / (len(classes) * max(counts[name], 1)) for name in classes}
    weights = {class_name(name): weight for name, weight in given.items()}
    if unknown := sorted(weights.keys() - set(classes)):
        raise RecipeError(f"data.class_weights: no class {shorten(unknown[0])}", hint=did_you_mean(unknown[0], classes))
    if wrong := next((name for name in classes if weights.get(name, 1.0) <= 0), None):
        what = f"data.class_weights: {weights[wrong]:g} for {shorten(wrong)}"
        raise RecipeError(what, hint="a weight is above 0; remove the rows of a class that is not to be learned")
    return {name: weights.get(name, 1.0) for name in classes}


def label_fields(label: Label, classes: list[str] | None, weights: dict[str, float]) -> dict[str, Any]:
    """A label as the fields of an example: a number, a 0 or 1 for each class, or a class's index and weight."""
    if isinstance(label, float):
        return {"label": label}
    assert classes is not None, "the labels are fitted first"
    if isinstance(label, tuple):
        return {"label": [float(name in label) for name in classes]}
    return {"label": classes.index(label), "weight": float(weights.get(label, 1.0))}
