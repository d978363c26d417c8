"""Hints for longer training: given for short runs that still improve, and only for those."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tunesmith.insight import hints
from tunesmith.recipe import Train

FALLS = [0.7, 0.6, 0.5, 0.4]
STAYS = [0.7, 0.69, 0.7, 0.69]
RISES, FELL, LEVEL = [0.5, 0.6], [0.6, 0.5], [0.6, 0.6]
EPOCHS, STEPS = {"epochs": 3.0, "metric": "accuracy"}, {"max_steps": 4, "metric": "accuracy"}


@pytest.mark.parametrize(
    ("losses", "scores", "train", "said"),
    (
        (FALLS, RISES, EPOCHS, r"\b4 steps .*accuracy .*improving.*train\.epochs=9\b"),
        (FALLS, RISES, STEPS, r"train\.max_steps=12\b"),
        (STAYS, FELL, EPOCHS, r"\b4 steps .*\bloss .*0\.700 to 0\.690.*train\.epochs=9\b"),
        (STAYS, [], EPOCHS, r"train\.epochs=9\b"),
        (FALLS, FELL, EPOCHS, None),
        (FALLS, FELL, EPOCHS | {"gain": 0.0}, r"accuracy .*baseline.*train\.epochs=9\b"),
        (FALLS, LEVEL, EPOCHS, None),
        (FALLS, FELL, EPOCHS | {"metric": "loss"}, r"validation loss .*improving"),
        (FALLS, [0.5], EPOCHS, None),
        (FALLS * 25, RISES, EPOCHS, None),
        (["nan"] * 4, [], EPOCHS, None),
        (FALLS, [0.5, "nan", 0.6], EPOCHS, r"improving.*train\.epochs"),
        ([], [], EPOCHS, None),
    ),
)
def test_when_more_epochs_are_advised(
    losses: list[float | str], scores: list[float | str], train: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    train = {"gain": 0.1} | train
    gain = train.pop("gain")
    lines: list[dict[str, object]] = [{"loss": loss} for loss in losses]
    lines += [{f"validation/{train['metric']}": score} for score in scores]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = hints.longer(tmp_path / "metrics.jsonl", Train.model_validate(train), gain)
    assert found is None if said is None else found is not None and re.search(said, found)


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        ([2.0, 1.99, 1.98], r"validation loss .*2\.000 to 1\.980.*train\.epochs=9\b"),
        ([2.0, 1.5], None),
        ([2.0, 2.1], None),
    ],
)
def test_what_is_held_out_says_whether_the_loss_has_moved(
    held_out: list[float], said: str | None, tmp_path: Path
) -> None:
    lines: list[dict[str, object]] = [{"loss": loss} for loss in STAYS]
    lines += [{"before/validation/loss": held_out[0]}, *({"validation/loss": loss} for loss in held_out[1:])]
    lines += [{"validation/accuracy": score} for score in FELL]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = hints.longer(tmp_path / "metrics.jsonl", Train.model_validate(EPOCHS), 0.1)
    assert found is None if said is None else found is not None and re.search(said, found)
