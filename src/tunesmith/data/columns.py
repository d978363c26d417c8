"""Columns of a dataset: the name of each, the kind of its values, and whether it is a target.

Readers, splits, checks and `predict` use the kind of a column, never its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "text",  # one text
    "words",  # a list of words
    "image",  # a picture: a path, or its bytes
    "label",  # a class, several classes, or a number
    "tags",  # a tag for each word, or character spans
    "spans",
    "boxes",
    "mask",
    "messages",  # a list of messages
    "turn",  # one message: a text, or a list of messages
    "value",  # a text, a number, or a list of them; the task interprets it
    "list",  # a list whose elements the task interprets
    "number",
    "features",  # every other column
]
LIST_KINDS: frozenset[Kind] = frozenset({"words", "tags", "spans", "boxes", "messages", "turn", "list"})
"""Kinds whose values may be lists that only the task can validate."""

JSON_LIST_KINDS = LIST_KINDS - {"turn"}
"""Kinds whose lists may be written as JSON in a text cell. A message (`turn`) may begin with a bracket itself."""


@dataclass(frozen=True)
class Column:
    """A column that a task reads. `aliases` are other common names of it; a `target` is predicted, not an input."""

    name: str
    kind: Kind
    aliases: tuple[str, ...] = ()
    required: bool = True
    target: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The column's name, then its aliases."""
        return (self.name, *(alias for alias in self.aliases if alias != self.name))


Columns = Sequence[Column]


def names_of(columns: Columns) -> tuple[str, ...]:
    """Return the names of the columns, in order."""
    return tuple(column.name for column in columns)


def inputs_of(columns: Columns) -> tuple[Column, ...]:
    """Return the input columns: all that are not targets."""
    return tuple(column for column in columns if not column.target)


def targets_of(columns: Columns) -> tuple[Column, ...]:
    """Return the target columns."""
    return tuple(column for column in columns if column.target)


def required_of(columns: Columns) -> frozenset[str]:
    """Return the names of the columns that training data must have."""
    return frozenset(column.name for column in columns if column.required)


def of_kind(columns: Columns, kind: Kind) -> Column | None:
    """Return the first column of a kind; None if there is none."""
    return next((column for column in columns if column.kind == kind), None)


def reads_plain_text(columns: Columns) -> bool:
    """Return whether plain text is valid data: the first column is a text and no other is required."""
    return columns[0].kind == "text" and required_of(columns) <= {columns[0].name}


def predicts_text(columns: Columns) -> bool:
    """Return whether a target is a text, so that two parallel files may hold the data."""
    return any(column.kind == "text" and column.target for column in columns)


def predicts_labels(columns: Columns) -> bool:
    """Return whether a target is a class, a number or a list of tags."""
    return any(column.kind in ("label", "tags") and column.target for column in columns)
