"""Worker process that runs one arm repeatedly.

    python -m bench.worker bench.arms.ours

The worker writes one JSON line after importing the arm. Then it reads one job per line and writes one result line: the
return value of `go` and the peak memory above the imports. All other output goes to stderr. Idle workers use no CPU.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from importlib.metadata import version
from typing import Any, TextIO

from bench import clock


def main() -> None:
    """Process jobs until the end of stdin."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        arm: Any = importlib.import_module(sys.argv[1])
    except ModuleNotFoundError as error:
        _say(answers, {"missing": error.name})
        return
    held = clock.held_bytes()
    _say(answers, {"versions": {name: version(name) for name in arm.LIBRARIES}, "held_bytes": held})
    for line in sys.stdin:
        gc.collect()
        clock.forget_peak()
        try:
            answer = arm.go(json.loads(line))
            answer["peak_bytes"] = answer.get("peak_bytes", clock.peak_bytes()) - held
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        _say(answers, answer)


def _say(answers: TextIO, said: dict[str, Any]) -> None:
    answers.write(json.dumps(said) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
