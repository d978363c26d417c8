"""Gradient memory that is reused in each training step, for large matrices and for embedding tables.

In each step PyTorch allocates the gradient of each weight, and its copy in bf16, and the system provides the memory as
zeroed pages. For 10 million weights this takes a twentieth of a step on a CPU. A `GradBuffer` keeps both. The gradient
is written directly to `weight.grad`; `torch.autograd.grad` returns None for it.

The gradient of an embedding is zero except in the looked-up rows, a few hundred of 30,000. PyTorch fills a table of
zeros in each backward pass. For 30,000 words and width 384 this takes a fifth of a step on a CPU. A `SparseEmbedding`
keeps one table and zeroes the rows of the previous step. `LookedUpRows` tells an optimizer which rows have ever been
looked up; the others have no gradient and no momentum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["NO_BUFFERS", "GradBuffer", "GradBuffers", "LookedUpRows", "SparseEmbedding", "zeros_like"]

MIN_MATRIX = 2**15
"""Minimum number of elements of a matrix with a buffer; PyTorch's allocator reuses smaller blocks of memory."""


@dataclass
class GradBuffer:
    """Memory for the gradient of one matrix, and for its copy in half precision."""

    gradient: Tensor | None = None
    half: Tensor | None = None
    version: int = -1
    """Version counter of the matrix when `half` was written."""

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight in another dtype.

        If the weight has changed while an earlier backward pass still needs the copy, that backward pass raises.
        """
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


class GradBuffers:
    """Buffers of all large fp32 matrices among some parameters."""

    def __init__(self, parameters: Iterable[Tensor], min_elements: int | None = None) -> None:
        min_elements = MIN_MATRIX if min_elements is None else min_elements
        self._by_weight = {
            parameter: GradBuffer()
            for parameter in parameters
            if parameter.ndim == 2 and parameter.numel() >= min_elements and parameter.dtype == torch.float32
        }

    def __len__(self) -> int:
        return len(self._by_weight)

    def of(self, weight: Tensor | None) -> GradBuffer | None:
        """Return the buffer of a trainable matrix; None for any other tensor."""
        buffer = None if weight is None else self._by_weight.get(weight)
        return buffer if buffer is not None and weight is not None and weight.requires_grad else None

    def clear(self) -> None:
        """Free the memory of all buffers."""
        for weight in self._by_weight:
            self._by_weight[weight] = GradBuffer()


NO_BUFFERS = GradBuffers(())


def zeros_like(tensor: Tensor) -> Tensor:
    """Return zeros whose memory pages are allocated only when they are first written (fp32 on a CPU)."""
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        return torch.zeros_like(tensor)
    return torch.from_numpy(np.zeros(tensor.shape, dtype=np.float32))


@dataclass
class LookedUpRows:
    """Rows of an embedding table that have been looked up."""

    ever: Tensor
    """True for each row that any step has looked up.  # (rows,)"""

    now: tuple[Tensor, ...] = ()
    """Indices that the current step has looked up, with repetitions.  # (n,) for each look-up"""

    def gradient(self, weight: Tensor) -> Tensor:
        """Return the rows of the gradient that may differ from zero."""
        assert weight.grad is not None, "its rows have been looked up"
        return weight.grad.index_select(0, torch.cat(self.now).unique())


class SparseEmbedding:
    """Forward pass of one `nn.Embedding` in training on a CPU; its gradient is written directly to `weight.grad`."""

    def __init__(self, module: nn.Embedding) -> None:
        self.rows = LookedUpRows(torch.zeros(len(module.weight), dtype=torch.bool))
        self.table: Tensor | None = None
        """Gradient of the whole table, zero except in the rows of this step."""

    def __call__(self, module: nn.Embedding, input: Tensor) -> Tensor:  # noqa: A002 - nn.Embedding's name
        """Look up rows of the table.  # (...) -> (..., width)"""
        weight = module.weight
        if not (weight.requires_grad and torch.is_grad_enabled()) or weight.device.type != "cpu":
            return nn.Embedding.forward(module, input)
        rows: Tensor = _LookUp.apply(weight, input, self, module.padding_idx)  # type: ignore[no-untyped-call]
        return rows

    def add_gradient(self, weight: Tensor, ids: Tensor, grad: Tensor) -> None:
        """Add the gradients of the rows `ids` to the weight's.  # (rows, width), (n,), (n, width)"""
        if self.table is None:
            self.table = zeros_like(weight)
        if weight.grad is None:
            for rows in self.rows.now:
                self.table.index_fill_(0, rows, 0.0)
            self.rows.now, weight.grad = (), self.table
        self.rows.now += (ids,)
        self.rows.ever[ids] = True
        weight.grad.index_add_(0, ids, grad.to(self.table.dtype))


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, embedding: SparseEmbedding, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.embedding, ctx.padding = weight, embedding, padding
        return weight.index_select(0, ids.flatten()).view(*ids.shape, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        (saved,) = ctx.saved_tensors
        ids, grad = saved.flatten(), grad.flatten(0, -2)
        if ctx.padding is not None:
            grad = grad.masked_fill((ids == ctx.padding)[:, None], 0.0)
        ctx.embedding.add_gradient(ctx.weight, ids, grad)
        return None, None, None, None
