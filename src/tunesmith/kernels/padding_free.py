"""Blocks that compute on valid tokens only: padding is dropped before the first block and put back after the last.

Outside, a model stays as it is: (batch, tokens) in, padded states out, so that no head and no task knows. Between the
blocks the states are one row of tokens; the model's own attention mask is replaced by a `Layout`, which travels where
the mask would, and attention runs over groups of sequences of like length. Which query may see which key is asked of
the model's own mask function, so that causal and sliding windows are what the model says. transformers' registries of
attention and mask functions are the public way in; nothing is patched. On a GPU the sequences lie one after another for
PyTorch's own kernel, in half precision and without dropout; what that does not compute goes by groups there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from tunesmith.data.batches import Limits, cut
from tunesmith.kernels.attention import Sequences, Together, attend
from tunesmith.kernels.dropout import keep_scale
from tunesmith.kernels.prefix import prefixed, takes_attention

__all__ = ["Layout", "computes_without_padding", "use_padding_free_blocks", "with_padding"]

NAME = "tunesmith_padding_free"
ROUND_TOKENS, ROUND_LENGTH = 32, 8
"""Tokens of a step and lengths of a group are rounded up to these: oneDNN compiles a kernel for each new shape (about a
millisecond and half a megabyte each), and keeps a thousand."""

WRITTEN_OUT = 512
"""Up to which length the scores are written out: PyTorch's fused attention then takes one and a half to three times as
long forward and backward (9 heads of 64, bf16), from 1,024 on less."""

SEQUENCES_ON = ("cuda",)
"""Where PyTorch has a kernel for sequences one after another."""

GROUPS = Limits(2**20, 2**40, 16384)
"""What one more group of sequences costs, in padded pairs of tokens."""


class Layout:
    """Where the valid tokens of a padded batch are, and what may see what. Rows are padded on the right."""

    def __init__(self, mask: Tensor | None, batch_size: int, tokens: int, may_see: Callable[..., Any]) -> None:
        lengths = np.full(batch_size, tokens) if mask is None else mask.sum(1).cpu().numpy()
        self.batch_size, self.tokens, self.may_see, self.lengths = batch_size, tokens, may_see, lengths
        self.device = torch.device("cpu") if mask is None else mask.device
        self.starts = starts = np.concatenate([[0], np.cumsum(lengths)])
        self.spare = -int(starts[-1]) % ROUND_TOKENS
        if batch_size > 1 and starts[-1] + self.spare == tokens:
            self.spare += ROUND_TOKENS  # what is flat already must not look like one row of a batch
        self.total = int(starts[-1]) + self.spare
        self.places = _places(lengths, tokens).to(self.device)
        order = np.argsort(lengths, kind="stable")
        sorted_already = bool((np.diff(order) == 1).all())
        self.groups = [
            Group(order[a:b], lengths[order[a:b]], starts[order[a:b]], self, whole=sorted_already)
            for a, b in cut(lengths[order] ** 2, GROUPS)
        ]

    @cached_property
    def together(self) -> Together:
        """How its tokens attend; on a GPU as one row of sequences, and what is spare is one more."""
        known = self.may_see in (causal_mask_function, bidirectional_mask_function)
        if not known or self.device.type not in SEQUENCES_ON:
            return Together(self.groups)
        starts = [*self.starts, self.total] if self.spare else self.starts
        ends = torch.tensor(starts, dtype=torch.int32).to(self.device, non_blocking=True)
        longest = max(int(self.lengths.max()), self.spare)
        return Together(self.groups, Sequences(ends, longest, self.may_see is causal_mask_function))

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

    def __init__(self, members: Any, lengths: Any, starts: Any, layout: Layout, *, whole: bool) -> None:
        self.device, self.may_see = layout.device, layout.may_see
        self.members = members
        """Which sequences of the batch these are."""
        self.rows, self.longest = len(lengths), int(lengths[-1]) + -int(lengths[-1]) % ROUND_LENGTH
        self.even = int(lengths[0]) == self.longest
        self.tokens = slice(int(starts[0]), int(starts[0]) + int(lengths.sum())) if whole else None
        self.indices = torch.from_numpy(
            np.concatenate([s + np.arange(n) for s, n in zip(starts, lengths, strict=True)])
        ).to(self.device)
        self.places = _places(lengths, self.longest).to(self.device)
        self.lengths = torch.from_numpy(lengths).to(self.device)
        self._biases: dict[Any, Tensor] = {}
        self.causal = self.may_see is causal_mask_function
        """Whether nothing sees what comes later, so that no valid token sees padding."""

    @cached_property
    def mask(self) -> Tensor | None:
        """Which query may see which key; None where each sees all.  # (rows or 1, 1, longest, longest)"""
        positions, first = torch.arange(self.longest, device=self.device), torch.tensor(0, device=self.device)
        mask = None
        if self.may_see is not bidirectional_mask_function:
            seen = self.may_see(first, first, positions[:, None], positions[None, :])
            mask = torch.as_tensor(seen).expand(self.longest, self.longest)[None, None]
        if not self.even:
            valid = (positions < self.lengths[:, None])[:, None, None, :]
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

    def take(self, x: Tensor) -> Tensor:
        """(total, width) -> (rows * longest, width), zero where there is padding; without gradient."""
        own = x[self.tokens] if self.tokens is not None else x.index_select(0, self.indices)
        if self.even:
            return own
        return x.new_zeros(self.rows * self.longest, x.shape[1]).index_copy_(0, self.places, own)

    def put(self, x: Tensor, out: Tensor) -> None:
        """(rows * longest, width) into the group's rows of (total, width); without gradient."""
        own = x if self.even else x.index_select(0, self.places)
        if self.tokens is not None:
            out[self.tokens] = own
        else:
            out.index_copy_(0, self.indices, own)

    take_queries, put_queries = take, put

    def gather(self, x: Tensor) -> Tensor:
        """(total, heads, width) -> (rows, heads, longest, width)."""
        own = x[self.tokens] if self.tokens is not None else Take.apply(x, self.indices, 0)  # type: ignore[no-untyped-call]
        if not self.even:
            own = Put.apply(own, self.places, self.rows * self.longest)  # type: ignore[no-untyped-call]
        return own.unflatten(0, (self.rows, self.longest)).transpose(1, 2)  # type: ignore[no-any-return]

    def release(self, x: Tensor) -> Tensor:
        """(rows, heads, longest, width) -> (the group's valid tokens, heads, width)."""
        own = x.transpose(1, 2).flatten(0, 1)
        return own if self.even else Take.apply(own, self.places, 0)  # type: ignore[no-any-return, no-untyped-call]


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
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (total, heads, width)
    dropout = dropout if module.training else 0.0
    longest = max(group.longest for group in attention_mask.groups)
    if softcap is None and (longest <= WRITTEN_OUT or attention_mask.together.sequences is not None):
        prefix: Any = getattr(module, "prefix", None)
        seen = attend(
            q.flatten(1),
            k.flatten(1),
            v.flatten(1),
            attention_mask.together,
            width=q.shape[2],
            scaling=q.shape[2] ** -0.5 if scaling is None else scaling,
            dropout=dropout,
            prefix=None if prefix is None else prefix(),
        )
        return seen.view(1, *q.shape), None
    parts = [_attend(module, group, q, k, v, dropout, scaling, softcap) for group in attention_mask.groups]
    if attention_mask.groups[0].tokens is None:
        back = torch.cat([group.indices for group in attention_mask.groups])
        return Put.apply(torch.cat(parts), back, attention_mask.total)[None], None  # type: ignore[no-untyped-call]
    return torch.cat([*parts, parts[0].new_zeros(attention_mask.spare, *parts[0].shape[1:])])[None], None


