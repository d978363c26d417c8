"""Linear layers that share one input, each with or without a low-rank addition (LoRA, Hu 2021, arXiv 2106.09685), as
one autograd function:

    y_i = W_i f(x) + b_i + s_i B_i (A_i f(x))          f: an activation, or the identity
    dx  = f'(x) * sum of (W_i^T dy_i + A_i^T g_i)      g_i = s_i B_i^T dy_i

The input is cast and saved once for all layers. The backward pass recomputes f(x). The low-rank product is added in
place to the layer's output. Gradients that are not needed are not computed.

With a magnitude m the rows of W' = W + s B A are scaled to the norm m: W'' = m * W' / |W'|, where the gradient treats
the norm as a constant (DoRA, Liu 2024, arXiv 2402.09353, section 4.3). `plain_linears` and `lora_linear` are the plain
formulas.

Shapes: x (..., in), W (out, in), transposed (in, out), or quantized, A (r, in), B (out, r), b and m (out,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.kernels.ops.elementwise import ACTIVATION_BACKWARD, ACTIVATIONS, Activation
from tunesmith.kernels.ops.grad_buffers import NO_BUFFERS, GradBuffer, GradBuffers
from tunesmith.kernels.ops.quantized import QuantizedWeight

__all__ = [
    "LinearPart",
    "adapted_weight",
    "apply_linears",
    "compute_dtype",
    "linear_part",
    "linears",
    "lora_linear",
    "plain_linears",
]


@dataclass(frozen=True)
class LinearPart:
    """One layer: weight (out, in), bias (out,), and for a low-rank addition A (r, in), B (out, r) and its scale."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 1.0


def linear_part(module: Any) -> LinearPart | None:
    """Return the operands of a linear layer or of a module with a method `part()`; None for others and with hooks."""
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.Linear:
        return LinearPart(module.weight, module.bias)
    if type(module) is Conv1D:
        return LinearPart(module.weight.t(), module.bias)
    part: LinearPart | None = module.part() if hasattr(module, "part") else None
    return part


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products: that of autocast, else that of the input."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def plain_linears(x: Tensor, parts: Sequence[LinearPart], activation: Activation = "none") -> tuple[Tensor, ...]:
    """Return each y by the plain formula."""
    x = ACTIVATIONS[activation](x)
    return tuple(
        F.linear(x, part.weight, part.bias)
        if part.A is None or part.B is None
        else lora_linear(x, part.weight, part.bias, part.A, part.B, part.scaling)
        for part in parts
    )


def linears(
    x: Tensor, parts: Sequence[LinearPart], activation: Activation = "none", buffers: GradBuffers = NO_BUFFERS
) -> tuple[Tensor, ...]:
    """Return each y of the module's formula, in `compute_dtype`.  # (..., in) -> (..., out) for each part"""
    tensors = [tensor for part in parts for tensor in (part.weight, part.bias, part.A, part.B)]
    own = tuple(buffers.of(tensor) for tensor in tensors)
    scales = tuple(part.scaling for part in parts)
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])  # each view is a node of autograd's graph
    ys: tuple[Tensor, ...] = _Linears.apply(flat, compute_dtype(x), activation, scales, own, *tensors)  # type: ignore[no-untyped-call]
    return ys if x.ndim == 2 else tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def apply_linears(
    x: Tensor, *modules: nn.Module, activation: Activation = "none", buffers: GradBuffers = NO_BUFFERS
) -> tuple[Tensor, ...]:
    """Apply linear layers to one input; if one of them has no `LinearPart`, call each module by itself."""
    parts = [linear_part(module) for module in modules]
    if all(part is not None for part in parts):
        return linears(x, parts, activation, buffers)  # type: ignore[arg-type]
    x = ACTIVATIONS[activation](x)
    return tuple(module(x[None])[0].to(x.dtype) for module in modules)


