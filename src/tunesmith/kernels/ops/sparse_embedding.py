"""Embeddings that cost what was looked up, not what the table holds.

PyTorch fills a fresh table of zeros in each backward pass, of which a step of a few hundred tokens touches a few
hundred rows: for 30,000 words 384 wide a fifth of a training step on a CPU, most of it spent on asking the system for
memory. Here one table is kept, and only the rows of the step before are zeroed again. `Rows` tells an optimizer which
rows have ever been looked up: the others have neither gradient nor momentum.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Embedding", "Rows", "use_kept_gradients", "zeros_like"]

WORTH_IT = 2**20
"""Elements from which a table is worth it."""


@dataclass
class Rows:
    """Of a table: which rows any step has looked up, and which this one has.  # (rows,), (n,) repetitions included"""

    ever: Tensor
    now: tuple[Tensor, ...] = ()

    def gradient(self, weight: Tensor) -> Tensor:
        """The rows of the gradient that may be other than zero."""
        assert weight.grad is not None, "its rows have been looked up"
        return weight.grad.index_select(0, torch.cat(self.now).unique())


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros on a CPU whose pages are taken from the system when they are written."""
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        return torch.zeros_like(tensor)
    return torch.from_numpy(np.zeros(tensor.shape, dtype=np.float32))


class Embedding(nn.Embedding):
    """`nn.Embedding` for training on a CPU by one process: its gradient goes straight to `weight.grad`."""

    kept: Tensor | None = None
    """The table of gradients, zero but for the rows of this step."""

    rows: Rows

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Embedding's name
        """Rows of the table.  # (...) -> (..., width)"""
        if not (self.weight.requires_grad and torch.is_grad_enabled()) or self.weight.device.type != "cpu":
            return super().forward(input)
        found: Tensor = _LookUp.apply(self.weight, input, self)  # type: ignore[no-untyped-call]
        return found

    def add_gradient(self, ids: Tensor, grad: Tensor) -> None:
        """Add the gradients of the rows `ids` to the weight's.  # (n,), (n, width)"""
        if self.padding_idx is not None:
            grad = grad.masked_fill((ids == self.padding_idx)[:, None], 0.0)
        if self.kept is None:
            self.kept = zeros_like(self.weight)
        if self.weight.grad is None:
            for rows in self.rows.now:
                self.kept.index_fill_(0, rows, 0.0)
            self.rows.now, self.weight.grad = (), self.kept
        self.rows.now += (ids,)
        self.rows.ever[ids] = True
        self.weight.grad.index_add_(0, ids, grad.to(self.kept.dtype))


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, table: Embedding) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table = table
        return weight.index_select(0, ids.flatten()).view(*ids.shape, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        ctx.table.add_gradient(ids.flatten(), grad.flatten(0, -2))
        return None, None, None


def use_kept_gradients(model: Any) -> None:
    """Let the large tables that learn be these, in place; not those whose weight is another module's too."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        plain = type(module) is nn.Embedding and not (module.sparse or module.scale_grad_by_freq or module.max_norm)
        if plain and module.weight.requires_grad and module.weight.numel() >= WORTH_IT and uses[id(module.weight)] == 1:
            module.__class__ = Embedding
            module.rows = Rows(torch.zeros(len(module.weight), dtype=torch.bool))
            module.weight.rows = module.rows
