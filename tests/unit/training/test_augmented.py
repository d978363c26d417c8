"""Runs with augmentation in each epoch: reproducible, equal after a resume, and errors with their key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.console import Console
from tunesmith.errors import RecipeError
from tunesmith.recipe import load
from tunesmith.recipe.starter import schema

CHANGES = "data.augment=[{name: word-dropout, probability: 0.3}, {name: typos}]"


def _losses(recipe: Any, *words: str) -> list[float]:
    tunesmith.train(recipe, *words, overwrite=True, console=Console(level=-1))
    lines = Path(recipe.output, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_epochs_differ_runs_do_not_and_a_resume_goes_on_bit_for_bit(recipe_of: Any, home: Path) -> None:
    recipe = recipe_of(CHANGES, "train.epochs=2", "data.validation=null")
    whole = _losses(recipe)
    assert whole == _losses(recipe) != _losses(recipe_of("train.epochs=2", "data.validation=null"))
    for step in (3, 11):  # in the first epoch of eight steps, and in the second
        _losses(
            recipe, f"train.max_steps={step}", "train.epochs=null", "train.schedule=constant", "train.warmup_ratio=0"
        )
        longer = ("train.max_steps=14", "train.epochs=null", "train.schedule=constant", "train.warmup_ratio=0")
        tunesmith.train(recipe, *longer, resume=recipe.output, override=["train.max_steps"], console=Console(level=-1))
        weights = Path(recipe.output, "model", "model.safetensors").read_bytes()
        _losses(recipe, *longer)
        assert Path(recipe.output, "model", "model.safetensors").read_bytes() == weights
    assert not list(home.glob("encoded/.augmented-*")), "what an epoch was encoded into is removed"


@pytest.mark.parametrize(
    ("given", "said"),
    (
        ("[{name: word-drop}]", "data.augment: unknown name 'word-drop'; did you mean 'word-dropout'"),
        ("[{name: typos, probability: 0}]", "data.augment: must be above 0"),
        ("[{name: typos, chance: 0.1}]", "data.augment: unknown key 'chance'"),
        ("[{name: synonyms}]", "synonyms needs file; "),
        ("[{name: back-translation}]", "back-translation needs runs; .*runs: [runs/en-de"),
        ("[{name: typos, file: x.txt}]", "typos .*no key file; "),
        ("typos", "data.augment: must be a list"),
    ),
)
def test_what_cannot_be_meant_is_refused(given: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said.replace("[", r"\[")):
        load(None, ["task=text-classification", "model=x", f"data.augment={given}"])


def test_the_schema_knows_it() -> None:
    alone, keys = schema()["$defs"]["Augmentation"]["anyOf"]
    assert (
        alone["enum"]
        == keys["properties"]["name"]["enum"]
        == ["word-dropout", "word-swap", "typos", "synonyms", "back-translation"]
    )
    short, long = (
        load(None, ["task=text-classification", "model=x", f"data.augment={given}"])
        for given in ("[typos]", "[{name: typos}]")
    )
    assert short.data == long.data


def test_it_is_shown(command: Any, tiny_bert: Path, reviews_csv: Path) -> None:
    words = ("data", "show", str(reviews_csv), "--model", str(tiny_bert), "-n", "1", "--augmented")
    code, out, _ = command(*words, CHANGES)
    assert code == 0 and out.count(" in epoch ") == 3 and out.count("target:") == 4
    code, _, err = command(*words)
    assert code == 2 and "data.augment is not set" in err
