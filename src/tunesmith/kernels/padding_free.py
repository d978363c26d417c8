"""Blocks that compute on valid tokens only: padding is dropped before the first block and put back after the last.

Outside, a model stays as it is: (batch, tokens) in, padded states out, so that no head and no task knows. Between the
blocks the states are one row of tokens; the model's own attention mask is replaced by a `Layout`, which travels where
the mask would, and attention runs over groups of sequences of like length. Which query may see which key is asked of
the model's own mask function, so that causal and sliding windows are what the model says. transformers' registries of
attention and mask functions are the public way in; nothing is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from tunesmith.data.batches import Limits, cut
from tunesmith.kernels.attention import HIDDEN, plain_attention
from tunesmith.kernels.attention import attention as fast_attention
from tunesmith.kernels.prefix import prefixed, takes_attention

__all__ = ["Layout", "use_padding_free_blocks", "with_padding"]

NAME = "tunesmith_padding_free"
ROUND_TOKENS, ROUND_LENGTH = 32, 8
"""Tokens of a step and lengths of a group are rounded up to these: oneDNN compiles a kernel for each new shape (about a
millisecond and half a megabyte each), and keeps a thousand."""

GROUPS = Limits(2**20, 2**40, 16384)
"""What one more group of sequences costs, in padded pairs of tokens."""


class Layout:
    """Where the valid tokens of a padded batch are, and what may see what. Rows are padded on the right.

    Between the blocks short texts come first, so that texts of like length lie side by side.
    """

    def __init__(self, mask: Tensor | None, batch_size: int, tokens: int, may_see: Callable[..., Any]) -> None:
        lengths = np.full(batch_size, tokens) if mask is None else mask.sum(1).cpu().numpy()
        self.batch_size, self.tokens = batch_size, tokens
        valid = int(lengths.sum())
        self.spare = -valid % ROUND_TOKENS
        if batch_size > 1 and valid + self.spare == tokens:
            self.spare += ROUND_TOKENS  # what is flat already must not look like one row of a batch
        self.total = valid + self.spare
        order = np.argsort(lengths, kind="stable")
        lengths = lengths[order]
        self.places = torch.from_numpy(np.concatenate([_row(*one, tokens) for one in zip(order, lengths, strict=True)]))
        self.groups = [Group(lengths[a:b], may_see) for a, b in cut(lengths**2, GROUPS)]
        self.sizes = [*(group.tokens for group in self.groups), self.spare]

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

    def __init__(self, lengths: Any, may_see: Callable[..., Any]) -> None:
        self.rows, self.longest = len(lengths), int(lengths[-1]) + -int(lengths[-1]) % ROUND_LENGTH
        self.tokens = int(lengths.sum())
        self.even = self.tokens == self.rows * self.longest
        rows = (_row(row, length, self.longest) for row, length in enumerate(lengths))
        self.places = torch.from_numpy(np.concatenate(list(rows)))
        self.lengths, self.may_see = torch.from_numpy(lengths), may_see
        self.causal = may_see is causal_mask_function
        """Whether nothing sees what comes later, so that no valid token sees padding."""
        self.masks: dict[Any, Tensor | None] = {}

    def may_be_seen(self) -> Tensor | None:
        """Which query may see which key; None where each sees all.  # (rows or 1, longest, longest)"""
        positions = torch.arange(self.longest)
        mask = None
        if self.may_see is not bidirectional_mask_function:
            seen = self.may_see(torch.tensor(0), torch.tensor(0), positions[:, None], positions[None, :])
            mask = torch.as_tensor(seen).expand(self.longest, self.longest)[None]
        if not self.even and not self.causal:
            valid = (positions < self.lengths[:, None])[:, None, :]
            mask = valid if mask is None else mask & valid
        return mask

    def mask(self, dtype: torch.dtype, prefix: int) -> Tensor | None:
        """What is added to scores of keys of which the first `prefix` may be seen by all."""
        if (dtype, prefix) not in self.masks:
            seen = self.may_be_seen()
            if seen is not None:
                hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, HIDDEN)
                seen = F.pad(hidden, (prefix, 0)).expand(-1, self.longest, -1)
            self.masks[dtype, prefix] = seen
        return self.masks[dtype, prefix]

    def gather(self, x: Tensor) -> Tensor:
        """(the group's valid tokens, heads, width) -> (rows, heads, longest, width)."""
        if not self.even:
            x = Put.apply(x, self.places, self.rows * self.longest)  # type: ignore[no-untyped-call]
        own: Tensor = x.unflatten(0, (self.rows, self.longest)).transpose(1, 2)
        return own

    def release(self, x: Tensor) -> Tensor:
        """The inverse."""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.even else Take.apply(x, self.places, 0)  # type: ignore[no-any-return, no-untyped-call]


