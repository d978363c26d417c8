"""Names that other tools give to keys of a recipe: Hugging Face, LLaMA-Factory, Axolotl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SAME: Callable[[Any], Any] = lambda value: value  # noqa: E731


def _targets(given: Any) -> Any:
    """LLaMA-Factory's `all` and `q_proj,v_proj`."""
    if not isinstance(given, str):
        return given
    return "all-linear" if given == "all" else [name.strip() for name in given.split(",")]


NEVER = 10**9
"""Steps after which a run is over: what is due then is done at the end alone."""


def _strategy(given: Any) -> Any:
    """Hugging Face's `no`; its `best` is saved by us whatever is asked for."""
    return {"no": NEVER, "best": "epoch"}.get(given, given) if isinstance(given, str) else given


ALIASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "num_train_epochs": ("train.epochs", SAME),
    "num_epochs": ("train.epochs", SAME),
    "lr": ("train.learning_rate", SAME),
    "lr_scheduler_type": ("train.schedule", lambda name: "constant" if name == "constant_with_warmup" else name),
    "optim": ("train.optimizer", lambda name: "adamw" if str(name).startswith("adamw") else name),
    "eval_steps": ("train.evaluate_every", SAME),
    "eval_strategy": ("train.evaluate_every", _strategy),
    "evaluation_strategy": ("train.evaluate_every", _strategy),
    "save_steps": ("train.save_every", SAME),
    "save_strategy": ("train.save_every", _strategy),
    "save_total_limit": ("train.keep_checkpoints", SAME),
    "metric_for_best_model": ("train.metric", SAME),
    "label_smoothing_factor": ("train.label_smoothing", SAME),
    "patience": ("train.early_stopping_patience", SAME),
    "bf16": ("train.precision", lambda on: "bf16" if on is True else on),
    "fp16": ("train.precision", lambda on: "fp16" if on is True else on),
    "model_name_or_path": ("model", SAME),
    "base_model": ("model", SAME),
    "output_dir": ("output", SAME),
    "train_file": ("data.train", SAME),
    "validation_file": ("data.validation", SAME),
    "test_file": ("data.test", SAME),
    "max_seq_length": ("data.max_length", SAME),
    "cutoff_len": ("data.max_length", SAME),
    "max_samples": ("data.limit", SAME),
    "lora_r": ("technique.r", SAME),
    "lora_rank": ("technique.r", SAME),
    "lora_alpha": ("technique.alpha", SAME),
    "lora_dropout": ("technique.dropout", SAME),
    "lora_target_modules": ("technique.target_modules", SAME),
    "lora_target": ("technique.target_modules", _targets),
    "use_rslora": ("technique.rslora", SAME),
    "use_dora": ("technique.dora", SAME),
    "init_lora_weights": ("technique.init", lambda how: "default" if how is True else how),
    "loraplus_lr_ratio": ("technique.lora_plus_ratio", SAME),
}
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
STEPS = {"eval_strategy": "eval_steps", "evaluation_strategy": "eval_steps", "save_strategy": "save_steps"}

KIN = {
    "qlora": "{name: lora, bits: 4}",
    "dora": "{name: lora, dora: true}",
    "rslora": "{name: lora, rslora: true}",
    "pissa": "{name: lora, init: pissa}",
    "lora+": "{name: lora, lora_plus_ratio: 16}",
    "p-tuning": "prompt",
    "p-tuning-v2": "prefix",
    "prompt-tuning": "prompt",
    "prefix-tuning": "prefix",
    "linear-probe": "{name: freeze, head_only: true}",
}
"""What a technique is called elsewhere -> how it is written here."""
