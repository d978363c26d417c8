"""Layout of a batch without padding: positions of its valid tokens in one row, and groups in which they attend.

Sequences of similar length attend in one call, padded to the longest of them; a decoder's sequences attend to their own
encoder states. The model's own mask function decides which query attends to which key, so causal masks and
sliding windows are the model's. On a GPU all sequences are concatenated for PyTorch's variable-length kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from tunesmith.data.batches import Limits, cut
from tunesmith.kernels.ops.attention import AttentionGroups, VarlenSequences
from tunesmith.kernels.ops.padding import Pad, PaddedView, Unpad

__all__ = ["CrossAttentionGroup", "CrossAttentionLayout", "Group", "Layout", "known_lengths"]

ROUND_TOKENS, ROUND_LENGTH = 32, 8
"""Tokens of a step and lengths of a group are multiples of these: oneDNN compiles a kernel for each new shape (about a
millisecond and half a megabyte each), and caches at most a thousand."""

VARLEN_DEVICES = ("cuda",)
"""Device types on which PyTorch has a variable-length kernel."""

GROUP_COST, FOURS_COST = 16384, 8192
"""Costs in padded pairs of tokens: that of one more group, and the extra cost that is accepted if all groups then have
a multiple of four sequences. oneDNN compiles four kernels for each new number of sequences, half a megabyte each."""

_KNOWN: ContextVar[Mapping[int, Any] | None] = ContextVar("known_lengths", default=None)


@contextmanager
def known_lengths(by_width: Mapping[int, Any]) -> Iterator[None]:
    """Provide sequence lengths to the layouts that are created inside the `with` block, which need not read the device.

    `by_width`: width of the padded batch -> lengths, as a NumPy array.
    """
    token = _KNOWN.set(by_width)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _lengths(mask: Tensor, tokens: int) -> Any:
    """Return the number of valid tokens in each row; read the mask only if `known_lengths` does not have them."""
    known = (_KNOWN.get() or {}).get(tokens)
    if known is not None and len(known) == len(mask):
        return known
    return mask.sum(1).cpu().numpy()  # waits for the device


def group_bounds(lengths: Any) -> list[tuple[int, int]]:
    """Return the (start, end) bounds of groups that attend in one call each; `lengths` are ascending."""
    rounded = lengths + -lengths % ROUND_LENGTH
    cuts = {}
    for rows in (4, 1):
        starts = np.arange(0, len(lengths), rows)
        costs = np.maximum.reduceat(rounded, starts) ** 2
        groups = cut(costs, Limits(2**20, 2**40, GROUP_COST // rows))
        cuts[rows] = [(a * rows, min(b * rows, len(lengths))) for a, b in groups]
    fours, ones = (
        sum((b - a) * int(rounded[b - 1]) ** 2 + GROUP_COST for a, b in groups) for groups in (cuts[4], cuts[1])
    )
    return cuts[4 if fours <= ones + FOURS_COST else 1]


class Layout:
    """Positions of the valid tokens of a batch that is padded on the right, and the groups in which they attend."""

    def __init__(self, mask: Tensor | None, batch_size: int, tokens: int, mask_function: Callable[..., Any]) -> None:
        lengths = np.full(batch_size, tokens) if mask is None else _lengths(mask, tokens)
        self.batch_size, self.tokens, self.mask_function, self.lengths = batch_size, tokens, mask_function, lengths
        self.device = torch.device("cpu") if mask is None else mask.device
        self.starts = starts = np.concatenate([[0], np.cumsum(lengths)])
        order = np.argsort(lengths, kind="stable")
        self.is_sorted = bool((np.diff(order) == 1).all())
        self.groups = [Group(self, order[a:b]) for a, b in group_bounds(lengths[order])]
        self.spare = -int(starts[-1]) % ROUND_TOKENS
        if batch_size > 1 and starts[-1] + self.spare == tokens:
            self.spare += ROUND_TOKENS  # (1, total) must not be mistaken for a padded (1, tokens)
        self.total = int(starts[-1]) + self.spare
        self.positions = _valid_positions(lengths, tokens).to(self.device)
        self._cross: CrossAttentionLayout | None = None

    @cached_property
    def padded_view(self) -> PaddedView:
        """The tokens as padded groups."""
        return PaddedView([group.token_positions() for group in self.groups], self.total, self.device)

    @cached_property
    def attention_groups(self) -> AttentionGroups:
        """The groups; on a GPU also all sequences concatenated, with the spare tokens as one more sequence."""
        known = self.mask_function in (causal_mask_function, bidirectional_mask_function)
        if not known or self.device.type not in VARLEN_DEVICES or _is_old_gpu(self.device):
            return AttentionGroups(self.groups, self.padded_view, self.padded_view)
        starts = [*self.starts, self.total] if self.spare else self.starts
        offsets = torch.tensor(starts, dtype=torch.int32).to(self.device, non_blocking=True)
        longest = max(int(self.lengths.max()), self.spare)
        sequences = VarlenSequences(offsets, longest, self.mask_function is causal_mask_function)
        return AttentionGroups(self.groups, self.padded_view, self.padded_view, sequences)

    def cross(self, keys: Layout) -> CrossAttentionLayout:
        """Return the layout of cross-attention, in which each sequence attends to the same sequence of `keys`."""
        if self._cross is None or self._cross.keys is not keys:
            self._cross = CrossAttentionLayout(self, keys)
        return self._cross

    def unpad(self, x: Tensor) -> Tensor:
        """Select the valid tokens, and append copies of the first one as spare tokens.

        # (batch or 1, tokens, ...) -> (1, total, ...)
        """
        if x.shape[0] == 1 and self.batch_size > 1:
            x = x.expand(self.batch_size, *x.shape[1:])
        return Unpad.apply(x.flatten(0, 1), self.positions, self.spare)[None]  # type: ignore[no-any-return, no-untyped-call]

    def pad(self, x: Tensor) -> Tensor:
        """Restore padding, with zeros.  # (1, total, ...) -> (batch, tokens, ...)"""
        rows = Pad.apply(x[0], self.positions, self.batch_size * self.tokens)  # type: ignore[no-untyped-call]
        return rows.view(self.batch_size, self.tokens, *x.shape[2:])  # type: ignore[no-any-return]


