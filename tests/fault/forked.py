"""Client of `forks.py`, called by the tests."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOP = {"name": "send", "signals": ["SIGTERM"], "moment": "forward", "at": 6}
"""Send SIGTERM in the sixth step."""


@dataclass(frozen=True)
class Done:
    """Result of a command: an exit code for each process (negative: the signal that killed it) and its output."""

    code: list[int]
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Forks:
    """Running process of `forks.py`."""

    process: subprocess.Popen[str]
    words: tuple[str, ...]

    def __call__(self, *words: Any, **job: Any) -> Done:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"words": [str(word) for word in words], **job}), file=self.process.stdin, flush=True)
        done = Done(**json.loads(self.process.stdout.readline()))
        assert "Traceback" not in done.err and "a bug in tunesmith" not in done.err, done.err
        return done

    def train(self, folder: Path, *words: str, **job: Any) -> Done:
        """Start a run of 12 steps in a folder."""
        return self("train", *self.words, f"output={folder}", *words, **job)

    def resume(self, folder: Path, *words: str, **job: Any) -> Done:
        """Resume the run in a folder."""
        return self("train", "--resume", folder, *words, **job)
