"""One process at a time per run folder: `.lock` holds who, and is taken over when its holder is gone.

It makes the folder, and takes along what is empty still: a run refused before it began leaves none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tunesmith.errors import CheckpointError
from tunesmith.training.files import make_folder, out_of_space

WRITING_S = 1.0
"""How long a lock may be empty: between its creation and its first byte lie microseconds."""


class RunLock:
    """Held while a run writes into its folder. A second run is refused: two writers would spoil the checkpoints."""

    def __init__(self, folder: Path, *, enabled: bool = True) -> None:
        self.path = folder / ".lock"
        self._enabled = enabled
        self._made: list[Path] = []
        self._me = {"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname()}

    def __enter__(self) -> RunLock:
        while self._enabled:
            self._made += make_folder(self.path.parent)
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            except FileExistsError:
                self._take_over()
                continue
            except FileNotFoundError:  # another run that was refused has taken its folder along
                continue
            except OSError as error:
                self._take_away()
                raise out_of_space(error, self.path) from error
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(self._me))
            break
        return self

    def _take_over(self) -> None:
        """Remove a lock whose holder is gone.

        Raises:
            CheckpointError: the holder lives, or runs on another machine.
        """
        try:
            with self.path.open(encoding="utf-8") as file:
                with contextlib.suppress(OSError):  # some network disks have no such locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # of several takers one at a time
                self._refuse_if_held(file)
                if os.fstat(file.fileno()).st_ino == self.path.stat().st_ino:  # else it is another one's by now
                    self.path.unlink()
        except FileNotFoundError:
            return

    def _refuse_if_held(self, file: TextIO) -> None:
        deadline = time.monotonic() + WRITING_S
        while not (text := file.read()) and time.monotonic() < deadline:
            time.sleep(0.02)  # its holder is about to write it
        try:
            holder: dict[str, Any] = json.loads(text)
            pid, host, started = int(holder["pid"]), holder["host"], holder["started"]
        except (ValueError, KeyError, TypeError):
            return  # a disk that was full, or a power cut
        if host != self._me["host"]:
            who = f"process {pid} on {host}"
            raise CheckpointError(f"in use by {who}", where=str(self.path), hint="if it is gone, remove this file")
        if _started(pid) == started is not None:
            hint = "wait for it, or choose another output"
            raise CheckpointError(f"in use by process {pid}", where=str(self.path), hint=hint)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self.path.unlink(missing_ok=True)
            self._take_away()

    def _take_away(self) -> None:
        """Remove the folders that this lock made and that hold nothing."""
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _started(pid: int) -> str | None:
    """When a process began, so that a reused number is not mistaken for it; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
