"""Labels as names, numbers or lists: their kind, classes and weights, and errors for unusable labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from tunesmith import recipe as recipes
from tunesmith.data.formats import Row
from tunesmith.data.labels import LabelKind, class_weights, fit_labels, label_fields, read_label
from tunesmith.errors import DataError, RecipeError


def _fit(given: Sequence[Any], kind: LabelKind = "auto") -> tuple[LabelKind, list[str] | None, Counter[str]]:
    rows = [Row(f"made-up:{number}", {"label": label}) for number, label in enumerate(given)]
    return fit_labels([read_label(row, kind, None) for row in rows], kind, None, "made-up")


KINDS: dict[str, tuple[list[Any], str, list[str] | None]] = {
    "two words": (["pos", "neg", "pos"], "single", ["neg", "pos"]),
    "many words": (list("gfedcba"), "single", list("abcdefg")),
    "whole numbers": ([0, 2, 10, 1], "single", ["0", "1", "2", "10"]),
    "numbers as text": (["10", "9", "-1"], "single", ["-1", "9", "10"]),
    "floats": ([1.0, 2.0, 1.5], "single", ["1", "1.5", "2"]),
    "one number, four spellings": ([1, 1.0, " 1 ", "1.0", 0], "single", ["0", "1"]),
    "booleans": ([True, False], "single", ["False", "True"]),
    "numbers and words": (["b", "2", "a", "1"], "single", ["1", "2", "a", "b"]),
    "lists": ([["a"], ["b", "a"], []], "multi", ["a", "b"]),
    "lists of numbers": ([[3, 1], [2.0], [1]], "multi", ["1", "2", "3"]),
    "eleven fractions": ([n / 4 for n in range(11)], "regression", None),
    "a hundred whole numbers": ([*range(100)] * 3, "single", [str(n) for n in range(100)]),
}


@pytest.mark.parametrize(("labels", "kind", "classes"), KINDS.values(), ids=KINDS)
def test_the_data_say_what_kind_it_is(labels: list[Any], kind: str, classes: list[str] | None) -> None:
    found = _fit(labels)
    assert found[:2] == (kind, classes) and (classes is None or set(found[2]) == set(classes))


@pytest.mark.parametrize(
    ("labels", "kind", "said"),
    (
        (["pos"] * 9, "auto", "all 9 rows .*'pos'.*; "),
        ([1, 1.0, "1"], "auto", "all 3 rows .*'1'.*; "),
        ([[], []], "auto", "all 2 rows .*''.*; "),
        ([[0, 1, 0], [1, 0, 0]], "auto", "0/1 flag per class"),
        (["1;0;1"], "multi", "0/1 flag per class"),
        (["[SPAM]", "ham"], "auto", "list written as text; .*task.labels=multi"),
    ),
)
def test_what_cannot_be_learned_is_refused_with_the_reason(labels: list[Any], kind: LabelKind, said: str) -> None:
    with pytest.raises(DataError, match=said):
        _fit(labels, kind)


def test_a_class_in_brackets_can_be_meant() -> None:
    assert _fit(["[SPAM]", "ham"], "single")[1] == ["[SPAM]", "ham"]


def test_balanced_weights_are_inverse_to_the_frequency() -> None:
    weights = class_weights("balanced", *_fit("aabacaba"))
    assert weights == pytest.approx({"a": 8 / (3 * 5), "b": 8 / (3 * 2), "c": 8 / (3 * 1)})


def test_weights_of_classes_that_are_numbers_may_be_numbers() -> None:
    recipe = recipes.load(None, ("task=text-classification", "model=tiny", "data.class_weights={1: 2.0, 0.0: 0.5}"))
    assert class_weights(recipe.data.class_weights, *_fit([0, 1, 1, 2])) == {"0": 0.5, "1": 2.0, "2": 1.0}


@pytest.mark.parametrize(
    ("labels", "weights", "said"),
    (
        ("aab", {"c": 2.0}, "no class 'c'; known: a, b"),
        ("aab", {"a": 0.0}, "data.class_weights: 0 for 'a'; set a weight above 0"),
        ("aab", {"b": -1.0}, "data.class_weights: -1 for 'b'"),
        ([["a"], ["b"]], "balanced", "multi-label"),
        ([n / 4 for n in range(11)], "balanced", "regression .*no classes"),
    ),
)
def test_weights_that_cannot_be_meant_are_refused(labels: Any, weights: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        class_weights(weights, *_fit(labels))


def test_a_label_is_a_number_or_a_flag_for_each_class_or_an_index_and_its_weight() -> None:
    assert label_fields(2.5, None, {}) == {"label": 2.5}
    assert label_fields(("a", "c"), ["a", "b", "c"], {}) == {"label": [1.0, 0.0, 1.0]}
    assert label_fields("b", ["a", "b"], {"a": 2.0}) == {"label": 1, "weight": 1.0}
    assert label_fields("a", ["a", "b"], {"a": 2.0}) == {"label": 0, "weight": 2.0}