def _attend(
    module: nn.Module,
    group: Group,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    q, k, v = group.gather(q), group.gather(k), group.gather(v)
    k, v, length = prefixed(module, k, v)
    if k.shape[1] != q.shape[1]:  # grouped queries
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


def use_padding_free_blocks(model: Any, blocks: Sequence[nn.Module]) -> bool:
    """Let the blocks of a model on a CPU compute without padding, in place; whether it does.

    A model is taken only when its answers to two short texts of unequal length stay the same; others keep padding.
    """
    first = next(model.parameters())
    if first.device.type != "cpu" or not blocks or not takes_attention(model) or model.config.is_encoder_decoder:
        return False
    before: str = model.config._attn_implementation
    hooks: list[Any] = []

    def take() -> None:
        hooks.extend(block.register_forward_pre_hook(_drop_padding, with_kwargs=True) for block in blocks)
        hooks.append(blocks[-1].register_forward_hook(_put_back, with_kwargs=True))
        model.attention_with_padding = before
        model.set_attn_implementation(NAME)

    def leave() -> None:
        model.set_attn_implementation(before)
        del model.attention_with_padding
        for hook in hooks:
            hook.remove()

    return same_answers(model, take, leave)


def same_answers(model: Any, take: Callable[[], None], leave: Callable[[], None]) -> bool:
    """Change how a model computes by `take`, or `leave` it as it was where its answers to two short texts changed."""
    expected = _probe(model)
    try:
        take()
        found = _probe(model)
        same = found.shape == expected.shape and bool(torch.dist(found, expected) <= 0.01 * expected.norm())
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, AssertionError):
        same = False  # its blocks do not pass the layout on
    if not same:
        leave()
    return same


def computes_without_padding(model: Any) -> bool:
    """Whether rows of unequal length cost no more than their tokens."""
    return bool(model.config._attn_implementation == NAME)


@contextmanager
def with_padding(model: Any) -> Iterator[None]:
    """For a while a model attends as it came, as writing token by token with a cache needs."""
    padding_free = computes_without_padding(model)
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
    batch, was_training = probe_batch(model), model.training
    model.eval()
    states: Tensor = model.base_model(**batch)[0]
    model.train(was_training)
    return (states.float() * batch["attention_mask"][:, :, None]).flatten()


def probe_batch(model: Any) -> dict[str, Tensor]:
    """Two texts of 3 and 5 tokens."""
    pad = model.config.pad_token_id or 0
    known = [token for token in range(min(12, model.get_input_embeddings().num_embeddings)) if token != pad]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    ids = torch.tensor([known[n % len(known)] for n in range(10)]).view(2, 5)
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


def layout_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout | None:
    """The layout among what a block is called with."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Layout)), None)


def _drop_padding(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layout = layout_in(args, kwargs)
    if layout is None:
        return None

    def flat(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(flat(part) for part in value)
        padded = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == layout.tokens
        return layout.flat(value) if padded and value.shape[0] in (1, layout.batch_size) else value

    return tuple(flat(value) for value in args), {name: flat(value) for name, value in kwargs.items()}


def _put_back(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    layout = layout_in(args, kwargs)
    if layout is None:
        return output
    if isinstance(output, tuple):
        return (layout.padded(output[0]), *output[1:])
    return layout.padded(output)
