"""Formatting of error messages."""

from __future__ import annotations

import pytest

from tunesmith.errors import counted


@pytest.mark.parametrize(
    ("number", "said"), ((0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1200, "1,200 rows")), ids=str
)
def test_counted_pluralizes(number: int, said: str) -> None:
    assert counted(number, "row") == said
    assert counted(number, "class", "classes") == said.replace("rows", "classes").replace("row", "class")
