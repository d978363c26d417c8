"""Unsloth on CPU or GPU: its model and adapters, with TRL's trainer at best practice."""

from __future__ import annotations

from typing import Any

import unsloth  # must come first: it patches trl and transformers
from transformers import set_seed

from bench.arms.sft import trained
from bench.instructions import ADAPTER, MAX_LENGTH

LIBRARIES = ("unsloth", "unsloth_zoo", "trl", "transformers", "torch", "peft")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def go(job: dict[str, Any]) -> dict[str, Any]:
    """Train once from the pretrained weights."""
    set_seed(0)
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        job["model"], max_seq_length=MAX_LENGTH, load_in_4bit=False, dtype=None
    )
    adapted = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=ADAPTER["r"],
        lora_alpha=ADAPTER["lora_alpha"],
        lora_dropout=0.0,
        target_modules=list(LINEAR),
        use_gradient_checkpointing=False,
        random_state=0,
    )
    return trained(job, adapted)
