"""Time and memory that a process has taken, as every arm measures them."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Clock:
    """Wall and CPU seconds, added up over what is to be timed; a GPU's work counts until it is done.

    `peak_bytes` is the most that was held up to the last stop: what is saved and read again after it is not in it.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.peak_bytes = 0
        self.begin = (0.0, 0.0)

    def start(self) -> None:
        """From here on."""
        self.begin = _now()

    def stop(self) -> None:
        """Up to here."""
        wall, cpu = _now()
        self.seconds += wall - self.begin[0]
        self.cpu_seconds += cpu - self.begin[1]
        self.peak_bytes = peak_bytes()


def _cuda() -> Any:
    """PyTorch's, where an arm has imported PyTorch and there is a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _now() -> tuple[float, float]:
    if (cuda := _cuda()) is not None:
        cuda.synchronize()
    return time.perf_counter(), time.process_time()


def held_bytes() -> int:
    """Resident memory at this moment; on a GPU what its allocator has given out."""
    if (cuda := _cuda()) is not None:
        return int(cuda.memory_allocated())
    return _status("VmRSS") or peak_bytes()


def forget_peak() -> None:
    """Let the peak be what is held now, where the system allows that."""
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def peak_bytes() -> int:
    """The most that was held since `forget_peak`, or since the process began."""
    if (cuda := _cuda()) is not None:
        return int(cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or (peak if sys.platform == "darwin" else peak * 1024)


def _status(key: str) -> int:
    """A line of Linux's account of this process, in bytes; 0 on other systems."""
    lines = STATUS.read_text(encoding="utf-8").splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
