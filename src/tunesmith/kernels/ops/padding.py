"""Sequences of unequal length as rectangles, one group after another, and back, in one copy each way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Rectangles"]


class Rectangles:
    """Where the tokens of groups are among `total` rows.

    `places` are (sequences, longest) for each group, -1 where there is padding.
    """

    def __init__(self, places: Sequence[Any], total: int, device: torch.device) -> None:
        self._places, self.total, self.device = places, total, device
        ends = list(accumulate(one.size for one in places))
        self.size = ends[-1]
        self.groups = [slice(end - one.size, end) for one, end in zip(places, ends, strict=True)]
        """Which rows of all rectangles are a group's."""

    @cached_property
    def _flat(self) -> Any:
        return np.concatenate([one.ravel() for one in self._places])

    @cached_property
    def _there(self) -> Tensor | None:
        """For each row of the rectangles its place, for padding the last; None where they are the places in order."""
        if (self._flat == np.arange(self.size)).all():
            return None
        return torch.from_numpy(np.where(self._flat < 0, self.total - 1, self._flat)).to(self.device)

    @cached_property
    def _padding(self) -> Tensor:
        return torch.from_numpy(np.flatnonzero(self._flat < 0)).to(self.device)

    @cached_property
    def _back(self) -> Tensor:
        """For each place its row of the rectangles; the one behind the last where it has none."""
        back = np.full(self.total, self.size)
        back[self._flat[self._flat >= 0]] = np.flatnonzero(self._flat >= 0)
        return torch.from_numpy(back).to(self.device)

    def take(self, x: Tensor, *, zeros: bool = False) -> Tensor:
        """Padding is `zeros`, as gradients want it, or the last row of x again.

        # (total, width) -> (size, width); without gradient
        """
        if not self.total:
            return x.new_zeros(self.size, x.shape[-1])
        if self._there is None:
            return x[: self.size]
        rows = x.index_select(0, self._there)
        return rows.index_fill_(0, self._padding, 0.0) if zeros else rows

    def like(self, x: Tensor) -> Tensor:
        """Rows to fill and `put`, and behind them zeros.  # (..., width) -> (size + some, width)"""
        rows = x.new_empty(self.size + (1 if self._there is not None else self.total - self.size), x.shape[-1])
        rows[self.size :] = 0.0
        return rows

    def put(self, rows: Tensor) -> Tensor:
        """What `like` gave, filled -> (total, width), zero where there is no token; without gradient."""
        return rows if self._there is None else rows.index_select(0, self._back)
