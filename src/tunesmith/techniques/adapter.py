"""Bottleneck adapters: A(x) = U f(D x + d) + u, small maps down to r and back up, beside frozen weights.

    houlsby    y' = y + A(y)    after the attention's and after the MLP's last map, before the residual is added
               (Houlsby 2019, arXiv 1902.00751)
    pfeiffer   only once a block. Where a norm N follows the residual sum z (BERT): N(z + A(N(z))); else after the
               MLP's last map as above (Pfeiffer 2021, arXiv 2005.00247)
    parallel   MLP'(x) = MLP(x) + s A(x), s = 4 (He 2022, arXiv 2110.04366)

r = hidden size / reduction_factor. U and u start at zero, so that the model answers as before.
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
from tunesmith.techniques import OWN_TYPE, Technique, learn_only, rate_by_width, saved_whole

LEARNING_RATE = 2e-3
"""The best of three on validation (sst2, one epoch, one seed) with a model 384 wide: docs/techniques/adapter.md."""

PARALLEL_SCALE = 4.0
"""Of He 2022, who found it better than a learned one."""


class Bottleneck(nn.Module):
    """Down, non-linearity, up; the up map starts at zero."""

    def __init__(self, width: int, r: int, activation: Literal["gelu", "relu"], scale: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, r), nn.Linear(r, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for start_at_zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start_at_zero)
        self.activation, self.scale = activation, scale
        self.heard: Tensor | None = None
        """What went into the MLP, from there to its end, where the parallel adapter adds to what comes out."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width), what is added."""
        inside = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.weight.dtype)
        hidden = F.relu(self.down(inside)) if self.activation == "relu" else F.gelu(self.down(inside))
        added: Tensor = self.scale * self.up(hidden)
        return added.to(x.dtype)


class Adapter(Technique):
    """Bottleneck adapters A(x) = U f(D x + d) + u beside frozen weights (Houlsby 2019, arXiv 1902.00751).

    Learns n (2 d r + d + r) parameters for n adapters of width r in a model d wide, and what is new (the head).
    Use it where LoRA's additions are too weak (a new language, a new kind of text). It costs a little at each answer,
    for it cannot be merged.
    """

    artefact: ClassVar[Literal["adapter", "model"]] = "adapter"
    cannot_merge: ClassVar[str] = "a non-linearity stands between its two maps"

    kind: Literal["houlsby", "pfeiffer", "parallel"] = Field("houlsby", description="where adapters sit")
    reduction_factor: float = Field(16.0, ge=1, description="hidden size / width of the bottleneck")

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Hang a bottleneck on every place."""
        saved_whole(anatomy)
        r = max(1, int(anatomy.hidden_size / self.reduction_factor))
        activation: Literal["gelu", "relu"] = "gelu" if self.kind == "houlsby" else "relu"
        scale = PARALLEL_SCALE if self.kind == "parallel" else 1.0
        inputs = dict(zip(anatomy.roles.get("mlp_down", ()), anatomy.roles.get("mlp_up", ()), strict=False))
        learning = set(anatomy.learns_always)
        for path in self._places(anatomy):
            place: Any = model.get_submodule(path)
            width = place.weight.shape[-1] if place.weight.ndim == 1 else _outputs(place)
            place.adapter = Bottleneck(width, r, activation, scale).to(place.weight.device)
            learning |= {f"{path}.adapter.{name}" for name, _ in place.adapter.named_parameters()}
            if self.kind == "parallel":
                model.get_submodule(inputs[path]).register_forward_pre_hook(partial(_listen, place.adapter))
                place.register_forward_hook(_beside)
            else:
                place.register_forward_hook(_around_norm if path in anatomy.roles.get("last_norm", ()) else _after)
        learn_only(model, learning)

    def _places(self, anatomy: Anatomy) -> tuple[str, ...]:
        roles = anatomy.roles
        if self.kind == "pfeiffer" and "last_norm" in roles:
            return roles["last_norm"]
        second = {"houlsby": ("attention_output",), "pfeiffer": (), "parallel": ("mlp_up",)}[self.kind]
        wanted = ("mlp_down", *second)
        if missing := [role for role in wanted if role not in roles]:
            raise RecipeError(
                f"where the {missing[0]} of this {anatomy.family} model is, is not known",
                where="technique.kind",
                hint="use technique=lora, whose targets can be named",
            )
        return tuple(path for role in wanted if role != "mlp_up" for path in roles[role])

    def learning_rate(self, anatomy: Anatomy) -> float:
        """`LEARNING_RATE`, falling with the width."""
        return rate_by_width(LEARNING_RATE, anatomy, power=0.5)

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """Our own layout, for PEFT has no bottlenecks."""
        return {"peft_type": f"{OWN_TYPE}BOTTLENECK", "kind": self.kind, "reduction_factor": self.reduction_factor}


def _outputs(linear: Any) -> int:
    """How many numbers a linear map gives out."""
    return int(linear.nf if hasattr(linear, "nf") else linear.out_features)


def _after(place: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    added: Tensor = place.adapter(output)
    return output + added


def _around_norm(norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """N(z + A(N(z))) from z and N(z); the norm itself is asked, without this hook."""
    again: Tensor = norm.forward(args[0] + norm.adapter(output))
    return again


def _listen(adapter: Bottleneck, up: nn.Module, args: tuple[Tensor, ...]) -> None:
    adapter.heard = args[0]


def _beside(down: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    heard, down.adapter.heard = down.adapter.heard, None
    added: Tensor = down.adapter(heard)
    return output + added
