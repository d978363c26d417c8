"""Fused transformer blocks, with few passes over memory, for models whose blocks compute without padding.

Post-norm (BERT, Devlin 2019, arXiv 1810.04805; BART, Lewis 2020, arXiv 1910.13461):

    h = norm(x + D (W_o attend(W_q x, W_k x, W_v x)))        z = norm(h + D (W_down f(W_up h)))

Pre-norm (GPT-2, Radford 2019; mBART, Liu 2020, arXiv 2001.08210), with rotary embeddings R and a gate (LLaMA, Touvron
2023, arXiv 2302.13971):

    n = norm(x)    h = x + D (W_o attend(R W_q n, R W_k n, W_v n))    m = norm(h)    z = h + D (W_down f(W_up m))
                                                                          or z = h + W_down (f(W_gate m) * W_up m)

A decoder block has cross-attention with its own norm between attention and MLP; its keys and values are projections of
the encoder states. The modules of a block stay in place and hold its parameters. Only its forward pass is replaced,
and only for inputs without padding. `match_block` recognizes a block by the roles of its parts; `accelerate` keeps the
fused forward pass if outputs and gradients stay equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.kernels.block_pattern import BlockInputs, BlockPattern, EncoderStates
from tunesmith.kernels.edits import Edits
from tunesmith.kernels.last_block import LastBlock, select_queries
from tunesmith.kernels.layout import Layout
from tunesmith.kernels.ops.attention import has_relative_bias, relative_bias
from tunesmith.kernels.ops.dropout import keep_scale
from tunesmith.kernels.ops.elementwise import add_norm, add_rms_norm, rms_norm
from tunesmith.kernels.ops.linear import compute_dtype
from tunesmith.kernels.unpadded import argument_names, cross_layout_in, layout_in

__all__ = ["KINDS", "PostNorm", "PreNorm", "fuse_block"]

STATES, BIAS = "encoder_hidden_states", "position_bias"
"""Argument names of a block for the encoder states and for the relative bias."""


class PostNorm(BlockPattern):
    """A block with the norms after the residual sums."""

    is_pre_norm = False

    def __call__(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """Return the output of the block.  # (total, width) -> (queries, width)"""
        p, encoder = self.dropouts[0].p, inputs.encoder
        queries = x if inputs.positions is None else x.index_select(0, inputs.positions)
        _, h = _add_norm(queries, self.attention(queries, x, inputs), self.norms[0], p)
        if self.cross_attention is not None and encoder is not None:
            y = self.cross_attention(h, encoder.states, BlockInputs(encoder.groups))
            _, h = _add_norm(h, y, self.norms[1], p)
        return _add_norm(h, self.mlp(h), self.norms[-1], self.dropouts[2].p)[1]


class PreNorm(BlockPattern):
    """A block with the norms before attention and MLP."""

    is_pre_norm = True

    def __call__(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """Return the output of the block.  # (total, width) -> (queries, width)"""
        p, encoder, positions = self.dropouts[0].p, inputs.encoder, inputs.positions
        n = _norm(x, self.norms[0])
        queries, x = (n, x) if positions is None else (n.index_select(0, positions), x.index_select(0, positions))
        h, m = _add_norm(x, self.attention(queries, n, inputs), self.norms[1], p)
        if self.cross_attention is not None and encoder is not None:
            y = self.cross_attention(m, encoder.states, BlockInputs(encoder.groups))
            h, m = _add_norm(h, y, self.norms[2], p)
        y, p = self.mlp(m), self.dropouts[2].p
        return torch.addcmul(h, y, keep_scale(y, p)) if p else h + y


def _norm(x: Tensor, norm: Any) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return rms_norm(x, norm.weight, _eps(norm))


def _add_norm(x: Tensor, y: Tensor, norm: Any, dropout: float) -> tuple[Tensor, Tensor]:
    """Return the residual sum and its norm."""
    if isinstance(norm, nn.LayerNorm):
        return add_norm(x, y, norm.weight, norm.bias, norm.eps, dropout)
    return add_rms_norm(x, y * keep_scale(y, dropout) if dropout else y, norm.weight, _eps(norm))


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


KINDS: tuple[type[PostNorm | PreNorm], ...] = (PostNorm, PreNorm)
"""All patterns."""


def fuse_block(
    pattern: BlockPattern,
    edits: Edits,
    *,
    last_block: LastBlock | None = None,
    record: Callable[[Tensor, Layout], None] | None = None,
) -> None:
    """Replace a block's forward pass by its pattern, for inputs without padding.

    `last_block` selects the tokens to compute; `record` is called with the block's output.
    """
    plain = type(pattern.block).forward
    names = argument_names(plain)[1:]  # after the hidden states

    def forward(block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout, cross = layout_in(args, kwargs), cross_layout_in(args, kwargs)
        named = dict(zip(names, args, strict=False)) | kwargs
        states, bias = named.get(STATES), named.get(BIAS)
        if layout is None or hidden_states.shape[0] != 1 or (cross is None) != (states is None):
            return plain(block, hidden_states, *args, **kwargs)
        if bias is None and has_relative_bias(pattern.attention.module):
            bias = relative_bias(pattern.attention.module, max(group.longest for group in layout.groups))

        def compute(hidden_states: Tensor, states: Tensor | None, bias: Tensor | None) -> Tensor:
            dtype = compute_dtype(hidden_states)
            x = hidden_states[0].to(dtype)
            encoder = None
            if states is not None and cross is not None:
                encoder = EncoderStates(states[0].to(dtype), cross.attention_groups)
            needed = None if last_block is None else last_block.needed_once(layout)
            positions, groups = (None, layout.attention_groups) if needed is None else select_queries(layout, needed)
            out = pattern(x, BlockInputs(groups, positions, kwargs.get("position_embeddings"), bias, encoder))
            return out if positions is None else out.new_zeros(layout.total, out.shape[1]).index_copy(0, positions, out)

        # since 5.2x transformers wraps the class's `forward` for gradient checkpointing, and this one replaces it
        recompute = getattr(block, "gradient_checkpointing", False) and block.training and hasattr(plain, "__wrapped__")
        call = block._gradient_checkpointing_func if recompute else _call
        out = call(compute, hidden_states, states, bias)
        if record is not None:
            out = out.detach().requires_grad_()
            record(out, layout)
        return (out[None], bias, None) if BIAS in names else out[None]  # the model passes the bias to the next block

    edits.set_forward(pattern.block, forward)


def _call(compute: Callable[..., Any], *inputs: Any) -> Any:
    return compute(*inputs)
