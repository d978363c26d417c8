"""Where the valid tokens of a batch are, as one row without padding, and in which groups they attend.

Sequences of like length attend in one call, padded to the longest of them; a decoder's to their own encoder states.
Which query may see which key is asked of the model's own mask function, so that causal and sliding windows are what the
model says. On a GPU the sequences lie one after another for PyTorch's own kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from tunesmith.data.batches import Limits, cut
from tunesmith.kernels.ops.attention import Sequences, Together
from tunesmith.kernels.ops.padding import Rectangles

__all__ = ["Across", "Group", "Layout", "Put"]

ROUND_TOKENS, ROUND_LENGTH = 32, 8
"""Tokens of a step and lengths of a group are rounded up to these: oneDNN compiles a kernel for each new shape (about a
millisecond and half a megabyte each), and keeps a thousand."""

SEQUENCES_ON = ("cuda",)
"""Where PyTorch has a kernel for sequences one after another."""

GROUP, FOURS = 16384, 8192
"""What one more group of sequences costs, in padded pairs of tokens, and what it may cost that groups have a multiple
of four: each new number of sequences means four new kernels, half a megabyte each."""


def grouped(lengths: Any) -> list[tuple[int, int]]:
    """Cut ascending lengths into groups that attend in one call each."""
    rounded = lengths + -lengths % ROUND_LENGTH
    found = {}
    for rows in (4, 1):
        starts = np.arange(0, len(lengths), rows)
        tops = np.maximum.reduceat(rounded, starts) ** 2
        groups = cut(tops, Limits(2**20, 2**40, GROUP // rows))
        found[rows] = [(a * rows, min(b * rows, len(lengths))) for a, b in groups]
    fours, ones = (
        sum((b - a) * int(rounded[b - 1]) ** 2 + GROUP for a, b in groups) for groups in (found[4], found[1])
    )
    return found[4 if fours <= ones + FOURS else 1]


class Layout:
    """Where the valid tokens of a padded batch are, and what may see what. Rows are padded on the right."""

    def __init__(self, mask: Tensor | None, batch_size: int, tokens: int, may_see: Callable[..., Any]) -> None:
        lengths = np.full(batch_size, tokens) if mask is None else mask.sum(1).cpu().numpy()
        self.batch_size, self.tokens, self.may_see, self.lengths = batch_size, tokens, may_see, lengths
        self.device = torch.device("cpu") if mask is None else mask.device
        self.starts = starts = np.concatenate([[0], np.cumsum(lengths)])
        order = np.argsort(lengths, kind="stable")
        self.sorted_already = bool((np.diff(order) == 1).all())
        self.groups = [Group(self, order[a:b]) for a, b in grouped(lengths[order])]
        self.spare = -int(starts[-1]) % ROUND_TOKENS
        if batch_size > 1 and starts[-1] + self.spare == tokens:
            self.spare += ROUND_TOKENS  # what is flat already must not look like one row of a batch
        self.total = int(starts[-1]) + self.spare
        self.places = _places(lengths, tokens).to(self.device)
        self._across: Across | None = None

    @cached_property
    def padded_groups(self) -> Rectangles:
        """Its tokens as the groups have them."""
        return Rectangles([group.rectangle() for group in self.groups], self.total, self.device)

    @cached_property
    def together(self) -> Together:
        """How its tokens attend; on a GPU as one row of sequences, and what is spare is one more."""
        known = self.may_see in (causal_mask_function, bidirectional_mask_function)
        if not known or self.device.type not in SEQUENCES_ON or _is_old(self.device):
            return Together(self.groups, self.padded_groups, self.padded_groups)
        starts = [*self.starts, self.total] if self.spare else self.starts
        ends = torch.tensor(starts, dtype=torch.int32).to(self.device, non_blocking=True)
        longest = max(int(self.lengths.max()), self.spare)
        sequences = Sequences(ends, longest, self.may_see is causal_mask_function)
        return Together(self.groups, self.padded_groups, self.padded_groups, sequences)

    def across(self, seen: Layout) -> Across:
        """How its tokens attend to those of another layout, sequence to sequence."""
        if self._across is None or self._across.seen is not seen:
            self._across = Across(self, seen)
        return self._across

    def flat(self, x: Tensor) -> Tensor:
        """(batch or 1, tokens, ...) -> (1, total, ...): the valid tokens, and copies of one of them to round up."""
        if x.shape[0] == 1 and self.batch_size > 1:
            x = x.expand(self.batch_size, *x.shape[1:])
        return Take.apply(x.flatten(0, 1), self.places, self.spare)[None]  # type: ignore[no-any-return, no-untyped-call]

    def padded(self, x: Tensor) -> Tensor:
        """(1, total, ...) -> (batch, tokens, ...), zero where there is no token."""
        spread = Put.apply(x[0], self.places, self.batch_size * self.tokens)  # type: ignore[no-untyped-call]
        return spread.view(self.batch_size, self.tokens, *x.shape[2:])  # type: ignore[no-any-return]


class Group:
    """Sequences that attend in one call, padded to the longest of them."""

    def __init__(self, layout: Layout, members: Any, *, whole: bool | None = None) -> None:
        lengths, starts = layout.lengths[members], layout.starts[members]
        whole = layout.sorted_already if whole is None else whole
        self.device, self.may_see = layout.device, layout.may_see
        self.members = members
        """Which sequences of the batch these are."""
        longest = int(lengths.max())
        self.rows, self.longest = len(lengths), longest + -longest % ROUND_LENGTH
        self.even = bool((lengths == self.longest).all())
        self.tokens = slice(int(starts[0]), int(starts[0]) + int(lengths.sum())) if whole else None
        self._starts, self._lengths = starts, lengths
        self._biases: dict[Any, Tensor] = {}
        self.causal = self.may_see is causal_mask_function
        """Whether nothing sees what comes later, so that no valid token sees padding."""

    def rectangle(self) -> Any:
        """Where its tokens are, -1 where there is padding.  # (rows, longest)"""
        positions = np.arange(self.longest)
        return np.where(positions < self._lengths[:, None], self._starts[:, None] + positions, -1)

    @cached_property
    def indices(self) -> Tensor:
        """Where its valid tokens are."""
        places = self.rectangle()
        return torch.from_numpy(places[places >= 0]).to(self.device)

    @cached_property
    def places(self) -> Tensor:
        """Which of its rectangle they are."""
        return _places(self._lengths, self.longest).to(self.device)

    @cached_property
    def mask(self) -> Tensor | None:
        """Which query may see which key; None where each sees all.  # (rows or 1, 1, longest, longest)"""
        positions, first = torch.arange(self.longest, device=self.device), torch.tensor(0, device=self.device)
        mask = None
        if self.may_see is not bidirectional_mask_function:
            seen = self.may_see(first, first, positions[:, None], positions[None, :])
            mask = torch.as_tensor(seen).expand(self.longest, self.longest)[None, None]
        if not self.even and not self.causal:
            valid = (positions < torch.from_numpy(self._lengths).to(self.device)[:, None])[:, None, None, :]
            mask = valid if mask is None else mask & valid
        return mask

    def bias(self, dtype: torch.dtype, prefix: int) -> Tensor | None:
        """`mask` as numbers to add, with a prefix that all see; None where each sees all."""
        if self.mask is None:
            return None
        key = dtype, prefix
        if key not in self._biases:
            mask = torch.nn.functional.pad(self.mask, (prefix, 0), value=True)
            low = torch.finfo(dtype).min / 2  # twice as low as that, and a score would make it infinite
            self._biases[key] = torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill_(~mask, low)
        return self._biases[key]

    def gather(self, x: Tensor) -> Tensor:
        """(total, heads, width) -> (rows, heads, longest, width)."""
        own = x[self.tokens] if self.tokens is not None else Take.apply(x, self.indices, 0)  # type: ignore[no-untyped-call]
        if not self.even:
            own = Put.apply(own, self.places, self.rows * self.longest)  # type: ignore[no-untyped-call]
        return own.unflatten(0, (self.rows, self.longest)).transpose(1, 2)  # type: ignore[no-any-return]

    gather_queries = gather

    def release(self, x: Tensor) -> Tensor:
        """(rows, heads, longest, width) -> (the group's valid tokens, heads, width)."""
        own = x.transpose(1, 2).flatten(0, 1)
        return own if self.even else Take.apply(own, self.places, 0)  # type: ignore[no-any-return, no-untyped-call]


