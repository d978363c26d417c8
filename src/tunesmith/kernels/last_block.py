"""The last block, computed only for the tokens whose output is read; it needs the keys of all tokens, but few queries.

A classification head reads one token of a text; the last block's output of the other tokens is not used. Queries, MLP
and output are then computed only for the tokens that are read, at a fraction of the cost of a block. The gradient of
the logits shows which tokens the head reads, so that no head needs to be known by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.kernels.edits import Edits
from tunesmith.kernels.layout import Group, Layout
from tunesmith.kernels.ops.attention import AttentionGroups
from tunesmith.kernels.ops.padding import PaddedView

__all__ = ["LastBlock", "QueryGroup", "read_positions", "select_queries"]


@dataclass
class LastBlock:
    """Tokens of the last block whose output is read. Valid only while the whole model runs (`active`)."""

    offset: int
    """Distance of the token that the head reads from the start (or end) of a text, or the number of virtual tokens
    before the token whose logits are read."""

    reads: Literal["begin", "end", "each"]
    """End of a text from which `offset` counts; 'each' if every token has logits."""

    disabled: bool = False
    """True while the virtual tokens before the text are disabled."""

    active: bool = False
    tokens: tuple[Tensor, Tensor] | None = None
    """Rows and positions of the only tokens whose logits are read; None if all are."""

    _cache: WeakKeyDictionary[Layout, Tensor | None] = field(default_factory=WeakKeyDictionary)

    def needed(self, layout: Layout) -> Tensor | None:
        """Return (row, position) of each token that is read; None if all are."""  # (needed, 2)
        if not self.active or layout.device.type != "cpu":  # the GPU kernel needs one query per key
            return None
        if self.reads == "each":
            if self.tokens is None:
                return None
            row, position = self.tokens
            if self.offset and bool((position == 0).any()):  # the first token may be in front of the virtual tokens
                return None
            return torch.stack([row, position + self.offset], 1)
        rows = torch.arange(layout.batch_size)
        ends = torch.as_tensor(layout.lengths) - 1 - self.offset
        return torch.stack([rows, torch.full_like(rows, self.offset) if self.reads == "begin" else ends], 1)

    def needed_once(self, layout: Layout) -> Tensor | None:
        """Return the first result of `needed` for a layout, so that recomputation in the backward pass has the same."""
        if layout not in self._cache:
            self._cache[layout] = self.needed(layout)
        return self._cache[layout]

    @contextmanager
    def only(self, row: Tensor, position: Tensor) -> Iterator[None]:
        """Declare that only the logits of the tokens at (row, position) are read inside the `with` block."""
        self.tokens = row, position
        try:
            yield
        finally:
            self.tokens = None

    def watch(self, model: nn.Module, edits: Edits) -> None:
        """Set `active` while the whole model runs."""

        def begin(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            all_read = kwargs.get("output_hidden_states") or (self.reads == "end" and _has_pad_token(model, kwargs))
            self.active = not (all_read or self.disabled)

        def end(*_: Any) -> None:
            self.active = False

        edits.add_hooks(
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(end, always_call=True),
        )


def _has_pad_token(model: Any, inputs: dict[str, Any]) -> bool:
    """Return whether a text contains the padding token, which misleads a head that looks for the last other token."""
    ids, mask, pad = inputs.get("input_ids"), inputs.get("attention_mask"), model.config.pad_token_id
    if ids is None or pad is None or ids.device.type != "cpu":
        return False
    return bool(((ids == pad) & (True if mask is None else mask.bool())).any())


def read_positions(logits: Tensor, states: Tensor, layout: Layout) -> LastBlock | str:
    """Find which tokens of the last block's `states` (total, width) these logits depend on.

    Return the reason if they are not one token per text at a fixed distance from its start or end.
    """
    one = logits[:, 1] if logits.ndim == 3 else logits
    (grad,) = torch.autograd.grad(one.float().sum(), states)
    positions = grad.abs().sum(1).nonzero().flatten().cpu().numpy()
    if len(positions) != layout.batch_size:
        return "the head reads more than one token per text"
    from_begin = positions - layout.starts[:-1]
    from_end = layout.lengths - 1 - from_begin
    if (from_begin < 0).any() or (from_end < 0).any():
        return "the head does not read one token of each text"
    if (from_begin == from_begin[0]).all():
        if logits.ndim == 3:
            return LastBlock(int(from_begin[0]) - 1, "each")
        return LastBlock(int(from_begin[0]), "begin")
    if logits.ndim == 2 and (from_end == from_end[0]).all():
        return LastBlock(int(from_end[0]), "end")
    return "the position that the head reads varies"


class QueryGroup:
    """Sequences of a group with few queries each, at positions counted from the start of the sequence."""

    def __init__(self, group: Group, positions: list[Any], firsts: Any) -> None:
        counts = np.array([len(own) for own in positions])
        self.rows, self._group, self._max_queries = group.rows, group, max(1, int(counts.max()))
        filled = np.arange(self._max_queries) < counts[:, None]
        self.query_positions = np.where(filled, firsts[:, None] + np.arange(self._max_queries), -1)
        """Index of each query among all queries, -1 for padding.  # (rows, max queries)"""
        self._positions = torch.zeros(self.rows, self._max_queries, dtype=torch.long)
        self._positions[torch.from_numpy(filled)] = torch.from_numpy(np.concatenate(positions)).long()

    def bias(self, dtype: torch.dtype, prefix: int) -> Tensor | None:
        """Return the group's additive mask for these queries.  # (rows or 1, 1, max queries or 1, prefix + longest)"""
        bias = self._group.bias(dtype, prefix)
        if bias is None or bias.shape[2] == 1:
            return bias
        positions = self._positions.view(self.rows, 1, self._max_queries, 1).expand(-1, -1, -1, bias.shape[3])
        return bias.expand(self.rows, -1, -1, -1).gather(2, positions)


def select_queries(layout: Layout, needed: Tensor) -> tuple[Tensor, AttentionGroups]:
    """Return the sorted flat positions of tokens given as (row, position), and groups with these as the only queries.

    # (needed, 2) -> (needed,)
    """
    rows, positions = (np.asarray(one) for one in needed.unbind(1))
    order = np.lexsort((positions, rows))
    rows, positions = rows[order], positions[order]
    firsts = np.searchsorted(rows, np.arange(layout.batch_size + 1))
    by_row = [positions[a:b] for a, b in zip(firsts[:-1], firsts[1:], strict=True)]
    groups = [QueryGroup(group, [by_row[m] for m in group.members], firsts[group.members]) for group in layout.groups]
    view = PaddedView([group.query_positions for group in groups], len(rows), layout.device)
    return torch.from_numpy(layout.starts[rows] + positions), AttentionGroups(groups, view, layout.padded_view)
