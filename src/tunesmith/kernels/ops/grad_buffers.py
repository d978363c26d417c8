"""Memory that large matrices keep from one training step to the next: of their gradient, and of themselves in bf16.

PyTorch asks for fresh memory for both in each step, and the system hands it out page by page, zeroed: for 10 million
weights a twentieth of a step on a CPU. A gradient goes straight to `weight.grad`, `torch.autograd.grad` has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Kept", "keep_memory", "kept_of"]

WORTH_IT = 2**15
"""Elements from which a matrix is worth it: what is smaller stays with the allocator."""


@dataclass
class Kept:
    """What a matrix keeps."""

    gradient: Tensor | None = None
    half: Tensor | None = None
    version: int = -1
    """Of the matrix when `half` was written."""

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in another format. What an earlier one is still needed for says so once the weight has changed."""
        if self.half is None or self.half.dtype != dtype or self.half.shape != weight.shape:
            self.half = torch.empty_like(weight, dtype=dtype)
        (self.half.data if self.version == weight._version else self.half).copy_(weight)
        self.version = weight._version
        return self.half

    def add_gradient(self, weight: Tensor, dy: Tensor, x: Tensor) -> None:
        """Add dy^T x to the weight's gradient.  # (out, in), (n, out), (n, in)"""
        if weight.grad is not None:
            weight.grad += dy.t() @ x
            return
        own = self.gradient
        if own is None or (own.shape, own.dtype, own.device) != (weight.shape, weight.dtype, weight.device):
            own = self.gradient = torch.empty_like(weight)
        if dy.dtype == weight.dtype:
            torch.mm(dy.t(), x, out=own)
        else:
            own.copy_(dy.t() @ x)
        weight.grad = own


def keep_memory(model: nn.Module) -> None:
    """Let the model's large matrices keep theirs, in place, where a kernel makes use of it."""
    parameters: Iterator[Any] = model.parameters()
    for parameter in parameters:
        if parameter.ndim == 2 and parameter.numel() >= WORTH_IT and parameter.dtype == torch.float32:
            parameter.kept = Kept()


def kept_of(weight: Tensor | None) -> Kept | None:
    """What a matrix that learns keeps; None where it does not."""
    found: Any = getattr(weight, "kept", None)
    return found if found is not None and weight is not None and weight.is_leaf and weight.requires_grad else None
