"""A disk that is full or fails: exit code 4 and the number of free bytes; earlier checkpoints stay usable."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import STOP, Done, Forks
from outcome import differences, result


def _check_reported(done: Done, code: int) -> None:
    assert done.code == [4], done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ") and os.strerror(code).lower() in last, done.err
    assert re.search(r"\([\d,]+ bytes free\)", last) and "resume" in last, done.err


def _fill(run: Path, nth: int, code: int = errno.ENOSPC) -> dict[str, Any]:
    return {"name": "fail_writing", "folder": str(run), "nth": nth, "code": code}


def _goes_on(run: Path, forks: Forks, undisturbed: dict[str, Any]) -> None:
    """The run resumes from the last checkpoint, and ends with the same weights."""
    done = forks.resume(run)
    assert done.code == [0] and ".corrupt" not in done.out + done.err, done.err
    assert differences(result(run), undisturbed) == []


@pytest.mark.parametrize("nth", (10, 40))
def test_a_disk_that_fills_up_at_some_write(
    nth: int, run: Path, forks: Forks, undisturbed: dict[str, Any], reviews_csv: Path
) -> None:
    before = hashlib.sha256(reviews_csv.read_bytes()).hexdigest()
    _check_reported(forks.resume(run, fault=_fill(run, nth)), errno.ENOSPC)
    _goes_on(run, forks, undisturbed)
    assert hashlib.sha256(reviews_csv.read_bytes()).hexdigest() == before


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_write(
    stopped: Path, forks: Forks, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    for nth in range(1, 1000):
        run = Path(shutil.copytree(stopped, tmp_path / str(nth)))
        done = forks.resume(run, fault=_fill(run, nth))
        if done.code == [0]:
            break
        _check_reported(done, errno.ENOSPC)
        _goes_on(run, forks, undisturbed)
    assert 40 < nth < 999, "every write is covered"


@pytest.mark.slow
@pytest.mark.parametrize("code", (errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES), ids=errno.errorcode.get)
def test_a_disk_that_fails_otherwise(code: int, run: Path, forks: Forks, undisturbed: dict[str, Any]) -> None:
    _check_reported(forks.resume(run, fault=_fill(run, 12, code)), code)
    _goes_on(run, forks, undisturbed)


@pytest.mark.parametrize("size_bytes", (60_000, pytest.param(200_000, marks=pytest.mark.slow)))
def test_a_file_that_the_system_does_not_let_grow(
    size_bytes: int, run: Path, forks: Forks, undisturbed: dict[str, Any]
) -> None:
    """The weights are 124 kB, the optimizer state twice that: one of them breaks off in the middle."""
    done = forks.resume(run, fault={"name": "limit_files", "size_bytes": size_bytes})
    _check_reported(done, errno.EFBIG)
    assert "step-000008: " in done.err
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".tmp")]
    _goes_on(run, forks, undisturbed)


def test_a_new_run_where_nothing_can_be_written(forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for nth, where in enumerate(("run: ", "run/.lock: ", "run/recipe.yaml: "), start=1):
        done = forks.train(run, fault=_fill(run, nth))
        assert done.code == [4] and f"/{where}" in done.err and os.strerror(errno.ENOSPC).lower() in done.err, done.err
    assert forks.train(run, fault=STOP).code == [75]
