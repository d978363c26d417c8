"""Result of a run, to be compared bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def result(folder: Path) -> dict[str, Any]:
    """Return everything that must not depend on faults: weights, optimizer state, and the loss of each step."""
    values: dict[str, Any] = {"files": sorted(path.name for path in folder.iterdir())}
    last = json.loads((folder / "checkpoints" / "last.json").read_text())["folder"]
    kept = sorted((folder / "checkpoints" / last).glob("*.safetensors"))
    for path in (*kept, *sorted(folder.glob("adapter/*.safetensors")), *sorted(folder.glob("model/*.safetensors"))):
        values |= {f"{path.name}/{name}": tensor for name, tensor in load_file(path).items()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values["losses"] = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    values["scores"] = [line for line in lines if "validation/loss" in line]
    return values


def differences(ours: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of the values that differ in any bit."""
    names = sorted(ours.keys() ^ expected.keys())
    for name in ours.keys() & expected.keys():
        a, b = ours[name], expected[name]
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        names += [] if same else [name]
    return names
