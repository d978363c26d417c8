from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tunesmith
from tunesmith.recipe import Recipe

# 48 rows: with 7 at a time shares are unequal, with 47 the second process has no share of every second step.
# Adam makes a full step of the rounding of a gradient that is nearly zero, so all weights are compared under SGD.
JOBS: dict[str, dict[str, Any]] = {
    "unequal shares": {"technique": "full", "optimizer": "sgd", "batch_size": 7},
    "an empty share": {"technique": "lora", "optimizer": "adamw", "batch_size": 47},
    "out of memory": {"technique": "full", "optimizer": "sgd", "batch_size": 7, "out_of_memory": 2},
}


def _recipe(job: dict[str, Any], build: Any, output: Path) -> Recipe:
    settings = [f"train.{name}={job[name]}" for name in ("optimizer", "batch_size")]
    settings += ["train.epochs=null", "train.max_steps=12", "data.class_weights=balanced"]
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


def test_two_processes_are_one(recipe_of: Any, tmp_path: Path) -> None:
    jobs = []
    for name, job in JOBS.items():
        tunesmith.train(_recipe(job, recipe_of, tmp_path / name / "one"))
        jobs.append(job | {"recipe": _recipe(job, recipe_of, tmp_path / name / "two").dump()})
    _run_two(jobs)
    for name in JOBS:
        (one, losses), (two, losses_of_two) = _result(tmp_path / name / "one"), _result(tmp_path / name / "two")
        assert len(losses) == len(losses_of_two) == 12, "one line a step, by one process"
        assert losses_of_two == pytest.approx(losses, abs=1e-6), name
        for weight in one:
            assert torch.allclose(one[weight], two[weight], atol=1e-6, rtol=0), (name, weight)


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
