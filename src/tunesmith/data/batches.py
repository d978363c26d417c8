"""Ragged batches in a global order that depends only on seed, epoch and number of examples, and their micro-batches.

Batches are uniformly random. Inside one optimizer step, examples are sorted by length before they are split into
micro-batches. This saves padding and leaves the gradient unchanged: losses are sums divided by normalizers of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tunesmith.data.encoded import Encoded


@dataclass(frozen=True)
class Ragged:
    """Rows of unequal length, stored flat: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Tensor  # (sum of lengths, ...)
    offsets: Tensor  # (rows + 1,)
    host_offsets: NDArray[np.int64] | None = None
    """The same offsets in host memory, if the rows are on a device."""

    @property
    def lengths(self) -> Tensor:
        """Length of each row."""  # (rows,)
        return self.offsets.diff()

    def mask(self) -> Tensor:
        """Return the attention mask: 1 where a padded row has a value."""  # (rows, longest)
        lengths, on_host = self.lengths, np.diff(self._offsets_on_host())
        mask = (torch.arange(int(on_host.max()), device=lengths.device) < lengths[:, None]).long()
        _HOST_LENGTHS[mask] = on_host
        return mask

    def padded(self, fill: int | float) -> Tensor:
        """Pad the rows on the right to equal length."""  # (rows, longest, ...)
        mask, width = self.mask().bool(), self.values.shape[1:]
        inside = mask.view(*mask.shape, *[1] * len(width))
        return self.values.new_full((*mask.shape, *width), fill).masked_scatter_(inside, self.values)

    def to(self, device: torch.device) -> Ragged:
        """Copy to a device."""
        offsets = self.offsets.to(device, non_blocking=True)
        return Ragged(self.values.to(device, non_blocking=True), offsets, self._offsets_on_host())

    def _offsets_on_host(self) -> NDArray[np.int64]:
        """Return the offsets in host memory; if they are only on a device, this synchronizes with it."""
        return self.offsets.cpu().numpy() if self.host_offsets is None else self.host_offsets


_HOST_LENGTHS = WeakTensorKeyDictionary()
"""Mask -> the lengths of its rows in host memory."""


def host_lengths(mask: Tensor) -> NDArray[np.int64] | None:
    """Return the row lengths of a mask from `Ragged.mask` without a device synchronization; None for other masks."""
    lengths: NDArray[np.int64] | None = _HOST_LENGTHS.get(mask)
    return lengths


@dataclass(frozen=True)
class Batch:
    """Fields of several examples: `Ragged` where lengths differ, else a tensor of (examples, ...)."""

    fields: Mapping[str, Ragged | Tensor]
    size: int

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def ragged(self, name: str) -> Ragged:
        """Return a field whose lengths vary."""
        value = self.fields[name]
        assert isinstance(value, Ragged), f"{name} is not ragged"
        return value

    def tensor(self, name: str) -> Tensor:
        """Return a field of one value, or one array of equal shape, per example."""  # (examples, ...)
        value = self.fields[name]
        assert isinstance(value, Tensor), f"{name} is ragged"
        return value

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.fields.items()}
        return replace(self, fields=moved)


def collate(encoded: Encoded, indices: NDArray[np.int64]) -> Batch:
    """Return the examples at `indices` as one batch: indices as int64, all other fields in their own dtype."""
    fields: dict[str, Ragged | Tensor] = {}
    for name, (values, offsets) in encoded.take(indices).items():
        flat = torch.from_numpy(np.ascontiguousarray(values))
        flat = flat.long() if encoded.fields[name].is_index else flat
        fields[name] = flat if offsets is None else Ragged(flat, torch.from_numpy(offsets))
    return Batch(fields, len(indices))


@dataclass(frozen=True)
class Limits:
    """Limits of one micro-batch, in the cost units of the task (tokens, pixels).

    `overhead` is the cost of one more forward and backward pass, in units of `max_cost`.
    """

    max_examples: int
    max_cost: int
    overhead: int = 0


@dataclass(frozen=True)
class Batches:
    """The batches of a run over one set of examples, for process `rank` of `world`."""

    encoded: Encoded
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    augmented: Callable[[int], Encoded] | None = None
    """Epoch -> the augmented examples of that epoch; None without augmentation."""

    def examples(self, step: int) -> Encoded:
        """Return the examples that the indices of a step refer to."""
        return self.encoded if self.augmented is None else self.augmented(step // self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass; the last may be smaller."""
        return math.ceil(len(self.encoded) / self.batch_size)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the examples of one optimizer step (counted from 0) over all processes."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, len(self.encoded))
        return order[within * self.batch_size : (within + 1) * self.batch_size]

    def micro_batches(self, step: int, limits: Limits) -> list[NDArray[np.int64]]:
        """Return this process's share of a step, split within the limits at least cost (padding and passes)."""
        share = self.indices(step)[self.rank :: self.world]
        costs = self.examples(step).costs[share]
        order = np.argsort(costs, kind="stable")
        return [share[order[start:stop]] for start, stop in cut(costs[order], limits)]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)


def cut(lengths: NDArray[np.int64], limits: Limits) -> list[tuple[int, int]]:
    """Split ascending lengths into runs within the limits so that sum(rows x longest + overhead) is minimal.

    Uses dynamic programming over the end of each run. A row that exceeds `max_cost` gets a run of its own.
    """
    if not len(lengths):
        return []
    padded = len(lengths) * int(lengths[-1])
    if len(lengths) <= limits.max_examples and padded <= min(limits.max_cost, limits.overhead):
        return [(0, len(lengths))]  # a second run costs more than it could save
    best: list[float] = [0.0]
    start_of: list[int] = [0]
    for stop in range(1, len(lengths) + 1):
        longest = int(lengths[stop - 1])
        fit = max(1, min(limits.max_examples, limits.max_cost // max(longest, 1)))
        starts = range(max(0, stop - fit), stop)
        costs = [best[start] + (stop - start) * longest + limits.overhead for start in starts]
        least = int(np.argmin(costs))
        best.append(costs[least])
        start_of.append(starts[least])
    runs: list[tuple[int, int]] = []
    stop = len(lengths)
    while stop:
        runs.append((start_of[stop], stop))
        stop = start_of[stop]
    return runs[::-1]