class Across:
    """Sequences that attend to other sequences, each to its own: a decoder's to its encoder's states."""

    def __init__(self, asking: Layout, seen: Layout) -> None:
        self.seen, self.total, self.spare = seen, asking.total, asking.spare
        groups = [Group(seen, group.members, whole=group.tokens is not None) for group in asking.groups]
        self.groups = [Between(own, group) for own, group in zip(asking.groups, groups, strict=True)]
        padded = Rectangles([group.rectangle() for group in groups], seen.total, seen.device)
        self.together = Together(self.groups, asking.padded_groups, padded)
        self._padded: Tensor | None = None
        self._flat: Tensor | None = None

    def states(self, x: Tensor) -> Tensor:
        """What is seen, (batch, tokens, width) -> (1, total, width); of the same states once."""
        if self._flat is None or self._padded is not x:
            self._padded, self._flat = x, self.seen.flat(x)
        return self._flat


class Between:
    """A group of sequences that ask, and the sequences that these see."""

    causal = False

    def __init__(self, asking: Group, seen: Group) -> None:
        self.rows, self.tokens = asking.rows, asking.tokens
        self.longest = max(asking.longest, seen.longest)
        self.gather_queries, self.release = asking.gather, asking.release
        self.gather, self.bias = seen.gather, seen.bias
        self._asking, self._seen = asking, seen

    @property
    def indices(self) -> Tensor:
        """Where the tokens that ask are."""
        return self._asking.indices

    @property
    def mask(self) -> Tensor | None:
        """Which keys there are.  # (rows, 1, 1, longest)"""
        return self._seen.mask


