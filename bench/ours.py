"""Run tunesmith once on the same rows as the peer, at its default learning rate unless one is given.

    python -m bench.ours --model FOLDER --data sst2 --data-root build/splits --technique lora --seed 0

Prints one JSON line with the keys of the peer (`peer_classification.py`, `peer_entities.py`). `head` and `last-2` use
`freeze`. `--plain` disables the fast paths and is the reference for them: padded batches, transformers' own blocks,
PyTorch's dropout and cross-entropy, unfused LoRA.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import tunesmith
from bench.splits import ENTITIES
from tunesmith import recipe
from tunesmith.techniques.lora import LoraLinear

TECHNIQUES: dict[str, Any] = {
    "full": "full",
    "lora": "lora",
    "head": {"name": "freeze", "head_only": True},
    "last-2": {"name": "freeze", "last_n_blocks": 2},
    **{name: name for name in ("adapter", "bitfit", "ia3", "prefix", "prompt")},
}
LIBRARIES = ("tunesmith", "torch", "transformers")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Train and return the scores of the saved artifact."""
    if given.plain:
        LoraLinear.part = lambda *_: None  # type: ignore[method-assign]
    folder = Path(given.data_root) / given.data
    entities = given.data in ENTITIES
    suffix, main = ("conll", "f1") if entities else ("csv", "accuracy")
    splits = ("train", "validation", "test")[: 3 if given.test else 2]
    data = {split: str(folder / f"{split}.{suffix}") for split in splits}
    learning_rate = {} if given.learning_rate is None else {"learning_rate": given.learning_rate}
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(sys.stderr):
        result = tunesmith.train(
            task="token-classification" if entities else "text-classification",
            model=given.model,
            data={**data, "max_length": given.max_length},
            technique=TECHNIQUES[given.technique],
            train={
                "epochs": given.epochs,
                "batch_size": given.batch_size,
                "seed": given.seed,
                "device": given.device,
                "precision": given.precision,
                "fast_path": "off" if given.plain else "auto",
                **learning_rate,
            },
            output=f"{output}/run",
            offline=True,
        )
        artefact = next(path for name in ("adapter", "model") if (path := Path(output, "run", name)).exists())
        artefact_bytes = sum(path.stat().st_size for path in artefact.rglob("*.safetensors"))
        used = recipe.load(f"{output}/run/recipe.yaml").train
    scores = result["metrics"]
    test = scores["test"] if given.test else {}
    return {
        f"dev_{main}": scores["validation"][main],
        "dev_f1_macro": scores["validation"]["f1_macro"],
        "dev_loss": scores["validation"]["loss"],
        f"test_{main}": test.get(main),
        "test_f1_macro": test.get("f1_macro"),
        "learning_rate": used.learning_rate,
        "trainable_parameters": result["trainable_parameters"],
        "seconds": result["seconds"],
        "examples_per_second": result["examples_per_second"],
        "cpu_seconds": round(time.process_time(), 1),
        "artefact_bytes": artefact_bytes,
        "peak_memory_bytes": result["peak_memory_bytes"],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "device": torch.cuda.get_device_name() if used.device == "cuda" else f"cpu, threads: {torch.get_num_threads()}",
    }


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pretrained model")
    parser.add_argument("--data", required=True, help="name of a folder under --data-root")
    parser.add_argument("--data-root", default="build/splits", help="output folder of bench/splits.py")
    parser.add_argument("--technique", choices=tuple(TECHNIQUES), required=True)
    parser.add_argument("--learning-rate", type=float, default=None, help="default: tunesmith's default")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--plain", action="store_true", help="disable the fast paths")
    parser.add_argument("--test", action="store_true", help="also evaluate on the test split")
    return parser.parse_args()


if __name__ == "__main__":
    print(json.dumps(run(arguments())))
