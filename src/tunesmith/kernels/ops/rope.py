"""Rotary positions: pairs of numbers turned by the angle of their place (RoFormer, Su 2021, arXiv 2104.09864), in the
format of x and without what lies between being kept:

    y1 = x1 cos1 - x2 sin1        y2 = x2 cos2 + x1 sin2        x1, x2: the halves of a head
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.ops.compiled import fused, fuses

__all__ = ["plain_rotated", "rotated"]


def plain_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Y of every head.  # (total, heads * width), (total, width) twice"""
    heads = x.unflatten(1, (-1, cos.shape[1]))
    x1, x2 = heads.chunk(2, -1)
    y: Tensor = heads * cos[:, None] + torch.cat([-x2, x1], -1) * sin[:, None]
    return y.flatten(1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `plain_rotated` gives."""
    if fuses(x):
        compiled: Tensor = fused(plain_rotated, x, cos, sin)
        return compiled
    found: Tensor = _Rotated.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return found


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        heads, half = x.view(len(x), -1, cos.shape[1]), cos.shape[1] // 2
        out = heads * cos[:, None]
        out[..., :half].addcmul_(heads[..., half:], sin[:, None, :half], value=-1)
        out[..., half:].addcmul_(heads[..., :half], sin[:, None, half:])
        return out.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        heads, half = grad.view(len(grad), -1, cos.shape[1]), cos.shape[1] // 2
        back = heads * cos[:, None]
        back[..., :half].addcmul_(heads[..., half:], sin[:, None, half:])
        back[..., half:].addcmul_(heads[..., :half], sin[:, None, :half], value=-1)
        return back.view_as(grad), None, None
