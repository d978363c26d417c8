"""Element-wise arithmetic and norms, each as one autograd function that saves few tensors for the backward pass.

Residual sum and LayerNorm, or RMSNorm (Zhang 2019, arXiv 1910.07467):

    s = x + D * y        z = (s - mean s) / sqrt(var s + eps) * g + b        D: 0 with probability p, else 1 / (1 - p)
    s = x + y            z = s r * g,  r = 1 / sqrt(mean s^2 + eps)
    ds += r (g * dz) - s r^3 mean(s * g * dz)                                (RMSNorm)

Gated linear unit (GLU variants, Shazeer 2020, arXiv 2002.05202):

    y = f(g) * u        du = f(g) * dy        dg = f'(g) * u * dy

Rotary position embedding (RoFormer, Su 2021, arXiv 2104.09864):

    y1 = x1 cos1 - x2 sin1        y2 = x2 cos2 + x1 sin2        x1, x2: the halves of a head

Statistics are computed in fp32 for every dtype of x. On a GPU Inductor compiles the plain formula into one kernel for
any number of tokens; on a CPU the functions here are faster than what Inductor generates, and need no compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton

from tunesmith.kernels.ops.dropout import keep_scale

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_BACKWARD",
    "Activation",
    "add_norm",
    "add_rms_norm",
    "glu",
    "plain_add_norm",
    "plain_add_rms_norm",
    "plain_glu",
    "plain_rms_norm",
    "plain_rope",
    "rms_norm",
    "rope",
]

Activation = Literal["none", "gelu", "gelu_tanh", "relu", "silu"]

ACTIVATIONS: dict[str, Any] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
ACTIVATION_BACKWARD: dict[str, Any] = {
    "none": lambda grad, x: grad,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "silu": torch.ops.aten.silu_backward,
}

COMPILED_DEVICES = ("cuda",)
COMPILE_BACKEND = "inductor"


# --- compilation


def _is_compiled(x: Tensor) -> bool:
    return x.device.type in COMPILED_DEVICES and _has_compiler()


def _compute(formula: Callable[..., Any], function: type[torch.autograd.Function], x: Tensor, *inputs: Any) -> Any:
    """Call the compiled plain formula on a GPU with a compiler, else the autograd function."""
    return _run_compiled(formula, x, *inputs) if _is_compiled(x) else function.apply(x, *inputs)


def _run_compiled(formula: Callable[..., Any], *inputs: Any) -> Any:
    """Call the compiled formula in the dtype of its inputs; autograd differentiates it."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return _compiled(formula, COMPILE_BACKEND)(*inputs)


@cache
def _has_compiler() -> bool:
    return has_triton()


