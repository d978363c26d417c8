from __future__ import annotations

import json
from pathlib import Path

import golden
import pytest

KEPT = json.loads(golden.FILE.read_text(encoding="utf-8")) if golden.FILE.exists() else {}


@pytest.mark.parametrize("recipe", golden.RECIPES, ids=lambda path: path.stem)
def test_the_first_ten_losses_are_what_they_were(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # and back again
    found = golden.losses(recipe, tmp_path)
    assert len(found) == 10 and found[-1] != found[0]
    assert found == pytest.approx(KEPT[recipe.stem], abs=1e-4), "if that is meant: python tests/golden/golden.py"


def test_every_golden_loss_is_of_a_recipe() -> None:
    assert list(KEPT) == [recipe.stem for recipe in golden.RECIPES]
