"""Continued training of an adapter: it starts with the saved weights over the same base; nothing is merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import tunesmith
from tunesmith.errors import RecipeError
from tunesmith.recipe import load

STILL = ("train.epochs=null", "train.max_steps=1", "train.learning_rate=1e-12", "train.head_learning_rate=1e-12")
TECHNIQUES = ({"name": "lora", "r": 4}, {"name": "adapter"}, {"name": "prompt", "num_virtual_tokens": 3})


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda one: one["name"])
def test_it_begins_where_the_earlier_run_ended(technique: Any, recipe_of: Any, tiny_bert: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    tunesmith.train(recipe_of(technique=technique, output=str(first)))
    going_on = {"name": technique["name"], "continue": True}
    recipe = recipe_of(*STILL, model=str(first), technique=going_on, output=str(second))
    result = tunesmith.train(recipe)
    before, after = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, second))
    assert before.keys() == after.keys() and not (first / "model").exists()
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)
    texts = ["a great film", "so dull"]
    answers = [tunesmith.load(run).predict(texts) for run in (first, second)]
    assert [one["label"] for one in answers[0]] == [one["label"] for one in answers[1]]
    kept, about = load(second / "recipe.yaml"), json.loads((second / "run.json").read_text())
    assert kept.model == str(tiny_bert) and not kept.continues
    assert kept.technique == load(first / "recipe.yaml").technique
    (earlier,) = about["model"]["lineage"]
    assert (earlier["run"], earlier["model"]["spec"]) == (str(first), str(tiny_bert))
    assert tunesmith.train(resume=second)["metrics"] == result["metrics"]
    assert json.loads((second / "run.json").read_text())["model"]["lineage"] == [earlier]


def test_what_does_not_fit_is_refused(recipe_of: Any, tmp_path: Path) -> None:
    run, three = tmp_path / "run", tmp_path / "three.csv"
    tunesmith.train(recipe_of(technique="adapter"))
    three.write_text("text,label\n" + "".join(f"film {n},{'abc'[n % 3]}\n" for n in range(24)))

    def refused(said: str, **values: Any) -> None:
        given = {"model": str(run), "technique": {"name": "adapter", "continue": True}, "output": str(tmp_path / "new")}
        with pytest.raises(RecipeError, match=said):
            tunesmith.train(recipe_of(**given | values))

    refused("adapter cannot be merged: .*technique={name: adapter, continue: true}", technique="full")
    refused("used adapter, not lora; technique={name: adapter, continue: true}",
            technique={"name": "lora", "continue": True})  # fmt: skip
    refused("reduction_factor was 16.0, not 4.0; leave technique.reduction_factor out",
            technique={"name": "adapter", "reduction_factor": 4, "continue": True})  # fmt: skip
    refused("the run's head .* does not fit", data={"train": str(three), "validation": None})
    refused("no run with an adapter", model=str(tmp_path))
    with pytest.raises(RecipeError, match="technique.continue: .*true or false.*'yes'"):
        recipe_of(technique={"name": "lora", "continue": "yes"})
