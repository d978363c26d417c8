"""Linear maps of one input, each with or without a low-rank addition, as one autograd function (LoRA, Hu 2021, arXiv
2106.09685):

    y_i = W_i f(x) + b_i + s_i B_i (A_i f(x))          f: an activation, or nothing
    dx  = f'(x) * sum of (W_i^T dy_i + A_i^T g_i)      g_i = s_i B_i^T dy_i

The input is cast and kept once for all maps and their additions; f(x) is made again where backward needs it; an
addition falls onto the product in the product's own pass; what nobody learns from is not computed. `plain_linears` is
the same written plainly, through `lora_linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.kernels.ops.grad_buffers import kept_of
from tunesmith.kernels.ops.lora import lora_linear

__all__ = [
    "ACTIVATIONS",
    "SLOPES",
    "Activation",
    "Part",
    "compute_dtype",
    "linears",
    "mapped",
    "part_of",
    "plain_linears",
]

Activation = Literal["none", "gelu", "gelu_tanh", "relu", "silu"]

ACTIVATIONS: dict[str, Any] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
SLOPES: dict[str, Any] = {
    "none": lambda grad, x: grad,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "silu": torch.ops.aten.silu_backward,
}


@dataclass(frozen=True)
class Part:
    """One map: weight (out, in), bias (out,), and where it has an addition, A (r, in), B (out, r) and its scale."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 1.0


def part_of(module: Any) -> Part | None:
    """What a module computes, where that is a `Part`: a plain linear map, or one that says so by `part()`."""
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.Linear:
        return Part(module.weight, module.bias)
    if type(module) is Conv1D:
        return Part(module.weight.t(), module.bias)
    part: Part | None = module.part() if hasattr(module, "part") else None
    return part


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products are computed in: autocast's format, else that of the input."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def plain_linears(x: Tensor, parts: Sequence[Part], activation: Activation = "none") -> tuple[Tensor, ...]:
    """The y of the module's formula, one by one."""
    x = ACTIVATIONS[activation](x)
    return tuple(
        F.linear(x, part.weight, part.bias)
        if part.A is None or part.B is None
        else lora_linear(x, part.weight, part.bias, part.A, part.B, part.scaling)
        for part in parts
    )


def linears(x: Tensor, parts: Sequence[Part], activation: Activation = "none") -> tuple[Tensor, ...]:
    """The y of the module's formula, in `compute_dtype`.  # (..., in) -> (..., out) for each part"""
    tensors = [tensor for part in parts for tensor in (part.weight, part.bias, part.A, part.B)]
    scales = tuple(part.scaling for part in parts)
    flat = x.reshape(-1, x.shape[-1])
    found: tuple[Tensor, ...] = _Linears.apply(flat, compute_dtype(x), activation, scales, *tensors)  # type: ignore[no-untyped-call]
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in found)


def mapped(x: Tensor, *modules: nn.Module, activation: Activation = "none") -> tuple[Tensor, ...]:
    """What maps of one input give; a module that is no `Part` is called as it is."""
    parts = [part_of(module) for module in modules]
    if all(part is not None for part in parts):
        return linears(x, parts, activation)  # type: ignore[arg-type]
    x = ACTIVATIONS[activation](x)
    return tuple(module(x[None])[0].to(x.dtype) for module in modules)


def _narrow(x: Tensor, y: Tensor) -> Tensor:
    """The product x y of few columns, in fp32 on a CPU from the other side: eight columns take it 3 to 8 times as long
    as eight rows.
    """
    return (y.t() @ x.t()).t() if x.dtype == torch.float32 and x.device.type == "cpu" else x @ y


def _sum(dy: Tensor) -> Tensor:
    """Over the rows, in fp32 where that costs nothing: a CPU adds in fp32 anyway, and would copy all of them first."""
    return dy.sum(0) if dy.device.type == "cpu" else dy.sum(0, dtype=torch.float32)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in another format; in inference mode anew, since nothing could be learned from what is made there."""
    keeps = kept_of(tensor) if tensor.dtype != dtype and not torch.is_inference_mode_enabled() else None
    return tensor.to(dtype) if keeps is None else keeps.cast(tensor, dtype)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, activation: str, scales: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        own = x.to(dtype)
        inside = ACTIVATIONS[activation](own)
        outputs, kept = [], []
        for number, scale in enumerate(scales):
            weight, bias, A, B = (
                None if tensor is None else _cast(tensor, dtype) for tensor in tensors[4 * number : 4 * number + 4]
            )
            assert weight is not None, "a part has a weight"
            y = F.linear(inside, weight, bias)
            low = None
            if A is not None and B is not None:
                low, B = _narrow(inside, A.t()), B * scale
                y.addmm_(low, B.t())
            outputs.append(y)
            kept += [weight, A, B, low]
        learns = ctx.needs_input_grad[4:]
        ctx.activation, ctx.scales = activation, scales
        ctx.keeping = [tensor if kept_of(tensor) is not None else None for tensor in tensors[::4]]
        ctx.dtypes = x.dtype, tuple(None if tensor is None else tensor.dtype for tensor in tensors)
        ctx.save_for_backward(own if activation != "none" or any(learns) else None, *kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        own, *kept = ctx.saved_tensors
        wants_x, learns = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        inside = ACTIVATIONS[ctx.activation](own) if any(learns) else None
        found: list[Tensor | None] = []
        grad_x: Tensor | None = None
        for number, (dy, scale) in enumerate(zip(grads, ctx.scales, strict=True)):
            weight, A, B, low = kept[4 * number : 4 * number + 4]
            of_weight, of_bias, of_A, of_B = learns[4 * number : 4 * number + 4]
            back = _narrow(dy, B) if B is not None and (wants_x or of_A) else None
            if wants_x:
                grad_x = dy @ weight if grad_x is None else grad_x.addmm_(dy, weight)
                if back is not None:
                    grad_x.addmm_(back, A)
            keeps = kept_of(ctx.keeping[number]) if of_weight else None
            if keeps is not None and inside is not None:
                keeps.add_gradient(ctx.keeping[number], dy, inside)
            found += [
                dy.t() @ inside if of_weight and inside is not None and keeps is None else None,
                _sum(dy) if of_bias else None,
                back.t() @ inside if of_A and back is not None and inside is not None else None,
                (low.t() @ dy).t() * scale if of_B else None,
            ]
        if grad_x is not None:
            grad_x = SLOPES[ctx.activation](grad_x, own).to(ctx.dtypes[0])
        typed = (None if one is None else one.to(dtype) for one, dtype in zip(found, ctx.dtypes[1], strict=True))
        return grad_x, None, None, None, *typed
