"""What a run says while it works: plain lines, and a progress bar where a person is watching.

With `--json` all talk goes to stderr, so that stdout holds one JSON object.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Talk"]


@dataclass
class Talk:
    """How much is said, and where. Processes other than the first of a group say nothing."""

    level: int = 0
    """-1 quiet, 0 normal, 1 verbose."""
    to_stderr: bool = False
    console: Console = field(init=False)

    def __post_init__(self) -> None:
        silent = int(os.environ.get("RANK", "0")) != 0
        self.console = Console(stderr=self.to_stderr, quiet=silent, highlight=False, soft_wrap=True, markup=False)

    def say(self, text: str) -> None:
        """News."""
        if self.level >= 0:
            self.console.print(text)

    def detail(self, text: str) -> None:
        """News for who asked for more (`-v`)."""
        if self.level > 0:
            self.console.print(text)

    def warn(self, text: str) -> None:
        """What should not pass unseen, even when quiet."""
        self.console.print(f"warning: {text}", style="yellow")

    @contextmanager
    def progress(self, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """A bar on a terminal; nothing elsewhere, where epoch lines are enough. Call with (steps done, text)."""
        watched = self.console.is_terminal and not os.environ.get("CI") and self.level >= 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=not watched, transient=True) as bar:
            task = bar.add_task("training", total=total, completed=done)
            yield lambda completed, text: bar.update(task, completed=completed, description=text)
