"""A signal at any moment of a run: exit code 75, at most one more step, and the resumed run has the same result."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import Forks
from outcome import differences, result

MOMENTS = {
    "reading": (1, None),
    "loading": (1, None),
    "forward": (6, 6),
    "optimizer": (6, 6),
    "evaluation": (2, 8),
    "saving": (3, 9),
    "pointing": (3, 9),
    "rotating": (2, 9),
    "artefact": (1, 12),
    "final scores": (1, 12),
    "report": (1, 12),
}
"""Moment -> its number, and the step of the last checkpoint (None: the run had not started)."""

FAST = {("forward", "SIGTERM"), ("saving", "SIGINT")}
CASES = [
    pytest.param(moment, signal, id=f"{moment}-{signal}", marks=() if (moment, signal) in FAST else pytest.mark.slow)
    for moment in MOMENTS
    for signal in ("SIGTERM", "SIGINT")
]


def _step_saved(folder: Path) -> int:
    return int(json.loads((folder / "checkpoints" / "last.json").read_text())["step"])


@pytest.mark.parametrize(("moment", "signal"), CASES)
def test_a_run_stopped_at_any_moment(
    moment: str, signal: str, forks: Forks, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    folder, (at, saved) = tmp_path / "run", MOMENTS[moment]
    stopped = forks.train(folder, fault={"name": "send", "signals": [signal], "moment": moment, "at": at})
    assert stopped.code == [75], stopped.err
    if saved is None:
        assert f"stopped by {signal}; " in stopped.err and "--resume" not in stopped.err
        resumed = forks.train(folder)
    else:
        assert stopped.err.endswith(f": tunesmith train --resume {folder}\n")
        assert _step_saved(folder) == saved and not (folder / ".lock").exists()
        resumed = forks.resume(folder)
    assert resumed.code == [0], resumed.err
    assert differences(result(folder), undisturbed) == []


def test_the_second_signal_stops_at_once(forks: Forks, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    folder, at = tmp_path / "run", MOMENTS["forward"][0]
    fault = {"name": "send", "signals": ["SIGTERM", "SIGTERM"], "moment": "forward", "at": at}
    stopped = forks.train(folder, fault=fault)
    assert stopped.code == [128 + 15] and _step_saved(folder) == 4
    assert forks.resume(folder).code == [0], "the stale lock is taken over"
    assert differences(result(folder), undisturbed) == []


@pytest.mark.slow
def test_a_scheduler_stops_the_command_itself(forks: Forks, tmp_path: Path) -> None:
    """The real command in its own process, with the signal at an arbitrary moment."""
    command = [sys.executable, "-m", "tunesmith", "train", *forks.words, f"output={tmp_path / 'run'}"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen([*command, "train.max_steps=100000"], stderr=subprocess.PIPE, text=True) as process:
        while not metrics.exists():
            time.sleep(0.05)
        before = len(metrics.read_text().splitlines())
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 75 and f": tunesmith train --resume {tmp_path / 'run'}" in said
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert _step_saved(tmp_path / "run") == lines[-1]["step"] >= before - 1