class Group:
    """Sequences that attend in one call, padded to the longest of them."""

    def __init__(self, layout: Layout, members: Any, *, contiguous: bool | None = None) -> None:
        lengths, starts = layout.lengths[members], layout.starts[members]
        contiguous = layout.is_sorted if contiguous is None else contiguous
        self.device, self.mask_function = layout.device, layout.mask_function
        self.members = members
        """Indices of the sequences in the batch."""
        longest = int(lengths.max())
        self.rows, self.longest = len(lengths), longest + -longest % ROUND_LENGTH
        self.has_no_padding = bool((lengths == self.longest).all())
        self.tokens = slice(int(starts[0]), int(starts[0]) + int(lengths.sum())) if contiguous else None
        self._starts, self._lengths = starts, lengths
        self._biases: dict[Any, Tensor] = {}
        self.causal = self.mask_function is causal_mask_function
        """True if no token attends to a later one, so that no valid token attends to padding."""

    def token_positions(self) -> Any:
        """Return the position of each token in the layout, -1 for padding.  # (rows, longest)"""
        positions = np.arange(self.longest)
        return np.where(positions < self._lengths[:, None], self._starts[:, None] + positions, -1)

    @cached_property
    def indices(self) -> Tensor:
        """Positions of the group's valid tokens in the layout."""
        positions = self.token_positions()
        return torch.from_numpy(positions[positions >= 0]).to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Positions of the group's valid tokens in its padded rectangle."""
        return _valid_positions(self._lengths, self.longest).to(self.device)

    @cached_property
    def mask(self) -> Tensor | None:
        """True where a query attends to a key; None if all do.  # (rows or 1, 1, longest, longest)"""
        positions, first = torch.arange(self.longest, device=self.device), torch.tensor(0, device=self.device)
        mask = None
        if self.mask_function is not bidirectional_mask_function:
            visible = self.mask_function(first, first, positions[:, None], positions[None, :])
            mask = torch.as_tensor(visible).expand(self.longest, self.longest)[None, None]
        if not self.has_no_padding and not self.causal:
            valid = (positions < torch.from_numpy(self._lengths).to(self.device)[:, None])[:, None, None, :]
            mask = valid if mask is None else mask & valid
        return mask

    def bias(self, dtype: torch.dtype, prefix: int) -> Tensor | None:
        """Return `mask` as numbers to add to scores, after `prefix` keys that all may see; None without a mask."""
        if self.mask is None:
            return None
        key = dtype, prefix
        if key not in self._biases:
            mask = torch.nn.functional.pad(self.mask, (prefix, 0), value=True)
            low = torch.finfo(dtype).min / 2  # a score added to the minimum itself could overflow
            self._biases[key] = torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill_(~mask, low)
        return self._biases[key]

    def gather(self, x: Tensor) -> Tensor:
        """Select and pad the tokens of the group.  # (total, heads, width) -> (rows, heads, longest, width)"""
        own = x[self.tokens] if self.tokens is not None else Unpad.apply(x, self.indices, 0)  # type: ignore[no-untyped-call]
        if not self.has_no_padding:
            own = Pad.apply(own, self.positions, self.rows * self.longest)  # type: ignore[no-untyped-call]
        return own.unflatten(0, (self.rows, self.longest)).transpose(1, 2)  # type: ignore[no-any-return]

    gather_queries = gather

    def release(self, x: Tensor) -> Tensor:
        """Remove the padding.  # (rows, heads, longest, width) -> (valid tokens of the group, heads, width)"""
        own = x.transpose(1, 2).flatten(0, 1)
        return own if self.has_no_padding else Unpad.apply(own, self.positions, 0)  # type: ignore[no-any-return, no-untyped-call]


