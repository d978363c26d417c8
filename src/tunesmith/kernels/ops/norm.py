"""A residual sum and the norm after it, as one autograd function.

    s = x + D * y        z = (s - mean s) / sqrt(var s + eps) * g + b        D: 0 with probability p, else 1 / (1 - p)
    s = x + y            z = s r * g,  r = 1 / sqrt(mean s^2 + eps)          (RMSNorm, Zhang 2019, arXiv 1910.07467)
    ds += r (g * dz) - s r^3 mean(s * g * dz)                                of the second

Statistics are taken in fp32 whatever the format of x; what is kept is s, D and one or two numbers a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.ops.compiled import fused, fuses
from tunesmith.kernels.ops.dropout import keep_scale

__all__ = ["add_norm", "add_rms_norm", "plain_add_norm", "plain_add_rms_norm", "plain_rms_norm", "rms_norm"]


def plain_add_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """S and z of the module's first formula."""
    total = x + F.dropout(y, dropout)
    return total, F.layer_norm(_wide(total), x.shape[-1:], weight, bias, eps).to(total.dtype)


def add_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What `plain_add_norm` gives, in the format of x and y.  # (..., width) twice -> (..., width) twice"""
    if fuses(x):
        compiled: tuple[Tensor, Tensor] = fused(plain_add_norm, x, y, weight, bias, eps, dropout)
        return compiled
    found: tuple[Tensor, Tensor] = _AddNorm.apply(x, y, weight, bias, eps, dropout)  # type: ignore[no-untyped-call]
    return found


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: float
    ) -> tuple[Tensor, Tensor]:
        keep = keep_scale(y, dropout) if dropout else None
        total = x + y if keep is None else torch.addcmul(x, y, keep)
        out, mean, root = torch.native_layer_norm(total, total.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(total, mean, root, weight, bias, keep)
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(ctx: Any, of_total: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, mean, root, weight, bias, keep = ctx.saved_tensors
        of_x, of_y, of_weight, of_bias, _, _ = ctx.needs_input_grad
        d, d_weight, d_bias = of_total, None, None
        if grad is not None:
            wanted = [of_x or of_y, of_weight, of_bias]
            d, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
                grad, total, total.shape[-1:], mean, root, weight, bias, wanted
            )
            if of_total is not None and wanted[0]:
                d += of_total
        d_y = (d if keep is None or d is None else d * keep) if of_y else None
        return d if of_x else None, d_y, d_weight if of_weight else None, d_bias if of_bias else None, None, None


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The second z of the module's formula, of x alone."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def plain_add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """S and z of the module's second formula."""
    return x + y, plain_rms_norm(x + y, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `plain_rms_norm` gives, in the format of x."""
    if fuses(x):
        compiled: Tensor = fused(plain_rms_norm, x, weight, eps)
        return compiled
    found: Tensor = _RmsNorm.apply(x, None, weight, eps)[1]  # type: ignore[no-untyped-call]
    return found


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `plain_add_rms_norm` gives, in the format of x and y."""
    if fuses(x):
        compiled: tuple[Tensor, Tensor] = fused(plain_add_rms_norm, x, y, weight, eps)
        return compiled
    found: tuple[Tensor, Tensor] = _RmsNorm.apply(x, y, weight, eps)  # type: ignore[no-untyped-call]
    return found


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
        total = x if y is None else x + y
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(total, dim=-1, keepdim=True, dtype=wide)
        root = (length.square_() / total.shape[-1] + eps).rsqrt_()
        out = torch.mul(total, root, out=torch.empty_like(total)).mul_(weight.to(total.dtype))
        ctx.save_for_backward(total, root, weight)
        ctx.set_materialize_grads(False)
        return None if y is None else total, out

    @staticmethod
    def backward(ctx: Any, of_total: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, root, weight = ctx.saved_tensors
        of_x, of_y, of_weight, _ = ctx.needs_input_grad
        if grad is None:
            return of_total, of_total if of_y else None, None, None
        d_weight = None
        if of_weight:
            d_weight = (grad * total).mul(root).sum(0, dtype=torch.promote_types(total.dtype, torch.float32))
            d_weight = d_weight.to(weight.dtype)
        if not (of_x or of_y):
            return None, None, d_weight, None
        grad = grad * weight.to(grad.dtype)
        share = (grad * total).sum(-1, keepdim=True, dtype=root.dtype) * root.pow(3) / total.shape[-1]
        d = torch.mul(grad, root, out=torch.empty_like(grad))
        d -= torch.mul(total, share, out=grad)
        if of_total is not None:
            d += of_total
        return d if of_x else None, d if of_y else None, d_weight, None
