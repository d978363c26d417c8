"""(IA)3: trained factors on keys, values and the input of the MLP's output layer (Liu 2022, arXiv 2205.05638).

    k' = l_k * (W_k x + b)      v' = l_v * (W_v x + b)      y = W_down (l_ff * h) + b

l is initialized to 1, so the model starts as the base. It has one factor per output (keys and values) or per input
(the MLP). A fused projection is scaled as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import RecipeError
from tunesmith.models.anatomy import Anatomy
from tunesmith.techniques import (
    Technique,
    modules_to_save,
    peft_task_type,
    plain_linear,
    read_config,
    set_trainable,
    suffixes,
)

LEARNING_RATE = 2e-2
"""Best of three on validation (sst2, one epoch, one seed) at hidden size 384: docs/techniques/ia3.md."""


class Ia3(Technique):
    """Trained factors on keys, values and the input of the MLP's output layer (Liu 2022, arXiv 2205.05638).

    Trains 2 d + d_mlp factors per block, and the new head.
    Use it for the smallest adapters that can be merged: many tasks over one base.
    """

    artifact: ClassVar[Literal["adapter", "model"]] = "adapter"

    target_modules: list[str] = Field(
        ["key", "value"], min_length=1, description="roles or module names whose outputs are scaled"
    )
    feedforward_modules: list[str] = Field(["mlp_down"], description="roles or module names whose inputs are scaled")

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Return the paper's targets, and scaled outputs alone."""
        return [{}, {"target_modules": ["query", "attention_output"], "feedforward_modules": []}]

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Add factors to every target."""
        modules_to_save(anatomy)
        input_scaled = set(anatomy.targets(self.feedforward_modules)) if self.feedforward_modules else set()
        trainable = set(anatomy.always_trainable)
        for path in (
            *input_scaled,
            *(path for path in anatomy.targets(self.target_modules) if path not in input_scaled),
        ):
            linear: Any = model.get_submodule(path)
            outputs, inputs = linear.weight.shape[:: -1 if isinstance(linear, Conv1D) else 1]
            shape = (1, inputs) if path in input_scaled else (outputs, 1)  # PEFT's layout
            linear.ia3_l = nn.Parameter(torch.ones(shape, device=linear.weight.device))
            if path in input_scaled:
                linear.register_forward_pre_hook(_scale_input)
            else:
                linear.register_forward_hook(_scale_output)
            trainable.add(f"{path}.ia3_l")
        set_trainable(model, trainable)

    def merge(self, model: nn.Module) -> None:
        """Multiply the factors into the weights."""
        for path, linear in list(_scaled(model)):
            transposed = isinstance(linear, Conv1D)
            factors, weight, bias = linear.ia3_l.float(), linear.weight.float(), linear.bias
            weight = weight * (factors.t() if transposed else factors)
            if factors.shape[0] != 1 and bias is not None:
                bias = (bias.float() * factors[:, 0]).to(bias.dtype)
            plain = plain_linear(weight.to(linear.weight.dtype), bias, transposed=transposed)
            model.set_submodule(path, plain.train(linear.training))

    def learning_rate(self, anatomy: Anatomy) -> float:
        """Return `LEARNING_RATE`, independent of the width."""
        return LEARNING_RATE

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """Return a PEFT `IA3Config` that matches exactly the scaled modules."""
        whole = modules_to_save(anatomy)
        scaled = {path: linear for path, linear in _scaled(model)}
        input_scaled = {path for path, linear in scaled.items() if linear.ia3_l.shape[0] == 1}
        return {
            "peft_type": "IA3",
            "task_type": peft_task_type(model),
            "inference_mode": True,
            "target_modules": suffixes(model, scaled, whole),
            "feedforward_modules": suffixes(model, input_scaled, whole) if input_scaled else [],
            "fan_in_fan_out": any(isinstance(linear, Conv1D) for linear in scaled.values()),
            "modules_to_save": whole or None,
            "init_ia3_weights": True,
        }

    @classmethod
    def from_adapter(cls, folder: Path) -> Self:
        """Return the technique of a PEFT (IA)3 adapter.

        Raises:
            CheckpointError: the folder cannot be read.
            RecipeError: the adapter has another type.
        """
        config = read_config(folder, "IA3")
        targets, input_scaled = config.get("target_modules"), config.get("feedforward_modules") or []
        if not isinstance(targets, list) or not targets or not isinstance(input_scaled, list):
            raise RecipeError(
                "target_modules and feedforward_modules must be lists of names",
                where=str(folder / "adapter_config.json"),
                hint="list the module names there",
            )
        return cls(target_modules=targets, feedforward_modules=input_scaled)


def _scaled(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, module) for path, module in model.named_modules() if hasattr(module, "ia3_l"))


def _scale_input(linear: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = args
    return ((x * linear.ia3_l[0]).to(x.dtype), *others)


def _scale_output(linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    scaled: Tensor = output * linear.ia3_l[:, 0]
    return scaled.to(output.dtype)
