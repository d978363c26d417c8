"""One run from recipe to folder, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tunesmith

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
