"""Blocks that compute on valid tokens only: padding is removed before the first block and restored after the last.

The model's interface stays as it is: (batch, tokens) in, padded states out, so that heads and tasks need no change.
Between blocks the states are one row of tokens. A `Layout` is passed in place of the model's attention mask, and
attention runs over groups of sequences of similar length. Both functions are registered in transformers' public
interfaces for attention and masks; nothing is patched. On a GPU the sequences are concatenated for PyTorch's
variable-length kernel, in half precision and without dropout; other cases are computed in groups, as on a CPU.

The blocks of a decoder receive the encoder states as one row of tokens, and a `CrossAttentionLayout` in place of their
mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function

from tunesmith.data.batches import host_lengths
from tunesmith.kernels.edits import Edits
from tunesmith.kernels.layout import CrossAttentionGroup, CrossAttentionLayout, Group, Layout, known_lengths
from tunesmith.kernels.ops.attention import attend, has_relative_bias, relative_bias
from tunesmith.kernels.ops.dropout import keep_scale
from tunesmith.kernels.ops.padding import Pad
from tunesmith.kernels.prefix import prefixed

__all__ = ["argument_names", "cross_layout_in", "layout_in", "remove_padding"]

NAME = "tunesmith_unpadded"
MAX_EXPLICIT_LENGTH = 512
"""Maximum length of sequences whose attention scores are computed explicitly. Up to this length PyTorch's fused
attention takes 1.5 to 3 times as long, forward and backward (9 heads of 64, bf16); from 1,024 on it is faster."""

ENCODER_PREFIX = "encoder_"
"""Prefix of the names of a decoder block's arguments that come from the encoder."""


