"""Apply a technique so that each of its parts affects the outputs of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *(("adapter", {"kind": kind}) for kind in ("pfeiffer", "parallel")),
    ("lora", {"dora": True, "target_modules": "all-linear"}),
    ("lora", {"rslora": True, "target_modules": ["attention_output", "mlp_down"]}),
    ("lora", {"init": "pissa"}),
    ("ia3", {"target_modules": ["query"], "feedforward_modules": ["mlp_up"]}),
    ("prefix", {"num_virtual_tokens": 3, "reparameterize": 8}),
    *(("peft", {"type": kind}) for kind in ("LOHA", "OFT", "LN_TUNING", "HRA")),
]
"""Further settings of the techniques."""


def adapt(model: Any, name: str, keys: dict[str, Any] | None = None) -> None:
    """Apply a technique, by default with the keys in `TECHNIQUES`; LoRA's B is random, as zero would have no effect."""
    torch.manual_seed(0)
    technique: Any = registry.get("technique", name)
    technique(**(TECHNIQUES[name] if keys is None else keys)).apply(model, anatomy(model), tiny_tokenizer())
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)


def trainable(model: nn.Module) -> set[str]:
    """Return the names of the trainable parameters."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
