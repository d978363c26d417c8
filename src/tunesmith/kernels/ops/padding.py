"""Padding and unpadding: tokens of a batch as one row, or as padded groups of sequences, with one copy each way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["PaddedView", "Pad", "Unpad"]


class PaddedView:
    """Padded rectangles of groups of sequences, as positions among `total` rows of tokens.

    `positions` are (sequences, longest) for each group, -1 for padding. It is used inside autograd functions, which
    compute their own gradients.
    """

    def __init__(self, positions: Sequence[Any], total: int, device: torch.device) -> None:
        self._positions, self.total, self.device = positions, total, device
        ends = list(accumulate(one.size for one in positions))
        self.size = ends[-1]
        self.groups = [slice(end - one.size, end) for one, end in zip(positions, ends, strict=True)]
        """Rows of each group in the padded tensor."""

    @cached_property
    def _flat(self) -> Any:
        return np.concatenate([one.ravel() for one in self._positions])

    @cached_property
    def _source(self) -> Tensor | None:
        """Source row of each padded row (the last row for padding); None if all rows are in order without padding."""
        if (self._flat == np.arange(self.size)).all():
            return None
        return torch.from_numpy(np.where(self._flat < 0, self.total - 1, self._flat)).to(self.device)

    @cached_property
    def _padding(self) -> Tensor:
        return torch.from_numpy(np.flatnonzero(self._flat < 0)).to(self.device)

    @cached_property
    def _target(self) -> Tensor:
        """Padded row of each token; the row after the last for a token in no group."""
        target = np.full(self.total, self.size)
        target[self._flat[self._flat >= 0]] = np.flatnonzero(self._flat >= 0)
        return torch.from_numpy(target).to(self.device)

    def pad(self, x: Tensor, *, zeros: bool = False) -> Tensor:
        """Copy rows into the rectangles; padding is zero (`zeros`, for gradients) or a copy of the last row.

        # (total, width) -> (size, width)
        """
        if not self.total:
            return x.new_zeros(self.size, x.shape[-1])
        if self._source is None:
            return x[: self.size]
        rows = x.index_select(0, self._source)
        return rows.index_fill_(0, self._padding, 0.0) if zeros else rows

    def empty_like(self, x: Tensor) -> Tensor:
        """Allocate padded rows to be filled and passed to `unpad`.  # (..., width) -> (size + some, width)"""
        rows = x.new_empty(self.size + (1 if self._source is not None else self.total - self.size), x.shape[-1])
        rows[self.size :] = 0.0
        return rows

    def unpad(self, rows: Tensor) -> Tensor:
        """Return filled rows of `empty_like` without padding, zero for tokens in no group.  # -> (total, width)"""
        return rows if self._source is None else rows.index_select(0, self._target)


class Unpad(torch.autograd.Function):
    """`x[indices]` for distinct indices, then `spare` more rows; the gradient is a copy instead of an addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, spare: int) -> Tensor:
        """Select rows; the spare rows are copies of the first one and get no gradient."""
        ctx.save_for_backward(indices)
        ctx.rows = x.shape[0]
        return x.index_select(0, torch.cat([indices, indices[:1].expand(spare)]) if spare else indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Copy gradients back to the selected rows."""
        (indices,) = ctx.saved_tensors
        back = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return back.index_copy_(0, indices, grad[: len(indices)]), None, None


class Pad(torch.autograd.Function):
    """Inverse of `Unpad`: the first rows of x at `indices` among `rows` rows of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, rows: int) -> Tensor:
        """Copy rows into zeros, without the spare rows."""
        ctx.save_for_backward(indices)
        ctx.spare = x.shape[0] - len(indices)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, indices, x[: len(indices)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Select gradients at the indices; the spare rows get zeros."""
        (indices,) = ctx.saved_tensors
        rows = grad.index_select(0, indices)
        return torch.cat([rows, rows.new_zeros(ctx.spare, *rows.shape[1:])]) if ctx.spare else rows, None, None
