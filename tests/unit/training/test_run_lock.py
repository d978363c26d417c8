"""The lock of a run folder makes the folder, and takes it along where nothing was put into it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tunesmith.errors import CheckpointError
from tunesmith.training.run_lock import RunLock


def test_what_was_put_into_the_folder_stays(tmp_path: Path) -> None:
    with RunLock(tmp_path / "runs" / "a"), RunLock(tmp_path / "runs" / "b"):
        (tmp_path / "runs" / "b" / "run.json").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "runs", "runs/b", "runs/b/run.json",
    ]  # fmt: skip


def test_who_is_refused_takes_nothing_from_who_holds_it(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        with pytest.raises(CheckpointError, match="in use by process"), RunLock(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run").exists()


def test_many_that_come_and_go_at_once(tmp_path: Path) -> None:
    """One removes the folder between another's making it and its lock: that one makes it again."""
    failed: list[BaseException] = []

    def come_and_go() -> None:
        for _ in range(200):
            try:
                with RunLock(tmp_path / "run"):
                    pass
            except CheckpointError:
                continue
            except BaseException as error:  # noqa: BLE001 - whatever it is, the test shows it
                failed.append(error)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and not (tmp_path / "run" / ".lock").exists()
