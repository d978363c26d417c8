"""What would likely help a run, read off its curves: one that was too short to learn says so itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith.recipe import Train
from tunesmith.tasks import LOWER_IS_BETTER

FEW_STEPS = 100
"""More steps than these are no sign of data so small that three epochs are next to nothing; they beat a guess."""

HARDLY = 0.05
"""A loss that falls by less than this share has hardly moved: on validation from its first value to its last, where it
was scored more than once, else in training from the first quarter of the steps to the last."""

LONGER = 3


def longer(metrics: Path, train: Train, gain: float) -> str | None:
    """Advice to train longer, from `metrics.jsonl` of a run of few steps whose score still rises or whose loss has
    hardly moved, or of any that has no `gain` over a guess.
    """
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses, scores = _numbers(lines, "loss"), _numbers(lines, f"validation/{train.metric}")
    if len(losses) < 2 or (len(losses) >= FEW_STEPS and gain > 0):
        return None
    before, held_out = _numbers(lines, "before/validation/loss"), _numbers(lines, "validation/loss")
    if before and held_out and held_out[-1] > before[0]:
        return None  # more of what has done harm
    held_out = before + held_out
    quarter = max(1, len(losses) // 4)
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    if len(held_out) > 1:
        first, last = held_out[0], held_out[-1]
    best = min if train.metric in LOWER_IS_BETTER else max
    if len(scores) > 1 and best(scores) == scores[-1] and scores.count(scores[-1]) == 1:
        why = f"validation {train.metric} was best at the last evaluation"
    elif last > (1 - HARDLY) * first:
        why = f"the {'validation ' * (len(held_out) > 1)}loss has hardly moved ({first:.3f} to {last:.3f})"
    elif gain <= 0:
        why = f"{train.metric} has come no further than a guess"
    else:
        return None
    more = f"train.epochs={LONGER * train.epochs:g}" if train.epochs else f"train.max_steps={LONGER * len(losses)}"
    return f"in {len(losses)} steps {why}: training longer may help ({more})"


def _numbers(lines: list[dict[str, Any]], key: str) -> list[float]:
    """The values of a key, without those that are none (NaN is written as a word)."""
    return [line[key] for line in lines if isinstance(line.get(key), float)]