def _narrow_product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y for a y of few columns; in fp32 on a CPU eight columns take 3 to 8 times as long as eight rows."""
    return (y.t() @ x.t()).t() if x.dtype == torch.float32 and x.device.type == "cpu" else x @ y


def _sum_rows(dy: Tensor) -> Tensor:
    """Sum over rows, in fp32 on a GPU; a CPU accumulates in fp32 anyway, and would copy the whole input first."""
    return dy.sum(0) if dy.device.type == "cpu" else dy.sum(0, dtype=torch.float32)


def _cast(tensor: Tensor, dtype: torch.dtype, buffer: GradBuffer | None) -> Tensor:
    """Cast to a dtype; in inference mode without the buffer, because autograd cannot use tensors created there."""
    if tensor.dtype == dtype or buffer is None or torch.is_inference_mode_enabled():
        return tensor.to(dtype)
    return buffer.cast(tensor, dtype)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dtype: torch.dtype,
        activation: str,
        scales: tuple[float, ...],
        buffers: tuple[GradBuffer | None, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        own = x.to(dtype)
        inside = ACTIVATIONS[activation](own)
        outputs, kept = [], []
        for number, scale in enumerate(scales):
            first = 4 * number
            weight, bias, A, B = (
                None if tensor is None else _cast(tensor, dtype, buffer)
                for tensor, buffer in zip(tensors[first : first + 4], buffers[first : first + 4], strict=True)
            )
            assert weight is not None, "a part has a weight"
            y = F.linear(inside, weight, bias)
            low = None
            if A is not None and B is not None:
                low, B = _narrow_product(inside, A.t()), B * scale
                y.addmm_(low, B.t())
            outputs.append(y)
            kept += [weight, A, B, low]
        needs = ctx.needs_input_grad[5:]
        ctx.activation, ctx.scales = activation, scales
        ctx.buffered = list(zip(tensors[::4], buffers[::4], strict=True))
        ctx.dtypes = x.dtype, tuple(None if tensor is None else tensor.dtype for tensor in tensors)
        ctx.save_for_backward(own if activation != "none" or any(needs) else None, *kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        own, *kept = ctx.saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        inside = ACTIVATIONS[ctx.activation](own) if any(needs) else None
        d_tensors: list[Tensor | None] = []
        grad_x: Tensor | None = None
        for number, (dy, scale) in enumerate(zip(grads, ctx.scales, strict=True)):
            weight, A, B, low = kept[4 * number : 4 * number + 4]
            needs_weight, needs_bias, needs_A, needs_B = needs[4 * number : 4 * number + 4]
            back = _narrow_product(dy, B) if B is not None and (needs_x or needs_A) else None
            if needs_x:
                grad_x = dy @ weight if grad_x is None else grad_x.addmm_(dy, weight)
                if back is not None:
                    grad_x.addmm_(back, A)
            stored, buffer = ctx.buffered[number]
            direct = needs_weight and buffer is not None and inside is not None
            if direct:
                buffer.add_gradient(stored, dy, inside)
            d_tensors += [
                dy.t() @ inside if needs_weight and inside is not None and not direct else None,
                _sum_rows(dy) if needs_bias else None,
                back.t() @ inside if needs_A and back is not None and inside is not None else None,
                (low.t() @ dy).t() * scale if needs_B else None,
            ]
        if grad_x is not None:
            grad_x = ACTIVATION_BACKWARD[ctx.activation](grad_x, own).to(ctx.dtypes[0])
        typed = (None if one is None else one.to(dtype) for one, dtype in zip(d_tensors, ctx.dtypes[1], strict=True))
        return grad_x, None, None, None, None, *typed


# --- LoRA and DoRA by the plain formula


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    transposed: bool = False,
    dropout: float = 0.0,
    magnitude: Tensor | None = None,
) -> Tensor:
    """Return y = x W'^T + b, or x W''^T + b with a magnitude, in the dtype of the base layer's output.

    `dropout` applies to the input of A alone. A, B and m may have a wider dtype than W. It works in fp32, under
    autocast, and without autocast with W and x in bf16.
    """
    base_bias = bias if magnitude is None else None
    if isinstance(weight, QuantizedWeight):
        base = weight.product(x, base_bias)
    else:
        base = F.linear(x, weight.t() if transposed else weight, base_bias)
    inside = x if torch.is_autocast_enabled(x.device.type) else x.to(A.dtype)
    low = F.linear(F.linear(F.dropout(inside, dropout), A), B)
    if magnitude is None:
        return (base + scaling * low).to(base.dtype)
    norms = _row_norms(weight, A, B, scaling, transposed)
    scaled = (base + scaling * low) * (magnitude / norms)
    return (scaled if bias is None else scaled + bias).to(base.dtype)


@torch.no_grad()
def adapted_weight(
    weight: Tensor | QuantizedWeight,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    transposed: bool,
    magnitude: Tensor | None = None,
) -> Tensor:
    """Return W' (W'' with a magnitude) in fp32, in the layout that `weight` has, or had before it was quantized."""
    with torch.autocast(A.device.type, enabled=False):
        change = scaling * (B.float() @ A.float())
        if isinstance(weight, QuantizedWeight):
            plain = weight.dequantized().t() if transposed else weight.dequantized()
        else:
            plain = weight.float()
        adapted = plain + (change.t() if transposed else change)
        if magnitude is not None:
            scale = magnitude.float() / _row_norms(weight, A, B, scaling, transposed)
            adapted = adapted * (scale if transposed else scale[:, None])
    return adapted


def _row_norms(weight: Tensor | QuantizedWeight, A: Tensor, B: Tensor, scaling: float, transposed: bool) -> Tensor:
    """Return the norm |W'| of each output, which is never zero.  # (out,)"""
    adapted = adapted_weight(weight, A, B, scaling, transposed=transposed)
    norms: Tensor = torch.linalg.vector_norm(adapted, dim=0 if transposed else 1)
    return norms.clamp(min=torch.finfo(torch.float32).tiny)
