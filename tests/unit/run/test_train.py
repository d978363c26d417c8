"""One run from recipe to folder, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.errors import RecipeError, UserError

TECHNIQUES = ("full", {"name": "freeze", "last_n_blocks": 1}, {"name": "lora", "r": 4})


@pytest.mark.parametrize("technique", TECHNIQUES, ids=("full", "freeze", "lora"))
def test_a_run_leaves_what_the_interface_says(technique: Any, recipe_of: Any, tmp_path: Path) -> None:
    result = tunesmith.train(recipe_of(technique=technique))
    folder = tmp_path / "run"
    left = {path.name for path in folder.iterdir()}
    whole = {"recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "README.md", "report.html"}
    assert left == whole | ({"adapter", "base"} if result["technique"] == "lora" else {"model"})
    about = json.loads((folder / "run.json").read_text())
    assert about["outcome"] == "done" and about["metrics"] == result["metrics"]
    assert set(result["metrics"]) == {"validation", "baseline"}
    assert result["steps"] == 6 and 0 < result["trainable_parameters"] <= result["total_parameters"]


def test_the_same_recipe_gives_the_same_bits(recipe_of: Any, tmp_path: Path) -> None:
    losses = []
    for name in ("a", "b"):
        tunesmith.train(recipe_of(output=str(tmp_path / name)))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 6
    first, second = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_a_resume_keeps_the_command_that_began_the_run(
    recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tunesmith", "train", "my.yaml"])
    tunesmith.train(recipe_of("train.max_steps=1", "train.epochs=null"))
    monkeypatch.setattr(sys, "argv", ["tunesmith", "train", "--resume", "run"])
    tunesmith.train(resume=tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["command"] == "tunesmith train my.yaml" and about["resume"].endswith(f"train --resume {tmp_path}/run")
    assert "- command: `tunesmith train my.yaml`\n" in (tmp_path / "run" / "README.md").read_text()
    (tmp_path / "run" / "run.json").write_bytes(b"")
    tunesmith.train(resume=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "done", "a power cut has spoilt it"


def test_the_card_of_a_moved_run_has_the_recipe_of_its_folder(recipe_of: Any, tmp_path: Path) -> None:
    tunesmith.train(recipe_of("train.max_steps=1", "train.epochs=null"))
    (tmp_path / "run").rename(tmp_path / "moved")
    tunesmith.train(resume=tmp_path / "moved")
    written = (tmp_path / "moved" / "recipe.yaml").read_text()
    assert f"output: {tmp_path}/moved\n" in written
    assert f"```yaml\n{written}```\n" in (tmp_path / "moved" / "README.md").read_text()


REFUSED = {
    "no data": {"data": {"train": "none.csv"}},
    "no model": {"model": "./none"},
    "a value found late": {"data": {"max_length": 10**6}},
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_run_refused_before_it_began_leaves_nothing(
    why: str, recipe_of: Any, reviews_csv: Path, tmp_path: Path
) -> None:
    values = REFUSED[why] | {"data": {"train": str(reviews_csv)} | REFUSED[why].get("data", {})}
    with pytest.raises(UserError):
        tunesmith.train(recipe_of(**values, output=str(tmp_path / "mine" / "runs" / "new")))
    assert not (tmp_path / "mine").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError):
        tunesmith.train(recipe_of(**values, output=str(tmp_path / "mine")))
    assert list((tmp_path / "mine").iterdir()) == [], "a folder of the user's stays, without our lock"
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not empty"):
        tunesmith.train(recipe_of(**values, output=str(tmp_path / "mine")))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
