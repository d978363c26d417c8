"""Columns of a data set: the name of each, the kind of its values, and which of them are targets.

Readers, splits, checks and `predict` ask for the kind of a column, never for its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "text",  # one text
    "words",  # a list of words
    "image",  # a picture: a path, or its bytes
    "label",  # a class, several classes, or a number
    "tags",  # a tag for each word, or spans of characters
    "spans",
    "boxes",
    "mask",
    "messages",  # a list of messages
    "turn",  # one message: a text, or a list of messages
    "value",  # a text, a number, or a list of them; the task decides
    "list",  # a list whose parts the task decides on
    "number",
    "features",  # every other column
]
LIST_KINDS: frozenset[Kind] = frozenset({"words", "tags", "spans", "boxes", "messages", "turn", "list"})
"""Kinds whose values may be lists that only the task can judge."""

JSON_LIST_KINDS = LIST_KINDS - {"turn"}
"""Kinds of which a cell of text may hold a list as JSON; a message may begin with a bracket."""


@dataclass(frozen=True)
class Column:
    """A column that a task reads. `aliases` are other names that it often has; `target`: whether it is predicted."""

    name: str
    kind: Kind
    aliases: tuple[str, ...] = ()
    required: bool = True
    target: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Its own name, then its aliases."""
        return (self.name, *(alias for alias in self.aliases if alias != self.name))


Columns = Sequence[Column]


def names_of(columns: Columns) -> tuple[str, ...]:
    """The names of some columns, in their order."""
    return tuple(column.name for column in columns)


def inputs_of(columns: Columns) -> tuple[Column, ...]:
    """The columns that a model is given: all that are not targets."""
    return tuple(column for column in columns if not column.target)


def targets_of(columns: Columns) -> tuple[Column, ...]:
    """The columns that a model is to predict."""
    return tuple(column for column in columns if column.target)


def required_of(columns: Columns) -> frozenset[str]:
    """The names of the columns that training data must have."""
    return frozenset(column.name for column in columns if column.required)


def of_kind(columns: Columns, kind: Kind) -> Column | None:
    """The first column of a kind; None where there is none."""
    return next((column for column in columns if column.kind == kind), None)


def reads_plain_text(columns: Columns) -> bool:
    """Return whether text alone can be learned from: the first column, and no other is required."""
    return columns[0].kind == "text" and required_of(columns) <= {columns[0].name}


def predicts_text(columns: Columns) -> bool:
    """Return whether a text is the target, so that two parallel files may hold the data."""
    return any(column.kind == "text" and column.target for column in columns)


def predicts_labels(columns: Columns) -> bool:
    """Return whether there are classes, numbers or tags to predict, as opposed to texts."""
    return any(column.kind in ("label", "tags") and column.target for column in columns)


def in_order(columns: Iterable[Column], given: Iterable[str]) -> Iterator[Column]:
    """The columns among `given` names, in their own order."""
    known = set(given)
    return (column for column in columns if column.name in known)
