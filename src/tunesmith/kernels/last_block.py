"""A last block computed only where its answer is read: keys are all there, few tokens ask.

Of a text that is classified the head reads one token; what the last block makes of the others nobody sees. Queries, the
block's output and its MLP are then computed where they are wanted, at a fraction of a block's cost. What a head reads
is found from its gradient, so that no head has to be known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.kernels.layout import Group, Layout
from tunesmith.kernels.ops.attention import Together
from tunesmith.kernels.ops.padding import Rectangles
from tunesmith.kernels.unpadded import probe_batch

__all__ = ["Asking", "Tail", "asking", "tail_of"]


@dataclass
class Tail:
    """Where the last block's answer is read. Sound only while the whole model is called for its logits: `active`."""

    offset: int
    """How far from the begin (or end) of a text the one token stands that the head reads, or how many virtual tokens
    stand before the one whose logits are asked for."""

    reads: str
    """'begin', 'end', or 'each': every token has logits."""

    off: bool = False
    """While what stands before the text is taken away."""

    active: bool = False
    asked: tuple[Tensor, Tensor] | None = None
    """Rows and places of the only tokens whose logits are wanted for now."""

    _asked_of: WeakKeyDictionary[Layout, Tensor | None] = field(default_factory=WeakKeyDictionary)

    def wanted(self, layout: Layout) -> Tensor | None:
        """(row, place) of what is read; None where all is."""  # (wanted, 2)
        if not self.active or layout.device.type != "cpu":  # a GPU's kernel has no queries that are few
            return None
        if self.reads == "each":
            if self.asked is None:
                return None
            row, place = self.asked
            return torch.stack([row, place + self.offset], 1)
        rows = torch.arange(layout.batch_size)
        ends = torch.as_tensor(layout.lengths) - 1 - self.offset
        return torch.stack([rows, torch.full_like(rows, self.offset) if self.reads == "begin" else ends], 1)

    def read_of(self, layout: Layout) -> Tensor | None:
        """`wanted`, asked once for a layout: what is computed a second time, in a backward pass, is the same."""
        if layout not in self._asked_of:
            self._asked_of[layout] = self.wanted(layout)
        return self._asked_of[layout]

    def watch(self, model: nn.Module) -> None:
        """Be active while the model is called as a whole."""

        def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            told = kwargs.get("output_hidden_states") or (self.reads == "end" and _holds_padding(model, kwargs))
            self.active = not (told or self.off)

        def end(*_: Any) -> None:
            self.active = False

        model.register_forward_pre_hook(begin, with_kwargs=True)
        model.register_forward_hook(end, always_call=True)


def _holds_padding(model: Any, given: dict[str, Any]) -> bool:
    """Whether the token that pads is one of a text too: a head that looks for the last other one reads elsewhere."""
    ids, mask, pad = given.get("input_ids"), given.get("attention_mask"), model.config.pad_token_id
    if ids is None or pad is None or ids.device.type != "cpu":
        return False
    return bool(((ids == pad) & (True if mask is None else mask.bool())).any())


def tail_of(model: nn.Module, recorded: list[tuple[Tensor, Layout]]) -> Tail | None:
    """What the model's head reads of its last block, which leaves its answers in `recorded`; None where it is more."""
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            logits = model(**probe_batch(model)).logits.float()
            (states, layout), *more = recorded
            one = logits[:, 1] if logits.ndim == 3 else logits
            (grad,) = torch.autograd.grad(one.sum(), states)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return None
    finally:
        model.train(was_training)
    places = grad.abs().sum(1).nonzero().flatten().numpy()
    if more or len(places) != layout.batch_size:
        return None
    from_begin = places - layout.starts[:-1]
    from_end = layout.lengths - 1 - from_begin
    if (from_begin < 0).any() or (from_end < 0).any():
        return None
    if logits.ndim == 3:
        return Tail(int(from_begin[0]) - 1, "each") if (from_begin == from_begin[0]).all() else None
    if (from_begin == from_begin[0]).all():
        return Tail(int(from_begin[0]), "begin")
    return Tail(int(from_end[0]), "end") if (from_end == from_end[0]).all() else None


class Asking:
    """The sequences of a group of which some tokens ask: `places` are theirs, counted from each sequence's begin."""

    def __init__(self, group: Group, places: list[Any], firsts: Any) -> None:
        counts = np.array([len(own) for own in places])
        self.rows, self._group, self._most = group.rows, group, max(1, int(counts.max()))
        filled = np.arange(self._most) < counts[:, None]
        self.rectangle = np.where(filled, firsts[:, None] + np.arange(self._most), -1)
        """Which of all that ask these are, -1 where there is none.  # (rows, most)"""
        self._places = torch.zeros(self.rows, self._most, dtype=torch.long)
        self._places[torch.from_numpy(filled)] = torch.from_numpy(np.concatenate(places)).long()

    def bias(self, dtype: torch.dtype, prefix: int) -> Tensor | None:
        """Of the group's mask, the queries that ask.  # (rows or 1, 1, most or 1, prefix + longest)"""
        bias = self._group.bias(dtype, prefix)
        if bias is None or bias.shape[2] == 1:
            return bias
        places = self._places.view(self.rows, 1, self._most, 1).expand(-1, -1, -1, bias.shape[3])
        return bias.expand(self.rows, -1, -1, -1).gather(2, places)


def asking(layout: Layout, wanted: Tensor) -> tuple[Tensor, Together]:
    """The flat places of tokens (row, place) that are wanted, sorted, and the layout's groups in which these ask.

    # (wanted, 2) -> (wanted,)
    """
    rows, places = (np.asarray(one) for one in wanted.unbind(1))
    order = np.lexsort((places, rows))
    rows, places = rows[order], places[order]
    firsts = np.searchsorted(rows, np.arange(layout.batch_size + 1))
    by_row = [places[a:b] for a, b in zip(firsts[:-1], firsts[1:], strict=True)]
    groups = [Asking(group, [by_row[m] for m in group.members], firsts[group.members]) for group in layout.groups]
    padded = Rectangles([group.rectangle for group in groups], len(rows), layout.device)
    return torch.from_numpy(layout.starts[rows] + places), Together(groups, padded, layout.padded_groups)
