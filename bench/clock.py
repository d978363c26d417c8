"""Time and memory measurements of a process, shared by all arms."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Clock:
    """Stopwatch that accumulates wall and CPU seconds over the timed sections; synchronizes the GPU first.

    `peak_bytes` is the peak memory up to the last stop. Later saving and reloading is not included.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.peak_bytes = 0
        self.begin = (0.0, 0.0)

    def start(self) -> None:
        """Start a timed section."""
        self.begin = _now()

    def stop(self) -> None:
        """End the timed section and add its time."""
        wall, cpu = _now()
        self.seconds += wall - self.begin[0]
        self.cpu_seconds += cpu - self.begin[1]
        self.peak_bytes = peak_bytes()


def _cuda() -> Any:
    """Return `torch.cuda` if the arm has imported PyTorch and a GPU is available, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _now() -> tuple[float, float]:
    if (cuda := _cuda()) is not None:
        cuda.synchronize()
    return time.perf_counter(), time.process_time()


def held_bytes() -> int:
    """Return the current resident memory, or the allocated memory on a GPU."""
    if (cuda := _cuda()) is not None:
        return int(cuda.memory_allocated())
    return _status("VmRSS") or peak_bytes()


def forget_peak() -> None:
    """Reset the peak to the current memory, if the system supports it."""
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def peak_bytes() -> int:
    """Return the peak memory since `forget_peak`, or since the process started."""
    if (cuda := _cuda()) is not None:
        return int(cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or (peak if sys.platform == "darwin" else peak * 1024)


def _status(key: str) -> int:
    """Return a field of /proc/self/status in bytes; 0 on systems without it."""
    lines = STATUS.read_text(encoding="utf-8").splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
