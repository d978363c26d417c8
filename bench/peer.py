"""Settings, measurements and command line shared by the peer's scripts.

bf16 autocast (fp32 by option), dynamic padding, length-grouped batches, fused AdamW, linear schedule with warmup, best
epoch by validation score. Times cover training only, without evaluation and saving. `cpu_seconds` covers the whole
process and is comparable on a shared machine too.
"""

from __future__ import annotations

import argparse
import platform
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from bench.clock import Clock
from bench.peer_techniques import TECHNIQUES

LIBRARIES = ("torch", "transformers", "peft", "accelerate")


class TrainingTime(TrainerCallback):
    """Callback that times each epoch from its begin to its end, without evaluation and saving."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.clock.stop()


def work(
    *, epochs: float, batch_size: int, learning_rate: float, seed: int, device: str, save: str = "no"
) -> dict[str, Any]:
    """Return the training arguments shared by all arms of the Trainer and TRL."""
    return {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": 0.01,
        "warmup_steps": 0.06,  # values below 1 are a fraction of all steps
        "lr_scheduler_type": "linear",
        "seed": seed,
        "use_cpu": device == "cpu" or not torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": save,
    }


def best_practice(precision: str) -> dict[str, Any]:
    """Return the training arguments that an experienced user would choose."""
    return {
        "optim": "adamw_torch_fused",
        "bf16": precision == "bf16",
        "train_sampling_strategy": "group_by_length",
    }


def training_arguments(
    given: argparse.Namespace, output: str, metric: str, kind: type[TrainingArguments] = TrainingArguments, **more: Any
) -> TrainingArguments:
    """Return the training arguments at best practice with best-epoch selection, updated by `more`."""
    asked = {key: getattr(given, key) for key in ("epochs", "batch_size", "learning_rate", "seed", "device")}
    settings: dict[str, Any] = {
        "output_dir": output,
        "per_device_eval_batch_size": 64,
        "eval_strategy": "epoch",
        "save_only_model": True,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "label_names": ["labels"],
    }
    return kind(**work(**asked, save="epoch") | best_practice(given.precision) | settings | more)


def measure(
    given: argparse.Namespace, model: nn.Module, encoded: dict[str, Any], collator: Any, scores: Any, main: str
) -> dict[str, Any]:
    """Train, keep the best epoch by the metric `main` and evaluate it."""
    timer = TrainingTime()
    clock = timer.clock
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model=model,
            args=training_arguments(given, output, main),
            train_dataset=encoded["train"],
            eval_dataset=encoded["validation"],
            processing_class=collator.tokenizer,
            data_collator=collator,
            compute_metrics=scores,
            callbacks=[timer],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(f"{output}/artefact")
        artefact_bytes = weights_bytes(Path(output) / "artefact")
    dev = trainer.evaluate(encoded["validation"])
    best = trainer.state.best_metric
    assert best is None or abs(dev[f"eval_{main}"] - best) < 0.02, "the best checkpoint was not restored"
    test = trainer.evaluate(encoded["test"]) if given.test else {}
    examples = len(encoded["train"]) * given.epochs
    return {
        f"dev_{main}": dev[f"eval_{main}"],
        "dev_f1_macro": dev["eval_f1_macro"],
        f"test_{main}": test.get(f"eval_{main}"),
        "test_f1_macro": test.get("eval_f1_macro"),
        "learning_rate": given.learning_rate,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(clock.seconds, 2),
        "examples_per_second": round(examples / clock.seconds, 2),
        "cpu_seconds": round(time.process_time(), 1),
        "artefact_bytes": artefact_bytes,
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "device": device_name(trainer.args.device),
    }


def weights_bytes(folder: Path) -> int:
    """Return the total size of the safetensors files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def peak_memory_bytes(device: torch.device) -> int:
    """Return the allocator's peak on a GPU, else the peak resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    """Return the device name, for example 'NVIDIA H100 80GB HBM3' or 'cpu, threads: 1'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, threads: {torch.get_num_threads()}"


def arguments(about: str | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pretrained model")
    parser.add_argument("--data", required=True, help="name of a folder under --data-root")
    parser.add_argument("--data-root", default="build/splits", help="output folder of bench/splits.py")
    parser.add_argument("--technique", choices=TECHNIQUES, default="full")
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--test", action="store_true", help="also evaluate on the test split")
    return parser.parse_args()
