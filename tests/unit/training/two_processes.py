"""Run each recipe given as JSON in two processes with the variables that torchrun sets.

The processes are forked from this one, which has imported everything once. With `"out_of_memory": k` beside the recipe
the second process, and only that, runs out of memory on more than k examples at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import traceback
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers.models.bert.modeling_bert  # noqa: F401 - before the fork, not in each child

import tunesmith
from tunesmith.tasks.text_classification import BoundTextClassification
from tunesmith.techniques import adapter, bitfit, freeze, full, ia3, lora, prefix, prompt  # noqa: F401

torch.set_num_threads(1)  # a fork after threads were started may hang


def _port() -> int:
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        return int(free_port.getsockname()[1])


def _run_out_of_memory(most: int) -> None:
    own = BoundTextClassification.loss

    def loss(self: Any, model: Any, batch: Any, *rest: Any) -> torch.Tensor:
        if batch.size > most:
            raise torch.OutOfMemoryError(f"{batch.size} examples")
        return own(self, model, batch, *rest)

    BoundTextClassification.loss = loss  # type: ignore[method-assign]


def _start(rank: int, port: int, job: dict[str, Any]) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TUNESMITH_TIMEOUT_S": "60"}
        if rank == 1 and "out_of_memory" in job:
            _run_out_of_memory(job["out_of_memory"])
        with contextlib.redirect_stdout(sys.stderr):
            tunesmith.train(job["recipe"], resume=job.get("resume"))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


for given in json.loads(sys.argv[1]):
    free = _port()
    children = [_start(rank, free, given) for rank in range(2)]
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit(1)
