"""tunesmith, called through its public API."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tunesmith
from bench.clock import Clock
from tunesmith import registry
from tunesmith.console import Console

train = tunesmith.train  # resolved here so that its imports are done before measuring
for task in registry.names("task"):
    registry.get("task", task)
LIBRARIES = ("tunesmith", "torch", "transformers")
NEVER = 10**9
TOLD: dict[str, dict[str, Any]] = {
    "text-generation": {"general": "none"},
    "translation": {"source_lang": "en", "target_lang": "de"},
}


class Timed(Console):
    """Silent console that measures the time from the last message before the training loop to the last step.

    Caching frozen features is included, because the peer computes them during training. Saving is not included.
    """

    def __init__(self) -> None:
        super().__init__(level=-1, to_stderr=True)
        self.taken = Clock()

    def say(self, text: str) -> None:
        """Restart the clock: messages before the training loop report preparation."""
        self.taken.start()

    @contextlib.contextmanager
    def during(self, text: str) -> Iterator[None]:
        """Print nothing."""
        yield

    @contextlib.contextmanager
    def progress(
        self, total: int, done: int = 0, *, of: str = "training", unit: str = "step"
    ) -> Iterator[Callable[[int, str], None]]:
        """Stop the clock after the last step, before saving."""
        yield lambda completed, text: self.taken.stop() if completed == total else None


def keywords(job: dict[str, Any], output: str) -> dict[str, Any]:
    """Return the arguments of `tunesmith.train` for a job: no validation, no checkpoints."""
    return {
        "task": {"name": job["task"], **TOLD.get(job["task"], {})},
        "model": job["model"],
        "data": {"train": job["data"], "validation": None, "max_length": job["max_length"]},
        "technique": job["technique"],
        "train": {
            **{key: job[key] for key in ("epochs", "batch_size", "learning_rate", "device", "precision")},
            "head_learning_rate": job["learning_rate"],
            "evaluate_every": NEVER,
            "save_every": NEVER,
        },
        "output": output,
    }


def go(job: dict[str, Any]) -> dict[str, Any]:
    """Train once in a temporary folder that includes the cache, so that no run reuses another run's cache."""
    console = Timed()
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(sys.stderr):
        os.environ["TUNESMITH_HOME"] = f"{output}/home"
        result = train(**keywords(job, f"{output}/run"), offline=True, console=console)
        about = json.loads(Path(output, "run", "run.json").read_text(encoding="utf-8"))
        lines = map(json.loads, Path(output, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        losses = [float(line["loss"]) for line in lines if "loss" in line]
    seconds = result["seconds"]
    return {
        "seconds": max(console.taken.seconds, seconds),
        "cpu_seconds": console.taken.cpu_seconds,
        "peak_bytes": console.taken.peak_bytes,
        "samples": about["data"]["rows"]["train"] * job["epochs"],
        "tokens": round(result["tokens_per_second"] * seconds),
        "learned": result["trainable_parameters"],
        "loss": statistics.fmean(losses),
        "last_loss": statistics.fmean(losses[-math.ceil(len(losses) / job["epochs"]) :]),
    }
