"""A linear map with a low-rank addition: y = x W'^T + b, W' = W + s B A (LoRA, Hu 2021, arXiv 2106.09685).

With a magnitude m the rows of W' are brought to the length m: W'' = m * W' / |W'|, the length taken as a constant of
the gradient (DoRA, Liu 2024, arXiv 2402.09353, section 4.3). This is the formula written plainly; what is faster is
held to it.

Shapes: x (..., in), W (out, in), transposed (in, out), or packed in a few bits, A (r, in), B (out, r), b and m (out,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.ops.quantized import Packed

__all__ = ["adapted_weight", "lora_linear"]


def lora_linear(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    transposed: bool = False,
    dropout: float = 0.0,
    magnitude: Tensor | None = None,
) -> Tensor:
    """The y of the module's formula, in the dtype that the base map answers in; A, B and m may be wider than W.

    `dropout` falls on the way into A alone. Works in fp32, under autocast, and with W and x in bf16 without it.
    """
    beside = bias if magnitude is None else None
    if isinstance(weight, Packed):
        base = weight.product(x, beside)
    else:
        base = F.linear(x, weight.t() if transposed else weight, beside)
    inside = x if torch.is_autocast_enabled(x.device.type) else x.to(A.dtype)
    low = F.linear(F.linear(F.dropout(inside, dropout), A), B)
    if magnitude is None:
        return (base + scaling * low).to(base.dtype)
    length = _row_lengths(weight, A, B, scaling, transposed)
    turned = (base + scaling * low) * (magnitude / length)
    return (turned if bias is None else turned + bias).to(base.dtype)


@torch.no_grad()
def adapted_weight(
    weight: Tensor | Packed, A: Tensor, B: Tensor, scaling: float, *, transposed: bool, magnitude: Tensor | None = None
) -> Tensor:
    """W' (or W'' with a magnitude) in fp32, laid out as `weight` is, or was before it was packed."""
    with torch.autocast(A.device.type, enabled=False):
        change = scaling * (B.float() @ A.float())
        if isinstance(weight, Packed):
            plain = weight.decoded().t() if transposed else weight.decoded()
        else:
            plain = weight.float()
        adapted = plain + (change.t() if transposed else change)
        if magnitude is not None:
            scale = magnitude.float() / _row_lengths(weight, A, B, scaling, transposed)
            adapted = adapted * (scale if transposed else scale[:, None])
    return adapted


def _row_lengths(weight: Tensor | Packed, A: Tensor, B: Tensor, scaling: float, transposed: bool) -> Tensor:
    """|W'| of each output, never zero.  # (out,)"""
    adapted = adapted_weight(weight, A, B, scaling, transposed=transposed)
    lengths: Tensor = torch.linalg.vector_norm(adapted, dim=0 if transposed else 1)
    return lengths.clamp(min=torch.finfo(torch.float32).tiny)
