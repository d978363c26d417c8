"""Bottleneck adapters: A(x) = U f(D x + d) + u, a projection down to r and back up, in a frozen model.

    houlsby    y' = y + A(y)    after the output layers of attention and MLP, before the residual is added
               (Houlsby 2019, arXiv 1902.00751)
    pfeiffer   once per block. If a norm N follows the residual sum z (BERT): N(z + A(N(z))); else after the output
               layer of the MLP as above (Pfeiffer 2021, arXiv 2005.00247)
    parallel   MLP'(x) = MLP(x) + s A(x), s = 4 (He 2022, arXiv 2110.04366)

r = hidden size / reduction_factor. U and u are initialized to zero, so the model starts as the base.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tunesmith.errors import RecipeError
from tunesmith.models.anatomy import Anatomy
from tunesmith.techniques import OWN_TYPE, Technique, modules_to_save, rate_by_width, set_trainable

LEARNING_RATE = 2e-3
"""Best of three on validation (sst2, one epoch, one seed) at hidden size 384: docs/techniques/adapter.md."""

PARALLEL_SCALE = 4.0
"""Scale of the parallel adapter; better than a learned scale in He 2022."""


class Bottleneck(nn.Module):
    """Down-projection, activation and up-projection; the up-projection is initialized to zero."""

    def __init__(self, width: int, r: int, activation: Literal["gelu", "relu"], scale: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, r), nn.Linear(r, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)
        self.activation, self.scale = activation, scale
        self.mlp_input: Tensor | None = None
        """Input of the MLP, kept during its forward pass for the parallel adapter."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the addition to the hidden states."""  # (..., width) -> (..., width)
        inside = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.weight.dtype)
        hidden = F.relu(self.down(inside)) if self.activation == "relu" else F.gelu(self.down(inside))
        added: Tensor = self.scale * self.up(hidden)
        return added.to(x.dtype)


class Adapter(Technique):
    """Bottleneck adapters A(x) = U f(D x + d) + u in a frozen model (Houlsby 2019, arXiv 1902.00751).

    Trains n (2 d r + d + r) parameters for n adapters of width r at hidden size d, and the new head.
    Use it where LoRA is too weak (a new language or domain). It cannot be merged, so inference is slightly slower.
    """

    artifact: ClassVar[Literal["adapter", "model"]] = "adapter"
    cannot_merge: ClassVar[str] = "an activation function lies between its two layers"

    kind: Literal["houlsby", "pfeiffer", "parallel"] = Field("houlsby", description="position of the adapters")
    reduction_factor: float = Field(16.0, ge=1, description="hidden size / bottleneck width")

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Return one variant per position."""
        return [{"kind": kind} for kind in ("houlsby", "pfeiffer", "parallel")]

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Insert a bottleneck at every position."""
        modules_to_save(anatomy)
        r = max(1, int(anatomy.hidden_size / self.reduction_factor))
        activation: Literal["gelu", "relu"] = "gelu" if self.kind == "houlsby" else "relu"
        scale = PARALLEL_SCALE if self.kind == "parallel" else 1.0
        inputs = dict(zip(anatomy.roles.get("mlp_down", ()), anatomy.roles.get("mlp_up", ()), strict=False))
        trainable = set(anatomy.always_trainable)
        for path in self._positions(anatomy):
            module: Any = model.get_submodule(path)
            width = module.weight.shape[-1] if module.weight.ndim == 1 else _out_features(module)
            module.adapter = Bottleneck(width, r, activation, scale).to(module.weight.device)
            trainable |= {f"{path}.adapter.{name}" for name, _ in module.adapter.named_parameters()}
            if self.kind == "parallel":
                model.get_submodule(inputs[path]).register_forward_pre_hook(partial(_keep_mlp_input, module.adapter))
                module.register_forward_hook(_add_parallel)
            else:
                module.register_forward_hook(_apply_norm if path in anatomy.roles.get("last_norm", ()) else _add)
        set_trainable(model, trainable)

    def _positions(self, anatomy: Anatomy) -> tuple[str, ...]:
        roles = anatomy.roles
        if self.kind == "pfeiffer" and "last_norm" in roles:
            return roles["last_norm"]
        second = {"houlsby": ("attention_output",), "pfeiffer": (), "parallel": ("mlp_up",)}[self.kind]
        wanted = ("mlp_down", *second)
        if missing := [role for role in wanted if role not in roles]:
            raise RecipeError(
                f"the {missing[0]} of this {anatomy.family} model is unknown",
                where="technique.kind",
                hint="use technique=lora with target_modules",
            )
        return tuple(path for role in wanted if role != "mlp_up" for path in roles[role])

    def learning_rate(self, anatomy: Anatomy) -> float:
        """Return `LEARNING_RATE`, scaled by the width."""
        return rate_by_width(LEARNING_RATE, anatomy, power=0.5)

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """Return a config of our own; PEFT has no bottleneck adapters."""
        return {"peft_type": f"{OWN_TYPE}BOTTLENECK", "kind": self.kind, "reduction_factor": self.reduction_factor}


def _out_features(linear: Any) -> int:
    return int(linear.nf if hasattr(linear, "nf") else linear.out_features)


def _add(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    added: Tensor = module.adapter(output)
    return output + added


def _apply_norm(norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return N(z + A(N(z))) from z and N(z)."""
    normalized: Tensor = norm.forward(args[0] + norm.adapter(output))  # forward() does not run this hook again
    return normalized


def _keep_mlp_input(adapter: Bottleneck, up: nn.Module, args: tuple[Tensor, ...]) -> None:
    adapter.mlp_input = args[0]


def _add_parallel(down: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    mlp_input, down.adapter.mlp_input = down.adapter.mlp_input, None
    added: Tensor = down.adapter(mlp_input)
    return output + added