def _is_old(device: torch.device) -> bool:
    """Whether a GPU is older than PyTorch's kernel for sequences (FlashAttention-2) needs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def _places(lengths: Any, tokens: int) -> Tensor:
    """Indices of the valid tokens in the flattened rectangle."""
    return torch.from_numpy(np.flatnonzero(np.arange(tokens) < lengths[:, None]))


class Take(torch.autograd.Function):
    """`x[indices]` for indices without repetition, then `spare` rows more: the gradient is a copy, not an addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, spare: int) -> Tensor:
        """The rows of x at indices; the spare ones are copies of the first, and lead nowhere."""
        ctx.save_for_backward(indices)
        ctx.rows = x.shape[0]
        return x.index_select(0, torch.cat([indices, indices[:1].expand(spare)]) if spare else indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Back to where the rows came from."""
        (indices,) = ctx.saved_tensors
        back = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return back.index_copy_(0, indices, grad[: len(indices)]), None, None


class Put(torch.autograd.Function):
    """The inverse of `Take`: the first rows of x at `indices` of `rows` rows of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, rows: int) -> Tensor:
        """Zeros with x at indices, without its spare rows."""
        ctx.save_for_backward(indices)
        ctx.spare = x.shape[0] - len(indices)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, indices, x[: len(indices)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """The rows at indices; what is spare has no gradient."""
        (indices,) = ctx.saved_tensors
        rows = grad.index_select(0, indices)
        return torch.cat([rows, rows.new_zeros(ctx.spare, *rows.shape[1:])]) if ctx.spare else rows, None, None
