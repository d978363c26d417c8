from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.testing import sample_row

OTHERS = [pytest.param(task, marks=pytest.mark.slow) for task in ("fill-mask", "token-classification")]


@pytest.mark.parametrize("task", ["text-classification", *OTHERS])
def test_killed_runs_end_with_the_weights_of_undisturbed_ones(task: str, tiny_bert: Path, tmp_path: Path) -> None:
    trials = os.environ.get("TUNESMITH_TRIALS", "4")
    rows = [json.dumps(sample_row(task, number)) + "\n" for number in range(60)]
    (data := tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).with_name("trials.py"))]
    command += [str(tiny_bert), str(data), str(tmp_path), "--trials", trials, "--task", task]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["failures"] == [] and done.returncode == 0, (summary, done.stderr[-3000:])
    assert summary["trials"] == int(trials) and summary["kills"] >= int(trials) / 2  # a run may end before its kill