def layout_as_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Layout:
    """Return a layout in place of a mask (a mask function for transformers)."""
    whole = q_length == kv_length or mask_function is bidirectional_mask_function  # cross-attention: the lengths differ
    assert whole, "attention without padding does not support a key-value cache"
    return Layout(attention_mask, batch_size, kv_length, mask_function)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout | CrossAttentionLayout,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention without padding (an attention function for transformers).

    # query (1, heads, total, width), key and value (1, kv heads, total, width) -> (1, total, heads, width)

    Raises:
        ValueError: the model has a position bias per pair of tokens, or attention sinks.
    """
    cross, bias = isinstance(attention_mask, CrossAttentionLayout), others.get("position_bias")
    if bias is not None and cross and not has_relative_bias(module):  # T5 passes zeros there
        bias = None
    unsupported = bias is not None and (bias.ndim != 2 or cross or hasattr(module, "prefix"))
    if unsupported or others.get("s_aux") is not None:
        what = "a position bias per pair of tokens" if unsupported else "attention sinks"
        raise ValueError(f"attention without padding does not support {what}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (total, heads, width)
    dropout = dropout if module.training else 0.0
    longest = max(group.longest for group in attention_mask.groups)
    groups = attention_mask.attention_groups
    explicit = longest <= MAX_EXPLICIT_LENGTH or groups.sequences is not None or bias is not None
    if softcap is None and explicit:
        prefix: Any = getattr(module, "prefix", None)
        output = attend(
            q.flatten(1),
            k.flatten(1),
            v.flatten(1),
            groups,
            width=q.shape[2],
            scaling=q.shape[2] ** -0.5 if scaling is None else scaling,
            dropout=dropout,
            prefix=None if prefix is None else prefix(),
            bias=bias,
        )
        return output.view(1, *q.shape), None
    parts = [_attend(module, group, q, k, v, dropout, scaling, softcap) for group in attention_mask.groups]
    if attention_mask.groups[0].tokens is None:
        indices = torch.cat([group.indices for group in attention_mask.groups])
        return Pad.apply(torch.cat(parts), indices, attention_mask.total)[None], None  # type: ignore[no-untyped-call]
    return torch.cat([*parts, parts[0].new_zeros(attention_mask.spare, *parts[0].shape[1:])])[None], None


def _attend(
    module: nn.Module,
    group: Group | CrossAttentionGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    q, k, v = group.gather_queries(q), group.gather(k), group.gather(v)
    k, v, length = prefixed(module, k, v)
    if k.shape[1] != q.shape[1]:  # grouped-query attention
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    plain = dropout == 0.0 and softcap is None
    if plain and group.causal and not length:
        return group.release(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
    mask = F.pad(group.mask, (length, 0), value=True) if length and group.mask is not None else group.mask
    if plain:
        return group.release(F.scaled_dot_product_attention(q, k, v, mask, scale=scaling))
    scores = (q * (scaling if scaling is not None else q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=scores.dtype)
    if dropout:
        weights = weights * keep_scale(weights, dropout)
    return group.release(weights @ v)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, layout_as_mask)


def remove_padding(model: Any, blocks: Sequence[nn.Module], edits: Edits) -> None:
    """Change a model so that its blocks compute without padding."""
    paths = {module: path for path, module in model.named_modules()}
    last_of_stack = {paths[block].rpartition(".")[0]: block for block in blocks}
    for module in model.modules():
        if has_relative_bias(module):
            edits.set_method(module, "compute_bias", _compute_bias(model.config))
    for block in blocks:
        edits.add_hooks(block.register_forward_pre_hook(_remove, with_kwargs=True))
    for block in last_of_stack.values():
        edits.add_hooks(block.register_forward_hook(_restore, with_kwargs=True))
    _pass_lengths_on(model, edits)
    edits.set_attention(model, NAME)


def _compute_bias(config: Any) -> Callable[..., Tensor]:
    """Return a `compute_bias` for T5 that has one number per distance while the model computes without padding."""

    def compute_bias(module: Any, query_length: int, key_length: int, *args: Any, **kwargs: Any) -> Tensor:
        if config._attn_implementation == NAME:
            return relative_bias(module, query_length)
        bias: Tensor = type(module).compute_bias(module, query_length, key_length, *args, **kwargs)
        return bias

    return compute_bias


def _pass_lengths_on(model: nn.Module, edits: Edits) -> None:
    """Provide the lengths that are known on the host to the layouts of each forward pass."""
    contexts: list[Any] = []

    def begin(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        contexts.append(known_lengths(_by_width(kwargs)))
        contexts[-1].__enter__()

    def end(*_: Any) -> None:
        contexts.pop().__exit__(None, None, None)

    edits.add_hooks(
        model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end, always_call=True)
    )


def _by_width(inputs: Mapping[str, Any]) -> dict[int, Any]:
    """Return width of the padded batch -> known lengths of its mask; a width that two masks share is left out."""
    masks = [value for name, value in inputs.items() if name.endswith("attention_mask") and isinstance(value, Tensor)]
    widths = [mask.shape[1] for mask in masks if mask.ndim == 2]
    known = {mask.shape[1]: lengths for mask in masks if mask.ndim == 2 and (lengths := host_lengths(mask)) is not None}
    return {width: lengths for width, lengths in known.items() if widths.count(width) == 1}


def layout_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout | None:
    """Return the layout among a block's arguments; None if it computes with padding."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Layout)), None)


def cross_layout_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CrossAttentionLayout | None:
    """Return the layout of cross-attention among a block's arguments; None if there is none."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, CrossAttentionLayout)), None)


@cache
def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the argument names of a class's `forward`, in order."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _remove(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Remove padding from a block's arguments; a forward pre-hook."""
    named = [*zip(chain(argument_names(type(block).forward), repeat("")), args, strict=False), *kwargs.items()]
    layouts = [(name, value) for name, value in named if isinstance(value, Layout)]
    own = next((value for name, value in layouts if not name.startswith(ENCODER_PREFIX)), None)
    keys = next((value for name, value in layouts if name.startswith(ENCODER_PREFIX)), None)
    if own is None:
        return None
    cross = None if keys is None else own.cross(keys)
    recompute = getattr(block, "gradient_checkpointing", False)  # a cached tensor would differ in the second pass

    def unpad(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(unpad(name, part) for part in value)
        if cross is not None and name.startswith(ENCODER_PREFIX):
            if not isinstance(value, Tensor) or value.ndim != 3:
                return cross if value is keys else value
            return cross.keys.unpad(value) if recompute else cross.states(value)
        padded = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == own.tokens
        return own.unpad(value) if padded and value.shape[0] in (1, own.batch_size) else value

    values = [unpad(name, value) for name, value in named]
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def _restore(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Restore padding in a block's output; a forward hook."""
    layout = layout_in(args, kwargs)
    if layout is None:
        return output
    if isinstance(output, tuple):
        return (layout.pad(output[0]), *output[1:])
    return layout.pad(output)
