"""Blocks in few passes over memory, for models that compute without padding.

Norms after the sums (BERT, Devlin 2019, arXiv 1810.04805; BART, Lewis 2020, arXiv 1910.13461):

    h = norm(x + D (W_o attend(W_q x, W_k x, W_v x)))        z = norm(h + D (W_down f(W_up h)))

Norms before them (GPT-2, Radford 2019; mBART, Liu 2020, arXiv 2001.08210), with rotations R and a gate (LLaMA, Touvron
2023, arXiv 2302.13971):

    n = norm(x)    h = x + D (W_o attend(R W_q n, R W_k n, W_v n))    m = norm(h)    z = h + D (W_down f(W_up m))
                                                                          or z = h + W_down (f(W_gate m) * W_up m)

A decoder's block has a second attention, whose keys and values are maps of the encoder's states, and a norm of its own,
between the two parts. The block's modules stay where they are and say what is multiplied; only the way through them is
another, and only while the block computes without padding. A block is known by its parts' roles, and taken when its
answer stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.kernels.block_pattern import Around, Encoded, Parts, Roles, parts_of
from tunesmith.kernels.last_block import Tail, asking, tail_of
from tunesmith.kernels.layout import Layout
from tunesmith.kernels.ops.dropout import keep_scale
from tunesmith.kernels.ops.linear import compute_dtype
from tunesmith.kernels.ops.norm import add_norm, add_rms_norm, rms_norm
from tunesmith.kernels.ops.relative_bias import distances_of, has_distances
from tunesmith.kernels.unpadded import across_in, argument_names, layout_in, same_answers

__all__ = ["use_blocks"]

STATES, DISTANCES = "encoder_hidden_states", "position_bias"
"""The names under which a block is given its encoder's states, and what distances add to scores."""


class NormsAfter(Parts):
    """The first of the module's formulas."""

    norms_before = False

    def __call__(self, x: Tensor, around: Around) -> Tensor:
        """(total, width) -> (asking, width)."""
        share, encoded = self.dropouts[0].share, around.encoded
        asked = x if around.places is None else x.index_select(0, around.places)
        _, h = _added(asked, self.attention.attended(asked, x, around), self.norms[0], share)
        if self.across is not None and encoded is not None:
            _, h = _added(h, self.across.attended(h, encoded.states, Around(encoded.together)), self.norms[1], share)
        return _added(h, self.mlp(h), self.norms[-1], self.dropouts[2].share)[1]


class NormsBefore(Parts):
    """The second."""

    norms_before = True

    def __call__(self, x: Tensor, around: Around) -> Tensor:
        """(total, width) -> (asking, width)."""
        share, encoded, places = self.dropouts[0].share, around.encoded, around.places
        n = _normed(x, self.norms[0])
        asked, x = (n, x) if places is None else (n.index_select(0, places), x.index_select(0, places))
        h, m = _added(x, self.attention.attended(asked, n, around), self.norms[1], share)
        if self.across is not None and encoded is not None:
            h, m = _added(h, self.across.attended(m, encoded.states, Around(encoded.together)), self.norms[2], share)
        y, share = self.mlp(m), self.dropouts[2].share
        return torch.addcmul(h, y, keep_scale(y, share)) if share else h + y


def _normed(x: Tensor, norm: Any) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return rms_norm(x, norm.weight, _eps(norm))


def _added(x: Tensor, y: Tensor, norm: Any, dropout: float) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    if isinstance(norm, nn.LayerNorm):
        return add_norm(x, y, norm.weight, norm.bias, norm.eps, dropout)
    return add_rms_norm(x, y * keep_scale(y, dropout) if dropout else y, norm.weight, _eps(norm))


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def use_blocks(model: Any, blocks: Sequence[nn.Module], roles: Sequence[Roles]) -> bool:
    """Let a model's padding-free blocks go one of these ways, in place; whether they do.

    `roles` are the paths inside each block. All blocks are taken, or none.
    """
    kinds: tuple[type[NormsAfter | NormsBefore], ...] = (NormsAfter, NormsBefore)
    for kind in kinds:
        ways = [way for block, own in zip(blocks, roles, strict=True) if (way := parts_of(model, block, own, kind))]
        if ways and len(ways) == len(blocks) and _taken(model, ways):
            return True
    return False


def _taken(model: Any, ways: Sequence[NormsAfter | NormsBefore]) -> bool:
    """Whether the model's answers stay the same; then its blocks go these ways."""

    def take() -> None:
        for way in ways:
            way.block.forward = MethodType(_forward(way), way.block)

    def leave() -> None:
        for way in ways:
            del way.block.forward

    if not same_answers(model, take, leave):
        return False
    if model.config.is_encoder_decoder or any(has_distances(way.attention.module) for way in ways):
        return True
    last, recorded = ways[-1], list[tuple[Tensor, Layout]]()
    last.block.forward = MethodType(_forward(last, recorded=recorded), last.block)
    model.block_tail = tail_of(model, recorded)
    if model.block_tail is not None:
        model.block_tail.watch(model)
    last.block.forward = MethodType(_forward(last, tail=model.block_tail), last.block)
    return True


def _forward(
    way: NormsAfter | NormsBefore, tail: Tail | None = None, recorded: list[tuple[Tensor, Layout]] | None = None
) -> Any:
    """The block's own forward; `recorded` keeps what it gives."""
    plain = type(way.block).forward
    names = argument_names(plain)[1:]  # behind the states

    def forward(block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout, across = layout_in(args, kwargs), across_in(args, kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        states, distances = given.get(STATES), given.get(DISTANCES)
        if layout is None or hidden_states.shape[0] != 1 or (across is None) != (states is None):
            return plain(block, hidden_states, *args, **kwargs)
        if distances is None and has_distances(way.attention.module):
            distances = distances_of(way.attention.module, max(group.longest for group in layout.groups))

        def computed(hidden_states: Tensor, states: Tensor | None, distances: Tensor | None) -> Tensor:
            dtype = compute_dtype(hidden_states)
            x = hidden_states[0].to(dtype)
            seen = None if states is None or across is None else Encoded(states[0].to(dtype), across.together)
            wanted = None if tail is None else tail.read_of(layout)
            places, together = (None, layout.together) if wanted is None else asking(layout, wanted)
            out = way(x, Around(together, places, kwargs.get("position_embeddings"), distances, seen))
            return out if places is None else out.new_zeros(layout.total, out.shape[1]).index_copy(0, places, out)

        # since 5.2x transformers checkpoints in the class's `forward`, which this one stands in the place of
        again = getattr(block, "gradient_checkpointing", False) and block.training and hasattr(plain, "__wrapped__")
        call = block._gradient_checkpointing_func if again else _called
        out = call(computed, hidden_states, states, distances)
        if recorded is not None:
            out = out.detach().requires_grad_()
            recorded.append((out, layout))
        return (out[None], distances, None) if DISTANCES in names else out[None]  # which the next block is given

    return forward


def _called(computed: Any, *given: Any) -> Any:
    return computed(*given)
