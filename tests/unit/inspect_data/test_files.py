"""The data that `data check` and `data show` inspect, resolved from a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import RecipeError
from tunesmith.inspect_data.files import resolve_target
from tunesmith.recipe import source

SINGLE = "task: text-classification\nmodel: m\ndata: {train: reviews.csv}\n"
STAGES = "model: m\ndata: {train: reviews.csv}\nstages:\n- task: fill-mask\n- task: text-classification\n"


@pytest.mark.parametrize("text", (SINGLE, STAGES), ids=("single run", "stages"))
def test_a_recipe_file_is_read_once(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "recipe.yaml", []
    path.write_text(text)
    read_file = source.read_file
    monkeypatch.setattr(source, "read_file", lambda path: read.append(path) or read_file(path))  # type: ignore[func-returns-value]
    resolved = resolve_target(str(path), ("data.max_length=7",), None)
    assert read == [path]
    assert resolved.recipe.data.max_length == 7 and resolved.recipe.task.name == "text-classification"
    assert resolved.model == "m"


def test_a_stage_of_a_recipe_without_stages_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(SINGLE)
    with pytest.raises(RecipeError, match="--stage"):
        resolve_target(str(path), (), None, stage=1)
