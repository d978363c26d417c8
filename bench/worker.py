"""A process that runs one arm as often as it is told to.

    python -m bench.worker bench.arms.ours

Once the arm is imported a JSON line says so; then each line read, a job, is answered by one line: what `go` said, and
the peak of memory above what the imports had left. Whatever else is printed goes to stderr. Waiting costs nothing.
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
    """Until there are no more lines."""
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
