from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tunesmith

RUN = "import json, sys, tunesmith; tunesmith.train(json.loads(sys.argv[1]))"


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _run_two(recipe: dict[str, Any]) -> None:
    """The run in two processes, with the variables that torchrun sets."""
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port())}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, json.dumps(recipe)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors[-2000:]


def _result(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    (weights,) = folder.glob("*/*model.safetensors")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(weights), [line["loss"] for line in lines if "loss" in line]


# Adam makes a full step of the rounding of a gradient that is nearly zero, so all weights are compared under SGD.
@pytest.mark.parametrize(("technique", "optimizer"), (("full", "sgd"), ("lora", "adamw")))
def test_two_processes_are_one(technique: str, optimizer: str, recipe_of: Any, tmp_path: Path) -> None:
    settings = ("train.epochs=null", "train.max_steps=12", "train.batch_size=7", "data.class_weights=balanced")
    recipe = recipe_of(*settings, f"train.optimizer={optimizer}", technique=technique)
    tunesmith.train(recipe, output=str(tmp_path / "one"))
    _run_two(recipe.dump() | {"output": str(tmp_path / "two")})
    (one, losses), (two, losses_of_two) = _result(tmp_path / "one"), _result(tmp_path / "two")
    assert len(losses) == len(losses_of_two) == 12, "one line a step, by one process"
    for alone, together in zip(losses, losses_of_two, strict=True):
        assert abs(alone - together) < 1e-6
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-6, rtol=0), name
