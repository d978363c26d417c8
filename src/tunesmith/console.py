"""Console output: plain lines, and a progress bar on a terminal.

With `--json`, all messages go to stderr, so that stdout has only the JSON object. In a notebook, the last line is
rewritten as training advances. A file gets a progress line every `SILENCE_S` seconds.
"""

from __future__ import annotations

import builtins
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import console as rich_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Console", "command", "scores_line"]

REWRITE_S = 0.2
"""Minimum time between two updates of a notebook's progress line."""

SILENCE_S = 30.0
"""Time between progress lines where there is no bar."""

PATIENCE_S = 5.0
"""Time after which an operation is announced."""


@dataclass
class Console:
    """Messages for the user at a verbosity level. Only the first process of a group prints."""

    level: int = 0
    """-1 quiet, 0 normal, 1 verbose."""
    to_stderr: bool = False
    rich: rich_console.Console = field(init=False)
    _warned: set[str] = field(default_factory=set, init=False, repr=False)
    _line: str = field(default="", init=False, repr=False)
    _written_s: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        silent = os.environ.get("RANK", "0") not in ("", "0")
        as_is = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True, "force_jupyter": False}
        self.rich = rich_console.Console(stderr=self.to_stderr, quiet=silent, **as_is)  # type: ignore[arg-type]

    def say(self, text: str) -> None:
        """Print a message, unless quiet."""
        if self.level >= 0:
            self._print(text)

    def detail(self, text: str) -> None:
        """Print a message if verbose (`-v`)."""
        if self.level > 0:
            self._print(text)

    def warn(self, text: str) -> None:
        """Print a warning, even when quiet; a repeated warning is printed once."""
        if text not in self._warned:
            self._warned.add(text)
            self._print(f"warning: {text}", style="yellow")

    @contextmanager
    def during(self, text: str) -> Iterator[None]:
        """Announce an operation that takes longer than `PATIENCE_S`, and repeat its elapsed time."""
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(text, done), daemon=True)
        watch.start()
        try:
            yield
        finally:
            done.set()
            watch.join()

    def _watch(self, text: str, done: threading.Event) -> None:
        began = time.monotonic()
        if done.wait(PATIENCE_S):
            return
        self.say(text)
        while not done.wait(SILENCE_S):
            self.say(f"{text}: {_duration(time.monotonic() - began)} elapsed")

    def _print(self, text: str, **style: Any) -> None:
        self._rewrite("")
        self.rich.print(text, **style)

    @contextmanager
    def progress(
        self, total: int, done: int = 0, *, of: str = "training", unit: str = "step"
    ) -> Iterator[Callable[[int, str], None]]:
        """Show progress: yield a function to call with (units done, text)."""
        drawn = self.level >= 0 and not self.rich.quiet and not os.environ.get("CI")
        if drawn and self.rich.is_terminal and self.rich.file.isatty():  # FORCE_COLOR does not make a file a terminal
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(f"{unit}s"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.rich, transient=True) as bar:
                task = bar.add_task(of, total=total, completed=done)
                yield lambda completed, text: bar.update(task, completed=completed, description=text)
        elif drawn and hasattr(builtins, "get_ipython"):  # a notebook
            try:
                yield lambda completed, text: self._step(f"{unit} {completed} of {total}  {text}")
            finally:
                self._rewrite("")
        else:
            yield self._periodic_lines(total, done, unit)

    def _periodic_lines(self, total: int, done: int, unit: str) -> Callable[[int, str], None]:
        began = shown = time.monotonic()

        def show(completed: int, text: str) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= SILENCE_S:
                left = (now - began) / max(completed - done, 1) * (total - completed)
                self.say(f"{unit} {completed} of {total}  {text}  {_duration(left)} left")
                shown = now

        return show

    def _step(self, text: str) -> None:
        if time.monotonic() - self._written_s > REWRITE_S:
            self._rewrite(text)

    def _rewrite(self, text: str) -> None:
        """Replace the notebook's progress line by `text`."""
        if text or self._line:
            blank = " " * len(self._line)
            self.rich.file.write(f"\r{blank}\r{text}")
            self.rich.file.flush()
            self._line, self._written_s = text, time.monotonic()


def scores_line(scores: dict[str, Any], first: str, before: Mapping[str, Any] | None = None) -> str:
    """Return the scalar scores on one line, the primary metric `first`, each with its value `before`."""
    names = sorted((name for name, value in scores.items() if isinstance(value, float)), key=lambda name: name != first)
    was = {name: f" ({value:.4f} before)" for name, value in (before or {}).items() if isinstance(value, float)}
    return "  ".join(f"{name} {scores[name]:.4f}{was.get(name, '')}" for name in names)


def _duration(seconds: float) -> str:
    """Return a duration as `40 s`, `12 min` or `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def command(*words: object) -> str:
    """Return the shell command for `tunesmith WORDS`: the name if it is on PATH, else the path of the program."""
    python = Path(sys.executable)
    script, on_path = python.with_name("tunesmith"), shutil.which("tunesmith")
    program: list[object] = [script] if script.exists() else [python, "-m", "tunesmith"]
    if on_path and (not script.exists() or script.samefile(on_path)):
        program = ["tunesmith"]
    elif python.is_relative_to(Path.cwd()):
        program[0] = Path(str(program[0])).relative_to(Path.cwd())
    return shlex.join(str(word) for word in (*program, *words))
