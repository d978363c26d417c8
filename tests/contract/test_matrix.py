"""Every technique on every task and family: the lists come from the registry; what is refused says why.

`make test` takes a pairwise cover, `make test-all` the whole product.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from tunesmith import registry
from tunesmith.errors import RecipeError
from tunesmith.testing import FAMILIES, check

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "full": [{}, {"layer_lr_decay": 0.8}],
    "freeze": [{"last_n_blocks": 1}, {"head_only": True}, {"last_n_blocks": 2, "gradual": True}],
    "lora": [{"r": 4}, {"r": 4, "target_modules": "all-linear", "rslora": True}, {"r": 2, "dora": True},
             {"r": 4, "init": "pissa"}, {"r": 4, "lora_plus_ratio": 4.0}],
}  # fmt: skip
"""Beside a technique's defaults: settings that change what it does."""


def _cases() -> list[Any]:
    cases = []
    for task, technique in product(registry.names("task"), registry.names("technique")):
        variants = VARIANTS.get(technique, [{}])
        for row, family in enumerate(FAMILIES):
            for column, keys in enumerate(variants):
                covered = column == row % len(variants)  # each family and each variant, not each pair of them
                marks = () if covered else (pytest.mark.slow,)
                name = "-".join([task, technique, *map(str, keys.values()), family])
                cases.append(pytest.param({"name": technique, **keys}, task, family, marks=marks, id=name))
    return cases


@pytest.mark.parametrize(("technique", "task", "family"), _cases())
def test_contract(technique: dict[str, Any], task: str, family: str) -> None:
    try:
        check(technique, task, family)
    except RecipeError as refusal:
        pytest.fail(f"refused, and the matrix in docs/ does not say so: {refusal}")
