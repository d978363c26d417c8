"""A residual sum with dropout and the norm after it, as one autograd function.

    s = x + D * y        z = (s - mean s) / sqrt(var s + eps) * g + b        D: 0 with probability p, else 1 / (1 - p)

Statistics are taken in fp32 whatever the format of x; what is kept is s, D and two numbers a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.dropout import keep_scale

__all__ = ["add_norm", "plain_add_norm"]


def plain_add_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: float = 0.0
) -> Tensor:
    """The z of the module's formula."""
    return F.layer_norm(x + F.dropout(y, dropout), x.shape[-1:], weight, bias, eps)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: float = 0.0) -> Tensor:
    """What `plain_add_norm` gives, in the format of x and y.  # (..., width) twice -> (..., width)"""
    found: Tensor = _AddNorm.apply(x, y, weight, bias, eps, dropout)  # type: ignore[no-untyped-call]
    return found


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: float
    ) -> Tensor:
        keep = keep_scale(y, dropout) if dropout else None
        total = x + y if keep is None else torch.addcmul(x, y, keep)
        out, mean, root = torch.native_layer_norm(total, total.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(total, mean, root, weight, bias, keep)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, mean, root, weight, bias, keep = ctx.saved_tensors
        of_x, of_y, of_weight, of_bias, _, _ = ctx.needs_input_grad
        wanted = [of_x or of_y, of_weight, of_bias]
        d, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            grad, total, total.shape[-1:], mean, root, weight, bias, wanted
        )
        d_y = (d if keep is None else d * keep) if of_y else None
        return d if of_x else None, d_y, d_weight if of_weight else None, d_bias if of_bias else None, None, None
