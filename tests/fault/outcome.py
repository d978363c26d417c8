"""What a run ended with, to be compared bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def result(folder: Path) -> dict[str, Any]:
    """All that must not depend on what happened: weights, optimizer, and each step's loss."""
    found: dict[str, Any] = {"files": sorted(path.name for path in folder.iterdir())}
    last = json.loads((folder / "checkpoints" / "last.json").read_text())["folder"]
    kept = sorted((folder / "checkpoints" / last).glob("*.safetensors"))
    for path in (*kept, *sorted(folder.glob("adapter/*.safetensors")), *sorted(folder.glob("model/*.safetensors"))):
        found |= {f"{path.name}/{name}": tensor for name, tensor in load_file(path).items()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["losses"] = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    found["scores"] = [line for line in lines if "validation/loss" in line]
    return found


def differences(ours: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The names of what is not the same, bit for bit."""
    names = sorted(ours.keys() ^ expected.keys())
    for name in ours.keys() & expected.keys():
        a, b = ours[name], expected[name]
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        names += [] if same else [name]
    return names
