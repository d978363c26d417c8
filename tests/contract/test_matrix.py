"""Every technique on every task and family: the lists come from the registry; what is refused, docs/support.md says.

`make test` takes a pairwise cover, `make test-all` the whole product.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import matrix
import pytest

from tunesmith import registry
from tunesmith.errors import RecipeError
from tunesmith.testing import FAMILIES, check


def _cases() -> list[Any]:
    cases = []
    for task, technique in product(registry.names("task"), registry.names("technique")):
        variants = matrix.variants(technique)
        for (row, family), (column, keys) in product(enumerate(FAMILIES), enumerate(variants)):
            covered = column == row % len(variants)  # each family and each variant, not each pair of them
            marks = () if covered else (pytest.mark.slow,)
            name = f"{task} {matrix.label(technique, keys)} {family}".replace(" ", "-")
            cases.append(pytest.param(technique, keys, task, family, marks=marks, id=name))
    return cases


@pytest.mark.parametrize(("technique", "keys", "task", "family"), _cases())
def test_contract(technique: str, keys: dict[str, Any], task: str, family: str) -> None:
    said = (task, matrix.label(technique, keys), family) in matrix.refused()
    try:
        check({"name": technique, **keys}, task, family)
    except RecipeError as refusal:
        assert said, f"refused, and docs/support.md does not say so: {refusal}"
    else:
        assert not said, "docs/support.md says that this is refused: run tests/contract/matrix.py"


def test_the_page_has_every_row_and_column() -> None:
    page = matrix.PAGE.read_text(encoding="utf-8")
    for task, technique in product(registry.names("task"), registry.names("technique")):
        assert f"## {task}\n" in page
        for keys in matrix.variants(technique):
            assert f"| `{matrix.label(technique, keys)}` |" in page
    assert all(f" {family} " in page for family in FAMILIES)
