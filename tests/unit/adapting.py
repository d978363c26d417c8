"""Every technique, put on a model so that each of its parts shows in the model's answers."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith import registry
from tunesmith.models.anatomy import anatomy
from tunesmith.testing import tiny_tokenizer

TECHNIQUES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"target_modules": "all-linear"},
    "adapter": {},
    "prefix": {"num_virtual_tokens": 5},
    "prompt": {"num_virtual_tokens": 5},
    "bitfit": {},
    "ia3": {},
    "freeze": {"last_n_blocks": 1},
}


def adapt(model: Any, name: str) -> None:
    """Apply a technique with these keys; LoRA's B is drawn, since at zero nothing would show."""
    torch.manual_seed(0)
    technique: Any = registry.get("technique", name)
    technique(**TECHNIQUES[name]).apply(model, anatomy(model), tiny_tokenizer())
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
