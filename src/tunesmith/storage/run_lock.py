"""Lock of a run folder: one writing process at a time.

The file `.lock` holds the process number, its start time and its host. A lock whose process has ended is removed and
taken over. The lock creates the folder where necessary, and removes it again while it is still empty, so that a run
that is refused before it starts leaves no folder.

Two processes that start or end at the same moment are kept apart by `flock` on the file itself: a lock is written, and
a stale one is removed, only by a process that has that lock and has seen that the path still leads to the same file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tunesmith.errors import CheckpointError, ResourceError
from tunesmith.storage.files import disk_error, make_folder

WRITE_TIMEOUT_S = 1.0
"""Where the disk has no `flock`: how long a lock may stay empty between its creation and its first byte."""

MAX_ATTEMPTS = 1000
MAX_LOCK_BYTES = 4096


class RunLock:
    """Exclusive access to a run folder, as a context manager.

    Raises:
        CheckpointError: another run has the folder, or `.lock` is not a lock file.
        ResourceError: the folder or the lock cannot be created.
    """

    def __init__(self, folder: Path, *, enabled: bool = True) -> None:
        self.path = folder / ".lock"
        self._enabled = enabled
        self._created_folders: list[Path] = []
        self._host = socket.gethostname()
        pid = os.getpid()
        self._content = json.dumps({"pid": pid, "started": _start_time(pid), "host": self._host})

    def __enter__(self) -> RunLock:
        if self._enabled:
            try:
                self._acquire()
            except BaseException:
                self._remove_empty_folders()
                raise
        return self

    def _acquire(self) -> None:
        for _ in range(MAX_ATTEMPTS):
            self._created_folders += make_folder(self.path.parent)
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            except FileExistsError:
                self._remove_stale_lock()
                continue
            except FileNotFoundError:  # another run has removed its empty folder
                continue
            except OSError as error:
                raise disk_error(error, self.path) from error
            try:
                if self._write(handle):
                    return
            finally:
                os.close(handle)
        raise ResourceError("the lock cannot be created", where=str(self.path), hint="set another output=DIR")

    def _write(self, handle: int) -> bool:
        """Write the lock just created; return False if another process has removed it in between."""
        _try_flock(handle)
        if not self._is_at_path(handle):
            return False
        try:
            os.write(handle, self._content.encode())
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise disk_error(error, self.path) from error
        return True

    def _remove_stale_lock(self) -> None:
        """Remove a lock whose process has ended.

        Raises:
            CheckpointError: the process is alive or on another host, or the path is not a lock file.
        """
        try:
            mode = os.lstat(self.path).st_mode
            if not stat.S_ISREG(mode):  # opening a FIFO would block, following a link may lead anywhere
                raise self._not_a_lock(_kind(mode))
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        except OSError as error:
            raise CheckpointError(
                f"cannot be opened ({os.strerror(error.errno or 0).lower()})",
                where=str(self.path),
                hint="if no run uses this folder, remove the file",
            ) from error
        try:
            exclusive = _try_flock(handle)
            content = os.pread(handle, MAX_LOCK_BYTES, 0)
            deadline = time.monotonic() + WRITE_TIMEOUT_S
            while not content and not exclusive and time.monotonic() < deadline:
                time.sleep(0.02)
                content = os.pread(handle, MAX_LOCK_BYTES, 0)
            self._check_stale(content)
            if self._is_at_path(handle):
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, self.path) from error
        finally:
            os.close(handle)

    def _is_at_path(self, handle: int) -> bool:
        """Return whether the path still leads to the open file."""
        try:
            return os.path.samestat(os.fstat(handle), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _check_stale(self, content: bytes) -> None:
        """Raise unless the process that the lock names has ended; an empty lock was left by a crash."""
        if not content.strip(b"\0\n "):
            return
        try:
            holder: dict[str, Any] = json.loads(content)
            pid, host, started = int(holder["pid"]), holder["host"], holder["started"]
        except (ValueError, KeyError, TypeError):
            raise self._not_a_lock("not written by tunesmith") from None
        if host != self._host:
            raise CheckpointError(
                f"in use by process {pid} on {host}",
                where=str(self.path),
                hint="if that process has ended, remove the file",
            )
        if _start_time(pid) == started is not None:
            raise CheckpointError(
                f"in use by process {pid}", where=str(self.path), hint="wait for it, or set another output=DIR"
            )

    def _not_a_lock(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"not a lock file ({reason})", where=str(self.path), hint="if no run uses this folder, remove it"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            with contextlib.suppress(OSError, ValueError):
                if self.path.read_text(encoding="utf-8") == self._content:  # someone may have removed ours by hand
                    self.path.unlink()
            self._remove_empty_folders()

    def _remove_empty_folders(self) -> None:
        """Remove the folders that this lock created, where they are empty."""
        for folder in self._created_folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _try_flock(handle: int) -> bool:
    """Wait for exclusive use of an open file; return False on a disk without such locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a FIFO" if stat.S_ISFIFO(mode) else "a special file"


def _start_time(pid: int) -> str | None:
    """Return when a process started, which tells apart processes of the same number; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *fields = status.rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
