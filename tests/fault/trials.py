"""Kill runs at random moments, resume them, and compare the results bit by bit with an undisturbed run.

    python tests/fault/trials.py MODEL DATA WORK --trials 60

Each run is a forked child of one process that has loaded everything, so a trial takes seconds. A trial kills its run
one to three times with SIGKILL, at random moments of its whole length (start-up, steps, evaluation, checkpoints,
artifact), and then lets it finish with the same command. Prints one JSON line: trials, kills, and differences.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers.models.bert.modeling_bert  # noqa: F401 - before the fork, not in each child
from outcome import differences, result

import tunesmith
from tunesmith.tasks import fill_mask, text_classification, token_classification  # noqa: F401
from tunesmith.techniques import adapter, bitfit, freeze, full, ia3, lora, prefix, prompt  # noqa: F401

torch.set_num_threads(1)  # a fork after threads were started may hang

TECHNIQUES: dict[str, Any] = {
    "full": "full",
    "lora": {"name": "lora", "r": 4, "dropout": 0.1},
    "freeze": {"name": "freeze", "last_n_blocks": 2, "gradual": True},
    "prefix": {"name": "prefix", "num_virtual_tokens": 4, "reparameterize": 16},
    "prompt": {"name": "prompt", "num_virtual_tokens": 4},
    "adapter": {"name": "adapter", "kind": "pfeiffer"},
    "ia3": "ia3",
    "bitfit": "bitfit",
    "peft": {"name": "peft", "type": "LOHA"},
}
"""Tried in turn; few trials cover only the first ones."""


def start(technique: str, folder: Path, model: str, data: str, task: str) -> int:
    """Start or resume a run in a child process; return its process number."""
    if child := os.fork():
        return child
    code = 1
    try:
        with (folder.parent / f"{folder.name}.log").open("a") as log, contextlib.redirect_stdout(log):
            tunesmith.train(
                task=task,
                model=model,
                data={"train": data, "validation": 0.2},
                technique=TECHNIQUES[technique],
                train={"max_steps": 24, "batch_size": 8, "precision": "fp32", "device": "cpu", "learning_rate": 1e-3,
                       "save_every": 4, "evaluate_every": 8, "seed": 3},
                output=str(folder),
                resume=folder,
                offline=True,
            )  # fmt: skip
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    """Run without faults first, then the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("work", type=Path)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--task", default="text-classification")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    expected, seconds = {}, {}
    tried = list(TECHNIQUES)[: given.trials]
    for technique in tried:
        begin = time.monotonic()
        folder = given.work / f"undisturbed-{technique}"
        _, status = os.waitpid(start(technique, folder, given.model, given.data, given.task), 0)
        assert status == 0, f"the undisturbed run of {technique} failed: {status}"
        seconds[technique] = time.monotonic() - begin
        expected[technique] = result(folder)
    draw = random.Random(given.seed)
    kills, failures = 0, []
    for trial in range(given.trials):
        technique = tried[trial % len(tried)]
        folder = given.work / f"trial-{trial}"
        for _ in range(draw.randint(1, 3)):
            child = start(technique, folder, given.model, given.data, given.task)
            time.sleep(draw.uniform(0, seconds[technique]))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            kills += os.WIFSIGNALED(status)
        _, status = os.waitpid(start(technique, folder, given.model, given.data, given.task), 0)
        if status != 0:
            failures.append(f"trial {trial} ({technique}): could not be resumed, see {folder}.log")
        elif names := differences(result(folder), expected[technique]):
            failures.append(f"trial {trial} ({technique}): {', '.join(names[:5])} differ")
    print(json.dumps({"trials": given.trials, "kills": kills, "failures": failures}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
