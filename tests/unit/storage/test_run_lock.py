"""The lock of a run folder: exclusive, taken over from an ended process, and refused where it is no lock file."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import CheckpointError, ResourceError
from tunesmith.storage import run_lock
from tunesmith.storage.files import make_folder
from tunesmith.storage.run_lock import RunLock


def _lock(folder: Path, **keys: Any) -> Path:
    """Write the lock of a process that has ended, with some keys replaced."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    holder = {"pid": int(done.stdout), "started": "1", "host": socket.gethostname()}
    path = folder / ".lock"
    path.write_text(json.dumps(holder | keys))
    return path


def test_the_folder_is_kept_if_it_is_not_empty(tmp_path: Path) -> None:
    with RunLock(tmp_path / "runs" / "a"), RunLock(tmp_path / "runs" / "b"):
        (tmp_path / "runs" / "b" / "run.json").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "runs", "runs/b", "runs/b/run.json",
    ]  # fmt: skip


def test_a_second_run_is_refused_and_the_first_keeps_its_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        with pytest.raises(CheckpointError, match=f"process {os.getpid()}") as caught, RunLock(tmp_path / "run"):
            pass
        assert caught.value.where == str(tmp_path / "run" / ".lock")
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["ended", "", "\0\0\0\0"])
def test_a_stale_lock_is_taken_over(content: str, tmp_path: Path) -> None:
    path = _lock(tmp_path)
    if content != "ended":
        path.write_text(content)
    with RunLock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_lock_of_another_host_is_refused(tmp_path: Path) -> None:
    path = _lock(tmp_path, host="elsewhere")
    with pytest.raises(CheckpointError, match="on elsewhere"), RunLock(tmp_path):
        pass
    assert path.exists()


def test_a_lock_that_was_replaced_by_hand_is_not_removed(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        path = _lock(tmp_path, host="elsewhere")
    assert path.exists()


NOT_LOCKS: dict[str, Callable[[Path], Any]] = {
    "dangling link": lambda path: path.symlink_to("/nowhere/x"),
    "link to a lock": lambda path: path.symlink_to(_lock(path.parent).rename(path.with_name("real"))),
    "link to itself": lambda path: path.symlink_to(path),
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "text": lambda path: path.write_text("held\n"),
    "binary": lambda path: path.write_bytes(bytes(range(128, 256))),
    "JSON array": lambda path: path.write_text("[1]"),
    "JSON without keys": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("kind", NOT_LOCKS)
def test_what_is_not_a_lock_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    NOT_LOCKS[kind](path)
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught, RunLock(tmp_path):
        pass
    assert time.monotonic() - began < 1
    assert caught.value.where == str(path) and caught.value.exit_code == 6
    assert os.path.lexists(path)


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_that_is_a_dangling_link_is_refused(inside: bool, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/nowhere/x")
    folder = tmp_path / "link" / "run" if inside else tmp_path / "link"
    with pytest.raises(ResourceError) as caught, RunLock(folder):
        pass
    assert caught.value.where == str(folder)


def test_a_removed_working_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    for folder in (Path("."), Path("run")):
        with pytest.raises(ResourceError), RunLock(folder):
            pass


def test_a_lock_removed_before_it_is_written_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow process: another one takes its empty lock for that of a crash."""
    own, calls = run_lock._try_flock, [0]

    def slow(handle: int) -> bool:
        calls[0] += 1
        if calls[0] == 1:
            (tmp_path / ".lock").unlink()
        return own(handle)

    monkeypatch.setattr(run_lock, "_try_flock", slow)
    with RunLock(tmp_path) as lock:
        assert calls[0] == 2 and lock.path.exists()


def test_without_flock_an_empty_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_try_flock", lambda handle: False)
    path = tmp_path / ".lock"
    path.touch()
    writer = threading.Timer(0.1, lambda: _lock(tmp_path, host="elsewhere"))
    writer.start()
    with pytest.raises(CheckpointError, match="on elsewhere"), RunLock(tmp_path):
        pass
    writer.join()


def _in_threads(work: Callable[[int], None]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("nested", [False, True])
def test_many_that_come_and_go_at_once(nested: bool, tmp_path: Path) -> None:
    """At most one has the lock at any time; a folder that vanishes between two system calls is created again."""
    holders: list[str] = []
    most = [0]

    def come_and_go(number: int) -> None:
        folder = tmp_path / "runs" / (str(number) if nested else "one")
        for _ in range(200):
            try:
                with RunLock(folder):
                    holders.append(folder.name)
                    most[0] = max(most[0], holders.count(folder.name))
                    holders.remove(folder.name)
            except CheckpointError:
                assert not nested

    assert _in_threads(come_and_go) == []
    assert most[0] == 1 and not list(tmp_path.rglob(".lock"))


def test_processes_that_take_over_a_stale_lock_at_once(tmp_path: Path) -> None:
    """Each adds one to a counter while it has the lock: none is lost."""
    (tmp_path / "count").write_text("0")
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom tunesmith.errors import CheckpointError\n"
        "from tunesmith.storage.run_lock import RunLock\n"
        "count, left, crashes = Path(sys.argv[1], 'count'), 50, {40, 30, 20, 10}\n"
        "while left:\n"
        "    if left in crashes:\n"  # the lock of a process that has ended: a zombie, until it is waited for
        "        crashes.remove(left)\n"
        "        if (child := os.fork()) == 0:\n"
        "            try:\n"
        "                RunLock(count.parent).__enter__()\n"
        "            finally:\n"
        "                os._exit(0)\n"
        "    try:\n"
        "        with RunLock(count.parent):\n"
        "            value = int(count.read_text())\n"
        "            count.write_text(str(value + 1))\n"
        "            left -= 1\n"
        "    except CheckpointError:\n"
        "        time.sleep(0.001)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    assert int((tmp_path / "count").read_text()) == 100


def test_folders_are_returned_innermost_first(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b") == [tmp_path / "a" / "b", tmp_path / "a"]
    assert make_folder(tmp_path / "a" / "b") == []
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
