"""Two processes: if one ends, so does the other within seconds; both resume from the last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import STOP, Forks
from outcome import differences, result

KILL = STOP | {"signals": ["SIGKILL"]}


@pytest.fixture(scope="module")
def two(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Result of an undisturbed run of two processes."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = forks.train(folder, world=2)
    assert done.code == [0, 0], done.err
    return result(folder)


@pytest.mark.parametrize("rank", (1, pytest.param(0, marks=pytest.mark.slow)))
def test_one_that_is_killed_ends_the_other(rank: int, forks: Forks, two: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = forks.train(folder, world=2, fault=KILL | {"rank": rank})
    assert sorted(done.code) == [-9, 4] and done.code[rank] == -9 and done.seconds < 10
    assert "error: another process " in done.err
    resumed = forks.resume(folder, world=2)
    assert resumed.code == [0, 0], resumed.err
    assert differences(result(folder), two) == []


@pytest.mark.slow
def test_a_signal_to_one_stops_all(forks: Forks, two: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = forks.train(folder, world=2, fault=STOP | {"rank": 1})
    assert done.code == [75, 75], done.err
    assert json.loads((folder / "checkpoints" / "last.json").read_text())["step"] == 6
    assert forks.resume(folder, world=2).code == [0, 0]
    assert differences(result(folder), two) == []


@pytest.mark.slow
def test_what_fails_in_one_ends_all(forks: Forks, two: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = {"name": "fail_writing", "folder": str(folder / "checkpoints"), "nth": 12, "code": 28}
    done = forks.train(folder, world=2, fault=fault)
    assert done.code == [4, 4], done.err
    assert os.strerror(28).lower() in done.err and "another process " in done.err
    assert forks.resume(folder, world=2).code == [0, 0]
    assert differences(result(folder), two) == []


def test_one_process_goes_on_with_what_two_began(forks: Forks, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert forks.train(folder, world=2, fault=STOP).code == [75, 75]
    done = forks.resume(folder, "--override", "world_size")
    assert done.code == [0], done.err
    ours, expected = result(folder)["losses"], undisturbed["losses"]
    assert [step for step, _ in ours] == [step for step, _ in expected]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in expected], abs=1e-4)


WRONG = {
    "RANK is missing": ({"WORLD_SIZE": "2"}, 4, "2 processes ", "torchrun"),
    "no number": ({"WORLD_SIZE": "two"}, 2, "WORLD_SIZE=two "),
    "none": ({"WORLD_SIZE": "0"}, 2, "WORLD_SIZE=0 "),
    "no time": ({"TUNESMITH_TIMEOUT_S": "soon"}, 2, "TUNESMITH_TIMEOUT_S=soon "),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_environment_that_makes_no_group(case: str, forks: Forks, tmp_path: Path) -> None:
    environment, code, *said = WRONG[case]
    done = forks.train(tmp_path / "run", environment=environment)
    assert done.code == [code] and all(part in done.err for part in said), done.err
    assert not (tmp_path / "run").exists()


def _workers(torchrun: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("restarts", (0, 3))
def test_under_torchrun(restarts: int, forks: Forks, tmp_path: Path) -> None:
    """A killed worker ends the command within seconds; with --max-restarts and --resume it goes on by itself."""
    words, folder = (*forks.words, "train.max_steps=400"), tmp_path / "run"
    assert forks.train(tmp_path / "two", "train.max_steps=400", world=2).code == [0, 0]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command = [sys.executable, "-m", *torchrun, "-m", "tunesmith", "train", *words, f"output={folder}"]
    with subprocess.Popen([*command, f"--resume={folder}"], stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "checkpoints" / "last.json").exists():
            time.sleep(0.02)
        os.kill(_workers(process.pid)[-1], signal.SIGKILL)
        killed = time.monotonic()
        _, said = process.communicate(timeout=200)
    if not restarts:
        assert process.returncode == 1 and time.monotonic() - killed < 10, said
        assert forks.resume(folder, world=2).code == [0, 0]
    else:
        assert process.returncode == 0, said
    assert differences(result(folder), result(tmp_path / "two")) == []
    again = json.loads((folder / "run.json").read_text())["resume"]
    assert again == f"torchrun --nproc-per-node=2 -m tunesmith train --resume {folder}"
