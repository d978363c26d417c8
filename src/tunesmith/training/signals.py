"""A signal ends a run: at once where all that is written is whole or absent, after a checkpoint inside the loop.

The second signal stops at once in any case.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """A signal came where nothing has to be finished first. Not an `Exception`: no library may swallow it."""


class Signals:
    """Within the block a signal raises `Stopped`, and within `deferred()` it only sets `requested`, its name.

    Outside the main thread: inert.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in WATCHED}
            self._before = {number: was for number, was in before.items() if was is not signal.SIG_IGN}  # nohup's wish
            for number in self._before:
                signal.signal(number, self._handle)
        return self

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block see `requested` and stop by itself; what it did not heed is raised behind it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.requested is not None:
            raise Stopped(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = signal.Signals(number).name
        if not self._deferred:
            raise Stopped(self.requested)
        text = f"{self.requested}: saving a checkpoint after this step, then stopping (again to stop at once)\n"
        with contextlib.suppress(OSError):  # a terminal that hung up; print() may not be entered twice
            os.write(2, text.encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
