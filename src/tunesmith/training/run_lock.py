"""One process at a time per run folder: `.lock` holds who, and is taken over when its holder is gone."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from tunesmith.errors import CheckpointError


class RunLock:
    """Held while a run writes into its folder. A second run is refused: two writers would spoil the checkpoints."""

    def __init__(self, folder: Path, *, enabled: bool = True) -> None:
        self.path = folder / ".lock"
        self._enabled = enabled
        self._me = {"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname()}

    def __enter__(self) -> RunLock:
        while self._enabled:
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            except FileExistsError:
                self._take_over()
                continue
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self._me, file)
            break
        return self

    def _take_over(self) -> None:
        """Remove a lock whose holder is gone.

        Raises:
            CheckpointError: the holder lives, or runs on another machine.
        """
        try:
            holder: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except ValueError:
            holder = {}
        if holder.get("host", self._me["host"]) != self._me["host"]:
            who = f"process {holder.get('pid')} on {holder['host']}"
            raise CheckpointError(f"in use by {who}", where=str(self.path), hint="if it is gone, remove this file")
        if holder and _started(int(holder["pid"])) == holder["started"] is not None:
            who = f"process {holder['pid']}"
            raise CheckpointError(
                f"in use by {who}", where=str(self.path), hint="wait for it, or choose another output"
            )
        gone = self.path.with_name(f".lock-gone-{os.getpid()}")
        try:
            os.rename(self.path, gone)  # only one of several takers succeeds
        except FileNotFoundError:
            return
        gone.unlink()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self.path.unlink(missing_ok=True)


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