class CrossAttentionLayout:
    """Cross-attention of a decoder's sequences to their encoder states."""

    def __init__(self, queries: Layout, keys: Layout) -> None:
        self.keys, self.total, self.spare = keys, queries.total, queries.spare
        groups = [Group(keys, group.members, contiguous=group.tokens is not None) for group in queries.groups]
        self.groups = [CrossAttentionGroup(own, group) for own, group in zip(queries.groups, groups, strict=True)]
        view = PaddedView([group.token_positions() for group in groups], keys.total, keys.device)
        self.attention_groups = AttentionGroups(self.groups, queries.padded_view, view)
        self._padded: Tensor | None = None
        self._unpadded: Tensor | None = None

    def states(self, x: Tensor) -> Tensor:
        """Unpad encoder states; keep the result for the same tensor.  # (batch, tokens, width) -> (1, total, width)"""
        if self._unpadded is None or self._padded is not x:
            self._padded, self._unpadded = x, self.keys.unpad(x)
        return self._unpadded


class CrossAttentionGroup:
    """Sequences of a decoder, and the sequences of its encoder that they attend to."""

    causal = False

    def __init__(self, queries: Group, keys: Group) -> None:
        self.rows, self.tokens = queries.rows, queries.tokens
        self.longest = max(queries.longest, keys.longest)
        self.gather_queries, self.release = queries.gather, queries.release
        self.gather, self.bias = keys.gather, keys.bias
        self._queries, self._keys = queries, keys

    @property
    def indices(self) -> Tensor:
        """Positions of the query tokens in their layout."""
        return self._queries.indices

    @property
    def mask(self) -> Tensor | None:
        """True for valid keys.  # (rows, 1, 1, longest)"""
        return self._keys.mask


def _is_old_gpu(device: torch.device) -> bool:
    """Return whether a GPU is too old for PyTorch's variable-length kernel (FlashAttention-2)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def _valid_positions(lengths: Any, tokens: int) -> Tensor:
    """Return the positions of valid tokens in the flattened padded batch."""
    return torch.from_numpy(np.flatnonzero(np.arange(tokens) < lengths[:, None]))
