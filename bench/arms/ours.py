"""tunesmith by its public API."""

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

train = tunesmith.train  # named here, so that all it needs is imported before anything is measured
for task in registry.names("task"):
    registry.get("task", task)
LIBRARIES = ("tunesmith", "torch", "transformers")
NEVER = 10**9
TOLD: dict[str, dict[str, Any]] = {
    "text-generation": {"general": "none"},
    "translation": {"source_lang": "en", "target_lang": "de"},
}


class Timed(Console):
    """Keeps silent, and times what comes between the last news before the loop and its last step.

    What a technique computes once before it learns from it (what frozen blocks give) is inside: the peer computes that
    while it trains. What is saved is not.
    """

    def __init__(self) -> None:
        super().__init__(level=-1, to_stderr=True)
        self.taken = Clock()

    def say(self, text: str) -> None:
        """All that is said before the loop is of getting ready."""
        self.taken.start()

    @contextlib.contextmanager
    def during(self, text: str) -> Iterator[None]:
        """Nothing is news here."""
        yield

    @contextlib.contextmanager
    def progress(
        self, total: int, done: int = 0, *, of: str = "training", unit: str = "step"
    ) -> Iterator[Callable[[int, str], None]]:
        """Stops after the last step, before what is saved."""
        yield lambda completed, text: self.taken.stop() if completed == total else None


def keywords(job: dict[str, Any], output: str) -> dict[str, Any]:
    """The job as `tunesmith.train` is told of it: no validation, nothing saved before the end."""
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
    """One run into a folder that is thrown away, and with it what was cached: every run is the first of its kind."""
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
