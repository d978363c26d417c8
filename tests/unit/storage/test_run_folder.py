"""`--overwrite` replaces a run, never other files nor what the new run needs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.console import Console
from tunesmith.errors import RecipeError
from tunesmith.storage.run_folder import RUN_FILES, claim, put_aside, put_back

QUIET = Console(level=-1)


@pytest.fixture
def finished(recipe_of: Any, reviews_csv: Path, tmp_path: Path) -> Path:
    """A finished run with every optional file."""
    data = {"train": str(reviews_csv), "validation": 0.2, "test": 0.2}
    recipe = recipe_of("train.epochs=null", "train.max_steps=1", technique="lora", data=data)
    return Path(tunesmith.train(recipe.model_copy(update={"output": str(tmp_path / "finished")}), console=QUIET)["run"])


def test_every_file_of_a_run_is_known(finished: Path) -> None:
    assert [path.name for path in finished.iterdir() if not RUN_FILES.fullmatch(path.name)] == []
    claim(finished, resume=False, overwrite=True)


@pytest.mark.parametrize("name", ("notes.md", "train.csv", "src", "Model", "1-thing.txt"))
def test_a_folder_with_anything_else_in_it_is_left_alone(name: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).mkdir()
    with pytest.raises(RecipeError, match=f"output: {name} .*output=DIR"):
        claim(tmp_path / "run", resume=False, overwrite=True)


def test_what_a_run_needs_is_not_overwritten(finished: Path, recipe_of: Any, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    for keys in ({"model": str(run)}, {"data": {"train": str(run / "predictions-test.jsonl")}}):
        with pytest.raises(RecipeError, match=r"output: .*run.* not overwritten"):
            tunesmith.train(recipe_of(**keys), overwrite=True, console=QUIET)
    with pytest.raises(RecipeError, match=r"output: .*recipe.yaml .*not overwritten"):
        tunesmith.train(run / "recipe.yaml", f"output={run}", overwrite=True, console=QUIET)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


def test_what_is_put_aside_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "run.json").write_text("{}")
    put_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".replaced"]
    put_back(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run.json"]
    put_back(tmp_path)


def test_stages_that_are_refused_leave_what_they_would_replace(
    reviews_csv: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    one = {"task": "text-classification", "data": {"train": str(reviews_csv)}, "train": {"max_steps": 1}}
    keys = {"model": str(tiny_bert), "stages": [one, one], "output": str(tmp_path / "out"), "gain": None}
    first = tunesmith.train(keys, console=QUIET)
    with pytest.raises(RecipeError, match="model: "):
        tunesmith.train(keys | {"model": "./nothing-there"}, overwrite=True, console=QUIET)
    assert tunesmith.train(resume=tmp_path / "out", console=QUIET) == first
    assert tunesmith.train(keys, overwrite=True, console=QUIET)["steps"] == 1
    assert not (tmp_path / "out" / ".replaced").exists()
