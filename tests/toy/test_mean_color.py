"""A third-party image task works with every command; the shared packages have no code for images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.console import Console
from tunesmith.errors import RecipeError
from tunesmith.inspect_data import show as data_show
from tunesmith.run import train as running
from tunesmith.studies import score
from tunesmith.testing import check

QUIET = Console(level=-1)


@pytest.fixture
def recipe(pictures: Path, tiny_vit: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "task": "mean-color",
        "model": str(tiny_vit),
        "data": {"train": str(pictures), "validation": 0.2, "test": 0.2},
        "technique": {"name": "lora", "target_modules": "all-linear"},
        "train": {"max_steps": 30, "batch_size": 8, "precision": "fp32", "device": "cpu", "learning_rate": 1e-2},
        "output": str(tmp_path / "run"),
    }


def _losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("technique", ["full", "freeze", "lora"])
def test_it_trains_is_scored_and_answers(technique: str, recipe: dict[str, Any], pictures: Path) -> None:
    keys = {"name": "freeze", "head_only": True} if technique == "freeze" else technique
    result = tunesmith.train(recipe | {"technique": keys} if technique != "lora" else recipe, console=QUIET)
    assert result["metrics"]["test"]["accuracy"] > 0.6 > result["metrics"]["baseline"]["accuracy"]
    assert result["pixels_per_second"] > 0
    scored = score.evaluate(result["run"], data=pictures, console=QUIET)
    assert scored["examples"] == 60 and scored["metrics"]["accuracy"] > 0.6
    assert score.evaluate(result["run"], base=True, console=QUIET)["probe"]
    model = tunesmith.load(result["run"])
    answers = model.predict([str(pictures.with_name("00.png")), {"image": pictures.with_name("01.png").read_bytes()}])
    assert [set(answer) for answer in answers] == [{"label", "score", "probabilities"}] * 2
    assert (Path(result["run"]) / "report.html").exists() and (Path(result["run"]) / "README.md").exists()


def test_a_killed_run_resumes_to_the_same_bits(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["train"] |= {"max_steps": 12, "save_every": 4, "evaluate_every": 4}
    tunesmith.train(recipe | {"output": str(tmp_path / "whole")}, console=QUIET)
    save: Callable[..., None] = running._save

    def killed(run: Any) -> None:
        save(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        tunesmith.train(recipe, console=QUIET)
    monkeypatch.setattr(running, "_save", save)
    tunesmith.train(resume=recipe["output"], console=QUIET)
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")


def test_data_show_says_what_the_model_sees(recipe: dict[str, Any], pictures: Path, tiny_vit: Path) -> None:
    words = ["task=mean-color", "data.validation=null"]
    (first, *_) = data_show.show(str(pictures), words, model=str(tiny_vit), rows=2)
    assert first.preview.lines == ["picture of 16 x 16 pixels"] and first.preview.target == "red"


def test_the_contract_holds_on_a_vision_transformer(installed: None) -> None:
    check({"name": "lora", "r": 2, "target_modules": "all-linear"}, "mean-color", "vit")
    check("full", "mean-color", "vit")


def test_a_key_of_texts_is_refused_by_name(recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"data\.max_length"):
        tunesmith.train(recipe, "data.max_length=32", console=QUIET)
