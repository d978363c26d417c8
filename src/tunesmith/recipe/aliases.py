"""Aliases of recipe keys and techniques, from Hugging Face, LLaMA-Factory and Axolotl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_INTERVAL = 10**9
"""Interval in steps that no run reaches: evaluation or saving happens at the end only."""


def _same(value: Any) -> Any:
    return value


def _targets(value: Any) -> Any:
    """Convert LLaMA-Factory's `all` and `q_proj,v_proj`."""
    if not isinstance(value, str):
        return value
    return "all-linear" if value == "all" else [name.strip() for name in value.split(",")]


def _strategy(value: Any) -> Any:
    """Convert Hugging Face's strategies; the best checkpoint is saved in any case."""
    return {"no": MAX_INTERVAL, "best": "epoch"}.get(value, value) if isinstance(value, str) else value


ALIASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "num_train_epochs": ("train.epochs", _same),
    "num_epochs": ("train.epochs", _same),
    "lr": ("train.learning_rate", _same),
    "lr_scheduler_type": ("train.schedule", lambda name: "constant" if name == "constant_with_warmup" else name),
    "optim": ("train.optimizer", lambda name: "adamw" if str(name).startswith("adamw") else name),
    "eval_steps": ("train.evaluate_every", _same),
    "eval_strategy": ("train.evaluate_every", _strategy),
    "evaluation_strategy": ("train.evaluate_every", _strategy),
    "save_steps": ("train.save_every", _same),
    "save_strategy": ("train.save_every", _strategy),
    "save_total_limit": ("train.keep_checkpoints", _same),
    "metric_for_best_model": ("train.metric", _same),
    "label_smoothing_factor": ("train.label_smoothing", _same),
    "patience": ("train.early_stopping_patience", _same),
    "bf16": ("train.precision", lambda on: "bf16" if on is True else on),
    "fp16": ("train.precision", lambda on: "fp16" if on is True else on),
    "model_name_or_path": ("model", _same),
    "base_model": ("model", _same),
    "output_dir": ("output", _same),
    "train_file": ("data.train", _same),
    "validation_file": ("data.validation", _same),
    "test_file": ("data.test", _same),
    "max_seq_length": ("data.max_length", _same),
    "cutoff_len": ("data.max_length", _same),
    "max_samples": ("data.limit", _same),
    "lora_r": ("technique.r", _same),
    "lora_rank": ("technique.r", _same),
    "lora_alpha": ("technique.alpha", _same),
    "lora_dropout": ("technique.dropout", _same),
    "lora_target_modules": ("technique.target_modules", _same),
    "lora_target": ("technique.target_modules", _targets),
    "use_rslora": ("technique.rslora", _same),
    "use_dora": ("technique.dora", _same),
    "init_lora_weights": ("technique.init", lambda how: "default" if how is True else how),
    "loraplus_lr_ratio": ("technique.lora_plus_ratio", _same),
}
"""Alias -> (dotted key, conversion of the value)."""

BATCH_SIZE_FACTORS = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Keys whose product, times the number of processes, is `train.batch_size`."""

STRATEGY_STEPS = {"eval_strategy": "eval_steps", "evaluation_strategy": "eval_steps", "save_strategy": "save_steps"}
"""Strategy key -> key of its interval, which holds where the strategy is `steps`."""

TECHNIQUE_SYNONYMS = {
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
"""Name of a technique elsewhere -> value of `technique` here."""
