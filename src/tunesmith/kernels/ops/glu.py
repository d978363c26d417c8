"""A gated activation, of which the two inputs are kept and nothing between (GLU variants, Shazeer 2020, arXiv
2002.05202):

    y = f(g) * u        du = f(g) * dy        dg = f'(g) * u * dy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.ops.compiled import fused, fuses
from tunesmith.kernels.ops.linear import ACTIVATIONS, SLOPES, Activation

__all__ = ["gated", "plain_gated"]


def plain_gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """The y of the module's formula."""
    y: Tensor = ACTIVATIONS[activation](gate) * up
    return y


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """What `plain_gated` gives."""
    if fuses(gate):
        compiled: Tensor = fused(plain_gated, gate, up, activation)
        return compiled
    found: Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return found


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return torch.mul(ACTIVATIONS[activation](gate), up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return SLOPES[ctx.activation](grad * up, gate), ACTIVATIONS[ctx.activation](gate).mul_(grad), None
