"""Implementation of each technique for the peer: PEFT if it has the method, else plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn

OF_PEFT: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "lora": (LoraConfig, {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["query", "value"]}),
    "ia3": (
        IA3Config,
        {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "prompt": (PromptTuningConfig, {"num_virtual_tokens": 20}),
    "prefix": (PrefixTuningConfig, {"num_virtual_tokens": 20}),
}
"""Sizes are our defaults. "output.dense" matches both output layers of a BERT block, as PEFT's own mapping does."""

TECHNIQUES = ("full", "head", "last-2", "bitfit", "adapter", *OF_PEFT)
REDUCTION = 16


class WithBottleneck(nn.Module):
    """Linear layer followed by a Houlsby adapter (2019, arXiv 1902.00751) initialized to the identity."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        width = dense.out_features
        self.dense, self.down, self.up = (
            dense,
            nn.Linear(width, width // REDUCTION),
            nn.Linear(width // REDUCTION, width),
        )
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for start_at_zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start_at_zero)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        y: Tensor = self.dense(x)
        added: Tensor = self.up(F.gelu(self.down(y)))
        return y + added


def adapt(model: Any, technique: str, task_type: str, **changed: Any) -> Any:
    """Apply a technique; the head is always trainable. `changed` overrides keys of PEFT's config."""
    if technique in OF_PEFT:
        config, keys = OF_PEFT[technique]
        return get_peft_model(model, config(task_type=task_type, **keys | changed))
    if technique == "full":
        return model
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    if technique == "last-2":
        for part in (*model.base_model.encoder.layer[-2:], model.base_model.pooler):
            if part is not None:  # token-classification models have no pooler
                part.requires_grad_(True)
    if technique == "bitfit":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name.endswith(".bias"))
    if technique == "adapter":
        for block in model.base_model.encoder.layer:
            block.attention.output.dense = WithBottleneck(block.attention.output.dense)
            block.output.dense = WithBottleneck(block.output.dense)
    return model
