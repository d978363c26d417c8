"""(IA)3: learned factors on keys, values and what goes into the MLP's last map (Liu 2022, arXiv 2205.05638).

    k' = l_k * (W_k x + b)      v' = l_v * (W_v x + b)      y = W_down (l_ff * h) + b

with l = 1 at the start, so that the model answers as before. Each factor is one number per output (keys and values) or
input (the MLP). A fused projection is scaled whole.
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
    learn_only,
    peft_task_type,
    plain_linear,
    read_config,
    saved_whole,
    suffixes,
)

LEARNING_RATE = 2e-2
"""The best of three on validation (sst2, one epoch, one seed) with a model 384 wide: docs/techniques/ia3.md."""


class Ia3(Technique):
    """Learned factors on keys, values and what enters the MLP's last map (Liu 2022, arXiv 2205.05638).

    Learns 2 d + d_mlp factors a block, and what is new (the head).
    Use it for the smallest adapters that can be merged: many tasks over one base.
    """

    artefact: ClassVar[Literal["adapter", "model"]] = "adapter"

    target_modules: list[str] = Field(
        ["key", "value"], min_length=1, description="roles or module names whose outputs are scaled"
    )
    feedforward_modules: list[str] = Field(["mlp_down"], description="roles or module names whose inputs are scaled")

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Give every target its factors."""
        saved_whole(anatomy)
        of_inputs = set(anatomy.targets(self.feedforward_modules)) if self.feedforward_modules else set()
        learning = set(anatomy.learns_always)
        for path in (*of_inputs, *(path for path in anatomy.targets(self.target_modules) if path not in of_inputs)):
            linear: Any = model.get_submodule(path)
            outputs, inputs = linear.weight.shape[:: -1 if isinstance(linear, Conv1D) else 1]
            shape = (1, inputs) if path in of_inputs else (outputs, 1)  # as PEFT lays it out
            linear.ia3_l = nn.Parameter(torch.ones(shape, device=linear.weight.device))
            if path in of_inputs:
                linear.register_forward_pre_hook(_scale_input)
            else:
                linear.register_forward_hook(_scale_output)
            learning.add(f"{path}.ia3_l")
        learn_only(model, learning)

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
        """`LEARNING_RATE`; what multiplies states knows no width."""
        return LEARNING_RATE

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """A PEFT `IA3Config` that matches exactly the modules scaled here."""
        whole = saved_whole(anatomy)
        scaled = {path: linear for path, linear in _scaled(model)}
        of_inputs = {path for path, linear in scaled.items() if linear.ia3_l.shape[0] == 1}
        return {
            "peft_type": "IA3",
            "task_type": peft_task_type(model),
            "inference_mode": True,
            "target_modules": suffixes(model, scaled, whole),
            "feedforward_modules": suffixes(model, of_inputs, whole) if of_inputs else [],
            "fan_in_fan_out": any(isinstance(linear, Conv1D) for linear in scaled.values()),
            "modules_to_save": whole or None,
            "init_ia3_weights": True,
        }

    @classmethod
    def from_adapter(cls, folder: Path) -> Self:
        """The technique that a PEFT (IA)3 folder was trained with.

        Raises:
            CheckpointError: the folder cannot be read.
            RecipeError: it holds another kind of adapter.
        """
        config = read_config(folder, "IA3")
        targets, of_inputs = config.get("target_modules"), config.get("feedforward_modules") or []
        if not isinstance(targets, list) or not targets or not isinstance(of_inputs, list):
            raise RecipeError(
                "target_modules and feedforward_modules are read as lists of names",
                where=str(folder / "adapter_config.json"),
                hint="name the modules there",
            )
        return cls(target_modules=targets, feedforward_modules=of_inputs)


def _scaled(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, module) for path, module in model.named_modules() if hasattr(module, "ia3_l"))


def _scale_input(linear: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = args
    return ((x * linear.ia3_l[0]).to(x.dtype), *others)


def _scale_output(linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    scaled: Tensor = output * linear.ia3_l[:, 0]
    return scaled.to(output.dtype)
