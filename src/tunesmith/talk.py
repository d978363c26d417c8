"""What a run says while it works: plain lines, and a progress bar where a person is watching.

With `--json` all talk goes to stderr, so that stdout holds one JSON object. A notebook gets the same plain lines and,
below them, one that is written over as the steps go by.
"""

from __future__ import annotations

import builtins
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Talk", "scores_line"]

REWRITE_S = 0.2
"""How often a notebook's last line is written anew."""


@dataclass
class Talk:
    """How much is said, and where. Processes other than the first of a group say nothing."""

    level: int = 0
    """-1 quiet, 0 normal, 1 verbose."""
    to_stderr: bool = False
    console: Console = field(init=False)
    _line: str = field(default="", init=False, repr=False)
    _written_s: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        silent = os.environ.get("RANK", "0") not in ("", "0")
        as_is = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True, "force_jupyter": False}
        self.console = Console(stderr=self.to_stderr, quiet=silent, **as_is)  # type: ignore[arg-type]

    def say(self, text: str) -> None:
        """News."""
        if self.level >= 0:
            self._print(text)

    def detail(self, text: str) -> None:
        """News for who asked for more (`-v`)."""
        if self.level > 0:
            self._print(text)

    def warn(self, text: str) -> None:
        """What should not pass unseen, even when quiet."""
        self._print(f"warning: {text}", style="yellow")

    def _print(self, text: str, **style: Any) -> None:
        self._rewrite("")
        self.console.print(text, **style)

    @contextmanager
    def progress(self, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """A bar on a terminal; nothing in a file, where epoch lines are enough. Call with (steps done, text)."""
        watched = self.level >= 0 and not self.console.quiet and not os.environ.get("CI")
        if watched and not self.console.is_terminal and hasattr(builtins, "get_ipython"):  # a notebook
            try:
                yield lambda completed, text: self._step(f"step {completed} of {total}  {text}")
            finally:
                self._rewrite("")
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
        )
        bar = Progress(
            *columns, console=self.console, disable=not (watched and self.console.is_terminal), transient=True
        )
        with bar:
            task = bar.add_task("training", total=total, completed=done)
            yield lambda completed, text: bar.update(task, completed=completed, description=text)

    def _step(self, text: str) -> None:
        if time.monotonic() - self._written_s > REWRITE_S:
            self._rewrite(text)

    def _rewrite(self, text: str) -> None:
        """Put `text` in the place of the last line, where that is one to be written over."""
        if text or self._line:
            blank = " " * len(self._line)
            self.console.file.write(f"\r{blank}\r{text}")
            self.console.file.flush()
            self._line, self._written_s = text, time.monotonic()


def scores_line(scores: dict[str, Any], first: str) -> str:
    """The plain numbers of a score on one line, the one that counts first."""
    names = sorted((name for name, value in scores.items() if isinstance(value, float)), key=lambda name: name != first)
    return "  ".join(f"{name} {scores[name]:.4f}" for name in names)
