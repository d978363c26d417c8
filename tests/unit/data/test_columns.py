"""Queries of columns by kind, for the columns of every registered task."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith import registry
from tunesmith.data.columns import (
    JSON_LIST_KINDS,
    LIST_KINDS,
    Column,
    inputs_of,
    names_of,
    of_kind,
    predicts_labels,
    predicts_text,
    reads_plain_text,
    required_of,
    targets_of,
)
from tunesmith.data.formats import Row, read_table
from tunesmith.data.splits import digest

PICTURES = (
    Column("image", "image", ("picture", "path", "图片")),
    Column("width", "number", required=False),
    Column("label", "label", ("class",), target=True),
)


def _columns(task: str) -> Any:
    return registry.get("task", task)().columns  # type: ignore[attr-defined]


def test_a_column_has_its_own_name_first_and_once() -> None:
    assert Column("text", "text", ("body", "text", "review")).names == ("text", "body", "review")
    assert Column("text", "text").names == ("text",)
    with pytest.raises(AttributeError):
        Column("text", "text").kind = "label"  # type: ignore[misc]


def test_inputs_and_targets_part_the_columns() -> None:
    assert names_of(inputs_of(PICTURES)) == ("image", "width") and names_of(targets_of(PICTURES)) == ("label",)
    assert required_of(PICTURES) == {"image", "label"}
    assert of_kind(PICTURES, "number") is PICTURES[1] and of_kind(PICTURES, "boxes") is None


SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[bool, bool, bool]]] = {
    "text-classification": (("text", "label"), ("label",), (False, False, True)),
    "token-classification": (("label",), ("label",), (False, False, True)),
    "fill-mask": (("text",), (), (True, False, False)),
    "text-generation": ((), (), (True, False, False)),
    "translation": (("source", "target"), ("target",), (False, True, False)),
}
"""Task -> required columns, targets, and the kinds of training data: plain text, pairs of texts, labels."""


@pytest.mark.parametrize("task", SHAPES)
def test_what_the_readers_ask_of_the_columns_of_a_task(task: str) -> None:
    required, targets, asked = SHAPES[task]
    columns = _columns(task)
    assert required_of(columns) == set(required)
    assert names_of(targets_of(columns)) == targets
    assert (reads_plain_text(columns), predicts_text(columns), predicts_labels(columns)) == asked


@pytest.mark.parametrize("task", registry.names("task"))
def test_no_name_is_that_of_two_columns_and_the_first_is_an_input(task: str) -> None:
    columns = _columns(task)
    names = names_of(columns)
    assert len(set(names)) == len(names) and not columns[0].target
    assert columns == _columns(task), "columns are values"
    assert sorted(names_of(inputs_of(columns)) + names_of(targets_of(columns))) == sorted(names)


def test_a_message_is_a_list_that_no_cell_of_text_spells() -> None:
    assert (
        LIST_KINDS - JSON_LIST_KINDS == {"turn"}
        and {"words", "tags", "spans", "boxes", "messages", "list"} == JSON_LIST_KINDS
    )


def test_a_table_is_read_by_kind_under_any_names(tmp_path: Any) -> None:
    (tmp_path / "a.csv").write_text("path,width,class\na.png,4,cat\nb.png,,dog\n")
    table = read_table(tmp_path / "a.csv", PICTURES)
    assert table.columns == {"image": "path", "width": "width", "label": "class"}
    assert [row.values for row in table] == [
        {"image": "a.png", "width": "4", "label": "cat"},
        {"image": "b.png", "label": "dog"},
    ]


def test_a_digest_is_of_the_inputs_whatever_they_are_called() -> None:
    one, other = (Row("a:1", {"image": "a.png", "label": label}) for label in ("cat", "dog"))
    assert digest(one, PICTURES) == digest(other, PICTURES)
    assert digest(Row("a:2", {"image": "b.png", "label": "cat"}), PICTURES) != digest(one, PICTURES)
    text = (Column("a", "text"), Column("b", "text", target=True))
    swapped = (Column("a", "text", target=True), Column("b", "text"))
    row = Row("a:1", {"a": "x", "b": "y"})
    assert digest(row, text) != digest(row, swapped), "each is of its own input"
