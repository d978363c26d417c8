"""Hints from the training curves of a run: whether longer training may help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith.recipe import Train
from tunesmith.tasks import LOWER_IS_BETTER

SHORT_RUN_STEPS = 100
"""Below this number of steps, the default of three epochs may be too short for the data."""

MIN_LOSS_DECREASE = 0.05
"""Relative decrease below which a loss has hardly changed: of the validation loss from its first to its last value if
there are several, else of the mean training loss from the first quarter of the steps to the last."""

LONGER = 3
"""Factor of the suggested training length."""


def longer(metrics: Path, train: Train, gain: float) -> str | None:
    """Return a hint to train longer, or None.

    The hint is for a short run whose score still improves or whose loss has hardly decreased, and for any run without a
    `gain` over the baseline. `metrics` is the path of `metrics.jsonl`.
    """
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses, scores = _numbers(lines, "loss"), _numbers(lines, f"validation/{train.metric}")
    if len(losses) < 2 or (len(losses) >= SHORT_RUN_STEPS and gain > 0):
        return None
    before, held_out = _numbers(lines, "before/validation/loss"), _numbers(lines, "validation/loss")
    if before and held_out and held_out[-1] > before[0]:
        return None  # training has increased the loss
    held_out = before + held_out
    quarter = max(1, len(losses) // 4)
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    if len(held_out) > 1:
        first, last = held_out[0], held_out[-1]
    best = min if train.metric in LOWER_IS_BETTER else max
    if len(scores) > 1 and best(scores) == scores[-1] and scores.count(scores[-1]) == 1:
        why = f"validation {train.metric} was still improving"
    elif last > (1 - MIN_LOSS_DECREASE) * first:
        why = f"the {'validation ' * (len(held_out) > 1)}loss has hardly decreased ({first:.3f} to {last:.3f})"
    elif gain <= 0:
        why = f"{train.metric} is no better than the baseline"
    else:
        return None
    more = f"train.epochs={LONGER * train.epochs:g}" if train.epochs else f"train.max_steps={LONGER * len(losses)}"
    return f"after {len(losses)} steps {why}: longer training may help ({more})"


def _numbers(lines: list[dict[str, Any]], key: str) -> list[float]:
    """Return the finite values of a key (NaN is written as a string)."""
    return [line[key] for line in lines if isinstance(line.get(key), float)]
