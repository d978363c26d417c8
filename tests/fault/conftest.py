"""Fixtures of the fault tests: commands in forked children, and a run to disturb."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import STOP, Forks
from outcome import result


@pytest.fixture(scope="session")
def forks(tiny_bert: Path, reviews_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    train = "max_steps=12 batch_size=8 learning_rate=1e-3 save_every=4 evaluate_every=4 precision=fp32 device=cpu"
    words = ["task=text-classification", "technique=full", f"model={tiny_bert}", f"data.train={reviews_csv}"]
    words += ["data.validation=0.2", *(f"train.{word}" for word in train.split())]
    work = tmp_path_factory.mktemp("forks")
    script = [sys.executable, str(Path(__file__).with_name("forks.py")), str(work)]
    home = os.environ | {"TUNESMITH_HOME": str(work / "home")}
    with subprocess.Popen(script, env=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Forks(process, tuple(words))
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="session")
def undisturbed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Result of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = forks.train(folder)
    assert done.code == [0], done.err
    return result(folder)


@pytest.fixture(scope="session")
def stopped(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that a signal stopped after step 6 of 12; to be copied."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert forks.train(folder, fault=STOP).code == [75]
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """Copy of the stopped run for one test."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))