@cache
def _compiled(formula: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(formula, dynamic=True, backend=backend)  # Dynamo falls back to eager where it cannot compile


# --- norms


def plain_add_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return s and z of LayerNorm by the plain formula."""
    total = x + F.dropout(y, dropout)
    return total, F.layer_norm(_at_least_fp32(total), x.shape[-1:], weight, bias, eps).to(total.dtype)


def add_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the result of `plain_add_norm`, in the dtype of x and y.  # (..., width) twice -> (..., width) twice"""
    result: tuple[Tensor, Tensor] = _compute(plain_add_norm, _AddNorm, x, y, weight, bias, eps, dropout)
    return result


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout: float
    ) -> tuple[Tensor, Tensor]:
        keep = keep_scale(y, dropout) if dropout else None
        total = x + y if keep is None else torch.addcmul(x, y, keep)
        out, mean, rstd = torch.native_layer_norm(total, total.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(total, mean, rstd, weight, bias, keep)
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, mean, rstd, weight, bias, keep = ctx.saved_tensors
        needs_x, needs_y, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        d, d_weight, d_bias = grad_total, None, None
        if grad is not None:
            needed = [needs_x or needs_y, needs_weight, needs_bias]
            d, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
                grad, total, total.shape[-1:], mean, rstd, weight, bias, needed
            )
            if grad_total is not None and needed[0]:
                d += grad_total
        d_y = (d if keep is None or d is None else d * keep) if needs_y else None
        d_weight, d_bias = d_weight if needs_weight else None, d_bias if needs_bias else None
        return d if needs_x else None, d_y, d_weight, d_bias, None, None


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return z of RMSNorm for x alone by the plain formula."""
    wide = _at_least_fp32(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def plain_add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return s and z of RMSNorm by the plain formula."""
    return x + y, plain_rms_norm(x + y, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the result of `plain_rms_norm`, in the dtype of x."""
    if _is_compiled(x):
        compiled: Tensor = _run_compiled(plain_rms_norm, x, weight, eps)
        return compiled
    result: Tensor = _RmsNorm.apply(x, None, weight, eps)[1]  # type: ignore[no-untyped-call]
    return result


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the result of `plain_add_rms_norm`, in the dtype of x and y."""
    result: tuple[Tensor, Tensor] = _compute(plain_add_rms_norm, _RmsNorm, x, y, weight, eps)
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
        total = x if y is None else x + y
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(total, dim=-1, keepdim=True, dtype=wide)
        rstd = (length.square_() / total.shape[-1] + eps).rsqrt_()
        out = torch.mul(total, rstd, out=torch.empty_like(total)).mul_(weight.to(total.dtype))
        ctx.save_for_backward(total, rstd, weight)
        ctx.set_materialize_grads(False)
        return None if y is None else total, out

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, rstd, weight = ctx.saved_tensors
        needs_x, needs_y, needs_weight, _ = ctx.needs_input_grad
        if grad is None:
            return grad_total, grad_total if needs_y else None, None, None
        d_weight = None
        if needs_weight:
            d_weight = (grad * total).mul(rstd).sum(0, dtype=torch.promote_types(total.dtype, torch.float32))
            d_weight = d_weight.to(weight.dtype)
        if not (needs_x or needs_y):
            return None, None, d_weight, None
        grad = grad * weight.to(grad.dtype)
        mean = (grad * total).sum(-1, keepdim=True, dtype=rstd.dtype) * rstd.pow(3) / total.shape[-1]
        d = torch.mul(grad, rstd, out=torch.empty_like(grad))
        d -= torch.mul(total, mean, out=grad)
        if grad_total is not None:
            d += grad_total
        return d if needs_x else None, d if needs_y else None, d_weight, None


# --- gated linear unit


def plain_glu(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return y of the gated linear unit by the plain formula."""
    y: Tensor = ACTIVATIONS[activation](gate) * up
    return y


def glu(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return the result of `plain_glu`; only the two inputs are saved for the backward pass."""
    result: Tensor = _compute(plain_glu, _Glu, gate, up, activation)
    return result


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return torch.mul(ACTIVATIONS[activation](gate), up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        d_gate = ACTIVATION_BACKWARD[ctx.activation](grad * up, gate)
        return d_gate, ACTIVATIONS[ctx.activation](gate).mul_(grad), None


# --- rotary position embedding


def plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return y of every head by the plain formula.  # (total, heads * width), (total, width) twice"""
    heads = x.unflatten(1, (-1, cos.shape[1]))
    x1, x2 = heads.chunk(2, -1)
    y: Tensor = heads * cos[:, None] + torch.cat([-x2, x1], -1) * sin[:, None]
    return y.flatten(1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the result of `plain_rope`, in the dtype of x; only cos and sin are saved for the backward pass."""
    result: Tensor = _compute(plain_rope, _Rope, x, cos, sin)
    return result


class _Rope(torch.autograd.Function):
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
        d_x = heads * cos[:, None]
        d_x[..., :half].addcmul_(heads[..., half:], sin[:, None, half:])
        d_x[..., half:].addcmul_(heads[..., :half], sin[:, None, :half], value=-1)
        return d_x.view_as(grad), None, None
