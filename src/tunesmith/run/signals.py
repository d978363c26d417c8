"""Stopping on a signal: inside the training loop after a checkpoint, elsewhere at once.

Stopping at once is safe because every write is atomic. A second signal always ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """Raised by a signal. Not an `Exception`, so that no library catches it."""


class Signals:
    """Context manager in which a signal raises `Stopped`; within `deferred()` it only sets `requested` to its name.

    Outside the main thread it does nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in SIGNALS}
            ignored = signal.SIG_IGN  # as nohup sets SIGHUP
            self._before = {number: handler for number, handler in before.items() if handler is not ignored}
            for number in self._before:
                signal.signal(number, self._handle)
        return self

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer signals: in the `with` block they only set `requested`; at its end raise `Stopped` if it is set."""
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
        text = f"{self.requested}: saving a checkpoint after this step, then stopping (send again to stop at once)\n"
        with contextlib.suppress(OSError):  # a closed terminal; print() is not reentrant
            os.write(2, text.encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
