"""Run commands in forked children of one process that has imported everything: real exit codes in half a second.

    python tests/fault/forks.py WORK

reads jobs, one JSON object per line, and answers each with {"code": [one per process], "out", "err", "seconds"}. A job
has the arguments of `tunesmith` (`words`), the number of processes (`world`) and a `fault`: its name, its arguments and
the `rank` of the process it occurs in (0). Faults are real: a signal, a system limit, or an error raised by the audit
hook of a file operation. The moment is chosen by counting calls.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers.models.bert.modeling_bert  # noqa: F401 - before the fork, not in each child

from tunesmith import cli
from tunesmith.deploy import artifact as artefact
from tunesmith.models import load as models
from tunesmith.run import train as run
from tunesmith.tasks.text_classification import BoundTextClassification
from tunesmith.techniques import freeze, full, lora  # noqa: F401
from tunesmith.training import checkpoint, dataset, evaluate

torch.set_num_threads(1)  # a fork after threads were started may hang

MOMENTS: dict[str, tuple[Any, str]] = {
    "reading": (dataset, "read"),
    "loading": (models, "load_model"),
    "forward": (BoundTextClassification, "loss"),
    "optimizer": (torch.optim.AdamW, "step"),
    "evaluation": (evaluate, "scores"),
    "saving": (checkpoint, "save_file"),
    "pointing": (checkpoint, "write_pointer"),
    "rotating": (checkpoint, "rotate"),
    "artefact": (artefact, "write_model"),
    "final scores": (evaluate, "scores_and_answers"),
    "report": (run.report, "write"),
}
"""Moment of a run -> the function that is called at that moment."""


def _before(moment: str, at: int, act: Callable[[], Any]) -> None:
    """Call `act` before the at-th call of a moment's function."""
    owner, name = MOMENTS[moment]
    own, count = getattr(owner, name), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            act()
        return own(*args, **kwargs)

    setattr(owner, name, call)


def send(signals: list[str], moment: str, at: int = 1) -> None:
    """Send signals to this process."""
    _before(moment, at, lambda: [os.kill(os.getpid(), getattr(signal, name)) for name in signals])


def limit_files(size_bytes: int) -> None:
    """Limit the size of files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


def fail_writing(folder: str, nth: int, code: int) -> None:
    """Fail the nth and every later open for writing, mkdir or rename under a folder."""
    count = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        elif event in ("os.mkdir", "os.rename"):
            path, writes = args[0], True
        else:
            return
        if writes and isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(folder):
            count[0] += 1
            if count[0] >= nth:
                raise OSError(code, os.strerror(code), os.fsdecode(path))

    sys.addaudithook(hook)


FAULTS: dict[str, Callable[..., None]] = {"send": send, "limit_files": limit_files, "fail_writing": fail_writing}


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _child(job: dict[str, Any], rank: int, port: int, out: Path, err: Path) -> None:
    code = 1
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        os.environ |= job.get("environment", {})
        if (world := job.get("world", 1)) > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TUNESMITH_TIMEOUT_S": "60"}
        fault = dict(job.get("fault", {}))
        if fault and rank == fault.pop("rank", 0):
            FAULTS[fault.pop("name")](**fault)
        sys.argv = ["tunesmith", *job["words"]]
        cli.main()
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def done(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a job; return exit codes and output."""
    began, port = time.monotonic(), _port()
    out, err = folder / f"{port}.out", folder / f"{port}.err"
    children = []
    for rank in range(job.get("world", 1)):
        if (child := os.fork()) == 0:
            _child(job, rank, port, out, err)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    output = {"out": out.read_text(encoding="utf-8"), "err": err.read_text(encoding="utf-8")}
    return {"code": codes, **output, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    work = Path(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(done(json.loads(line), work)), flush=True)
    os._exit(0)  # skips torch's cleanup, which takes a second
