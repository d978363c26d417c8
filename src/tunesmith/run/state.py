"""The state of one run: what is trained, how far training has come, and where it is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.console import Console
from tunesmith.recipe import Recipe
from tunesmith.run.prepare import Prepared
from tunesmith.training import loop


@dataclass
class TrainState:
    """The changing state of a run apart from tensors, saved in each checkpoint."""

    step: int = 0
    best: float | None = None
    """Best validation score so far."""
    best_loss: float | None = None
    """Validation loss of the best step; it decides between equal scores."""
    best_step: int | None = None
    stale: int = 0
    """Evaluations since the last improvement."""
    skips: int = 0
    """Steps skipped for a loss or gradient that is not finite."""
    seconds: float = 0.0
    examples: int = 0
    cost: int = 0
    """Cost of the examples, in the units of the task (tokens, pixels)."""
    loss_sum: float = 0.0
    """Sum of the losses since the last evaluation, over resumed runs too."""
    loss_steps: int = 0
    threads: int = 0
    max_examples: int = 0
    checkpointing: bool = False
    fp16_scale: float = loop.FP16_SCALE
    fp16_good_steps: int = 0
    overridden: list[str] = field(default_factory=list)
    before: dict[str, Any] | None = None
    """Scores of the base before training, by split; only for tasks whose head the base has."""
    said_before: dict[str, str] = field(default_factory=dict)
    """Answers of the base to some validation rows, by row number."""


@dataclass
class Run:
    """One run during training."""

    prepared: Prepared
    engine: loop.Engine
    state: TrainState
    folder: Path
    console: Console

    @property
    def recipe(self) -> Recipe:
        """The recipe with every value filled in."""
        return self.prepared.recipe

    @property
    def metric(self) -> str:
        """The metric that selects the best checkpoint."""
        assert self.recipe.train.metric is not None, "assemble fills it in"
        return self.recipe.train.metric