def _row(row: int, length: int, width: int) -> Any:
    """Indices of a row's valid tokens in a flattened rectangle."""
    return row * width + np.arange(length)


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


def layout_as_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Layout:
    """A mask function for transformers that gives the layout instead of a mask."""
    assert q_length == kv_length, "blocks without padding serve whole sequences, not one more token"
    return Layout(attention_mask, batch_size, kv_length, mask_function)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers over (1, heads, total tokens, width).

    Raises:
        ValueError: the model wants what is not computed here, a bias of places or sinks.
    """
    if wanted := [name for name in ("position_bias", "s_aux") if others.get(name) is not None]:
        raise ValueError(f"attention without padding has no {wanted[0]}")
    sizes, dropout = attention_mask.sizes, dropout if module.training else 0.0
    if torch.is_autocast_enabled("cpu"):  # rotated in fp32, it may be
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    split = [x[0].transpose(0, 1).split(sizes) for x in (query, key, value)]  # each (tokens, heads, width)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = [
        _attend(module, group, [x[number] for x in split], dropout, scaling, softcap)
        for number, group in enumerate(attention_mask.groups)
    ]
    return torch.cat([*parts, parts[0].new_zeros(sizes[-1], *parts[0].shape[1:])])[None], None


def _attend(
    module: nn.Module, group: Group, states: list[Tensor], dropout: float, scaling: float, softcap: float | None
) -> Tensor:
    q, k, v = (group.gather(x) for x in states)
    k, v, length = prefixed(module, k, v)
    mask = group.mask(q.dtype, length)
    if softcap is not None:
        answers = plain_attention(q, k, v, mask, scaling, dropout=dropout, softcap=softcap)
    elif q.dtype == torch.float32 and not dropout:
        if k.shape[1] != q.shape[1]:  # grouped queries
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        plain = mask is None or (group.causal and not length)
        mask = None if plain or mask is None else mask[:, None]
        answers = F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain and group.causal, scale=scaling)
    else:
        answers = fast_attention(q, k, v, mask, scaling, causal=group.causal, dropout=dropout)
    return group.release(answers)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, layout_as_mask)


def use_padding_free_blocks(model: Any, blocks: Sequence[nn.Module]) -> bool:
    """Let the blocks of a model on a CPU compute without padding, in place; whether it does.

    A model is taken only when its answers to two short texts of unequal length stay the same; others keep padding.
    """
    first = next(model.parameters())
    if first.device.type != "cpu" or not blocks or not takes_attention(model) or model.config.is_encoder_decoder:
        return False
    before, expected = model.config._attn_implementation, _probe(model)
    hooks = [block.register_forward_pre_hook(_drop_padding, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(_put_back, with_kwargs=True))
    try:
        model.set_attn_implementation(NAME)
        found = _probe(model)
        same = found.shape == expected.shape and bool(torch.dist(found, expected) <= 0.01 * expected.norm())
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, AssertionError):
        same = False  # its blocks do not pass the layout on
    if not same:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    else:
        model.attention_with_padding = before
    return same


@contextmanager
def with_padding(model: Any) -> Iterator[None]:
    """For a while a model attends as it came, as writing token by token with a cache needs."""
    padding_free = model.config._attn_implementation == NAME
    if padding_free:
        model.set_attn_implementation(model.attention_with_padding)
    try:
        yield
    finally:
        if padding_free:
            model.set_attn_implementation(NAME)


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """The backbone's last states for two texts of 3 and 5 tokens."""
    ids = 1 + torch.arange(10).view(2, 5) % (model.get_input_embeddings().num_embeddings - 1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    was_training = model.training
    model.eval()
    states: Tensor = model.base_model(input_ids=ids, attention_mask=mask)[0]
    model.train(was_training)
    return (states.float() * mask[:, :, None]).flatten()


def _layout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Layout)), None)


def _drop_padding(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layout = _layout(args, kwargs)
    if layout is None:
        return None

    def flat(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(flat(part) for part in value)
        padded = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == layout.tokens
        return layout.flat(value) if padded and value.shape[0] in (1, layout.batch_size) else value

    return tuple(flat(value) for value in args), {name: flat(value) for name, value in kwargs.items()}


def _put_back(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    layout = _layout(args, kwargs)
    if layout is None:
        return output
    if isinstance(output, tuple):
        return (layout.padded(output[0]), *output[1:])
    return layout.padded(output)
