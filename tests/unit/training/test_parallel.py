from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

import tunesmith
from tunesmith import registry
from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe
from tunesmith.techniques import Technique
from tunesmith.training import parallel

# 48 rows: with batches of 7 the parts are unequal; with batches of 47 the second process has none in every second step.
# Adam turns the rounding error of a nearly zero gradient into a full step, so all weights are compared under SGD.
JOBS: dict[str, dict[str, Any]] = {
    "unequal shares": {"technique": "full", "optimizer": "sgd", "batch_size": 7},
    "an empty share": {"technique": "lora", "optimizer": "adamw", "batch_size": 47},
    "out of memory": {"technique": "full", "optimizer": "sgd", "batch_size": 7, "out_of_memory": 2},
    "augmented": {
        "technique": "full",
        "optimizer": "sgd",
        "batch_size": 7,
        "augment": "[typos, word-swap, word-dropout]",
    },
}

TECHNIQUES: dict[str, dict[str, Any]] = {
    f"{name} {keys}": {"name": name, **keys}
    for name in registry.names("technique")
    for variants in [cast(type[Technique], registry.get("technique", name)).variants()]
    for keys in (variants[0], variants[-1])
}


def _recipe(job: dict[str, Any], build: Any, output: Path) -> Recipe:
    settings = [f"train.{name}={job[name]}" for name in ("optimizer", "batch_size")]
    settings += ["train.epochs=null", "train.max_steps=12", "data.class_weights=balanced"]
    settings += [f"data.augment={job.get('augment', 'null')}"]  # 12 steps reach the second epoch
    recipe: Recipe = build(*settings, technique=job["technique"], output=str(output))
    return recipe


def _run_two(jobs: list[dict[str, Any]]) -> None:
    script = Path(__file__).with_name("two_processes.py")
    done = subprocess.run([sys.executable, str(script), json.dumps(jobs)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def _result(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    (weights,) = folder.glob("*/*model.safetensors")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(weights), [line["loss"] for line in lines if "loss" in line]


def _two_are_one(jobs: dict[str, dict[str, Any]], build: Any, folder: Path) -> None:
    both = []
    for name, job in jobs.items():
        tunesmith.train(_recipe(job, build, folder / name / "one"))
        both.append(job | {"recipe": _recipe(job, build, folder / name / "two").dump()})
    _run_two(both)
    for name in jobs:
        (one, losses), (two, losses_of_two) = _result(folder / name / "one"), _result(folder / name / "two")
        assert len(losses) == len(losses_of_two) == 12, "one line a step, by one process"
        assert losses_of_two == pytest.approx(losses, abs=1e-6), name
        for weight in one:
            assert torch.allclose(one[weight], two[weight], atol=1e-6, rtol=0), (name, weight)


def test_two_processes_are_one(recipe_of: Any, tmp_path: Path) -> None:
    _two_are_one(JOBS, recipe_of, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TECHNIQUES)
def test_two_processes_are_one_under_every_technique(name: str, recipe_of: Any, tmp_path: Path) -> None:
    job = {"technique": TECHNIQUES[name], "optimizer": "sgd", "batch_size": 7}
    _two_are_one({name: job}, recipe_of, tmp_path)


WRONG: dict[str, tuple[dict[str, str], str]] = {
    "a rank alone": ({"RANK": "0"}, "RANK=0 without WORLD_SIZE"),
    "a local rank alone": ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 without WORLD_SIZE"),
    "no number": ({"RANK": "x"}, "RANK=x "),
    "no number among two": ({"RANK": "0", "LOCAL_RANK": "-1", "WORLD_SIZE": "2"}, "LOCAL_RANK=-1 "),
    "beyond the world": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_ranks_that_make_no_group_are_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, said = WRONG[case]
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(variable, given.get(variable, ""))
    with pytest.raises(RecipeError) as caught, parallel.group("cpu"):
        pass
    assert said in str(caught.value) and caught.value.exit_code == 2


def test_one_process_by_torchrun_is_a_single_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(variable, value)
    with parallel.group("cpu"):
        assert (parallel.rank(), parallel.world_size()) == (0, 1)


def test_two_processes_agree_on_what_to_resume_from(recipe_of: Any, tmp_path: Path) -> None:
    recipe = _recipe(JOBS["unequal shares"], recipe_of, tmp_path / "run").dump()
    _run_two([{"recipe": recipe}])
    expected, losses = _result(tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    (newest / "learned.safetensors").write_bytes(b"")
    _run_two([{"recipe": recipe, "resume": str(tmp_path / "run")}])
    weights, losses_again = _result(tmp_path / "run")
    assert newest.with_name(f"{newest.name}.corrupt").is_dir() and losses_again == losses
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
