"""The other end of `forks.py`: what a test calls."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOP = {"name": "send", "signals": ["SIGTERM"], "moment": "forward", "at": 6}
"""A signal in the sixth step."""


@dataclass(frozen=True)
class Done:
    """How a command line ended: an exit code for each process (negative: the signal that killed it), what it said."""

    code: list[int]
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Forks:
    """The process that `forks.py` is."""

    process: subprocess.Popen[str]
    words: tuple[str, ...]

    def __call__(self, *words: Any, **job: Any) -> Done:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"words": [str(word) for word in words], **job}), file=self.process.stdin, flush=True)
        done = Done(**json.loads(self.process.stdout.readline()))
        assert "Traceback" not in done.err and "a bug in tunesmith" not in done.err, done.err
        return done

    def train(self, folder: Path, *words: str, **job: Any) -> Done:
        """Begin a run of 12 steps into a folder."""
        return self("train", *self.words, f"output={folder}", *words, **job)

    def resume(self, folder: Path, *words: str, **job: Any) -> Done:
        """Go on with it."""
        return self("train", "--resume", folder, *words, **job)
