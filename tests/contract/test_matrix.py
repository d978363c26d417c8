"""Every technique on every task and family, from the registry; docs/support.md lists the refusals.

`make test` takes every sixth cell of text classification, each variant on three families and each family with four,
and of other tasks every eighteenth or thirty-sixth; `make test-all` takes all.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import matrix
import pytest

from tunesmith import registry
from tunesmith.errors import RecipeError
from tunesmith.testing import FAMILIES, check

ROOT = Path(__file__).parents[2]


def _cases() -> list[Any]:
    cases = []
    for task in registry.names("task"):
        every = 6 if task == "text-classification" else 18
        rows = [(technique, keys) for technique in registry.names("technique") for keys in matrix.variants(technique)]
        families = enumerate(matrix.fitting(task)[0])
        for (row, (technique, keys)), (column, family) in product(enumerate(rows), families):
            marks = () if (row + column) % every == 0 else (pytest.mark.slow,)
            name = f"{task} {matrix.label(technique, keys)} {family}".replace(" ", "-")
            cases.append(pytest.param(technique, keys, task, family, marks=marks, id=name))
    return cases


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize(("technique", "keys", "task", "family"), _cases())
def test_contract(technique: str, keys: dict[str, Any], task: str, family: str) -> None:
    expected = (task, matrix.label(technique, keys), family) in matrix.refused()
    try:
        check({"name": technique, **keys}, task, family)
    except RecipeError as refusal:
        assert expected, f"refused, but not in docs/support.md: {refusal}"
    else:
        assert not expected, "not refused, but in docs/support.md: run tests/contract/matrix.py"


def test_the_page_has_every_row_and_column() -> None:
    page = matrix.PAGE.read_text(encoding="utf-8")
    for task, technique in product(registry.names("task"), registry.names("technique")):
        assert f"## {task}\n" in page
        for keys in matrix.variants(technique):
            assert f"| `{matrix.label(technique, keys)}` |" in page
    for task in registry.names("task"):
        families, others = matrix.fitting(task)
        part = page.partition(f"## {task}\n")[2].partition("\n## ")[0]
        assert f"| technique | {' | '.join(families)} |\n" in part
        assert all(f"Not {', '.join(names)}: {why}." in part for why, names in others.items())
    assert all(f" {family} " in page for family in FAMILIES)


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_refusals_are_those_of_the_support_page(page: str) -> None:
    rows = [
        line.strip("|").split("|") for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if "|" in line
    ]
    listed: dict[str, set[str]] = {}
    for row in rows:
        families = {name.strip() for name in row[1].split(",")} if len(row) == 3 else set()
        if families and families <= set(FAMILIES):  # other rows name tasks or groups of models
            listed.setdefault(row[0].partition("`")[2].partition("`")[0], set()).update(families)
    refusals: dict[str, set[str]] = {}
    for task, row, family in matrix.refused():
        if task == "text-classification":  # other tasks refuse whole families, as in their cards
            refusals.setdefault(row.split()[0], set()).add(family)
    assert {name: families for name, families in listed.items() if name in registry.names("technique")} == refusals
