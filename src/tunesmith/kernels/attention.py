"""Attention by plain batched products, as one autograd function.

    P = softmax(s Q K' + M)      Y = (D * P) V      (Vaswani 2017, arXiv 1706.03762; D: dropout's mask)

PyTorch's fused attention on a CPU takes ten times as long for a text of 100 tokens in bf16, most of it in backward. Of
grouped queries those that share a key stand under each other in one matrix, so that nothing is repeated. Short texts
keep P for backward; of longer ones it is computed again, in blocks of queries that see no key beyond their last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.dropout import keep_scale

__all__ = ["HIDDEN", "attention", "plain_attention"]

KEPT = 256
"""Keys up to which P is kept: it takes a byte pair a query, head and key, where each state takes 64 a head."""

BLOCK = 512
"""Queries at a time."""

HIDDEN = -1e30
"""Added to the score of a key that may not be seen: as good as infinity, but a row of nothing else has a sum."""


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The formula.  # (rows, heads, queries, width), (rows, kv heads, keys, width)

    `mask`, (1 or rows, queries, keys), is added to the scores; with a `softcap` c a score x is c tanh(x / c) before.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask[:, None]
    weights = torch.softmax(scores, -1, dtype=scores.dtype)
    if dropout:
        weights = weights * keep_scale(weights, dropout)
    return weights @ v


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, *, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """What `plain_attention` gives. `causal`: the mask hides all later keys, so that they need not be looked at."""
    with torch.autocast(q.device.type, enabled=False):
        found: Tensor = _Attention.apply(q, k, v, mask, scaling, causal, dropout)  # type: ignore[no-untyped-call]
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, causal: bool, dropout: float
    ) -> Tensor:
        groups = _Groups(q.shape, k.shape)
        q, k, v = groups.queries(q), groups.keys(k), groups.keys(v)
        blocks = groups.blocks(causal)
        answers, kept = torch.empty_like(q), []
        for block, seen in blocks:
            shares = _shares(groups, q, k, mask, scaling, block, seen)
            keep = keep_scale(shares, dropout) if dropout else None
            answer = torch.bmm(shares if keep is None else shares * keep, v[:, :seen])
            answers = answer if len(blocks) == 1 else groups.put(answers, block, answer)
            if keep is not None or groups.num_keys <= KEPT:
                kept += [shares, keep]
        ctx.save_for_backward(q, k, v, mask, *kept)
        ctx.given = groups, scaling, causal
        return groups.as_queries(answers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of q, k and v."""
        q, k, v, mask, *kept = ctx.saved_tensors
        groups, scaling, causal = ctx.given
        grad = groups.queries(grad)
        blocks = groups.blocks(causal)
        grad_q, grad_k, grad_v = torch.empty_like(q), None, None
        for number, (block, seen) in enumerate(blocks):
            own, own_grad = groups.take(q, block), groups.take(grad, block)
            shares = kept[2 * number] if kept else _shares(groups, q, k, mask, scaling, block, seen)
            keep = kept[2 * number + 1] if kept else None
            change = torch.bmm(own_grad, v[:, :seen].transpose(1, 2))
            dropped = shares
            if keep is not None:
                change, dropped = change * keep, shares * keep
            change = torch._softmax_backward_data(change, shares, -1, shares.dtype)
            of_q = _product(change, k[:, :seen], scaling)
            grad_q = of_q if len(blocks) == 1 else groups.put(grad_q, block, of_q)
            grad_k = _added(grad_k, _product(change.transpose(1, 2), own, scaling), k)
            grad_v = _added(grad_v, torch.bmm(dropped.transpose(1, 2), own_grad), v)
        return groups.as_queries(grad_q), groups.as_keys(grad_k), groups.as_keys(grad_v), None, None, None, None


class _Groups:
    """How queries and keys are laid out: (rows * kv heads, queries that share a key, width)."""

    def __init__(self, queries: torch.Size, keys: torch.Size) -> None:
        self.rows, self.heads, self.num_queries, self.width = queries
        self.kv_heads, self.num_keys = keys[1], keys[2]
        self.sharing = self.heads // self.kv_heads

    def queries(self, x: Tensor) -> Tensor:
        """(rows, heads, queries, width), laid out."""
        return x.reshape(self.rows * self.kv_heads, self.sharing * self.num_queries, self.width)

    def as_queries(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x.view(self.rows, self.heads, self.num_queries, self.width)

    def keys(self, x: Tensor) -> Tensor:
        """(rows, kv heads, keys, width), laid out."""
        return x.reshape(self.rows * self.kv_heads, self.num_keys, self.width)

    def as_keys(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x.view(self.rows, self.kv_heads, self.num_keys, self.width)

    def blocks(self, causal: bool) -> list[tuple[slice, int]]:
        """Queries, and how many keys they may see at most."""
        before = self.num_keys - self.num_queries
        stops = [min(start + BLOCK, self.num_queries) for start in range(0, self.num_queries, BLOCK)]
        seen = [before + stop if causal else self.num_keys for stop in stops]
        return [(slice(stop - (stop - 1) % BLOCK - 1, stop), keys) for stop, keys in zip(stops, seen, strict=True)]

    def take(self, x: Tensor, block: slice) -> Tensor:
        """A block of queries in each group."""
        if block == slice(0, self.num_queries):
            return x
        return x.unflatten(1, (self.sharing, self.num_queries))[:, :, block].flatten(1, 2)

    def put(self, x: Tensor, block: slice, values: Tensor) -> Tensor:
        """X with the values of a block."""
        own = x.unflatten(1, (self.sharing, self.num_queries))[:, :, block]
        own.copy_(values.view(own.shape))
        return x

    def mask(self, mask: Tensor, block: slice, seen: int) -> Tensor:
        """A mask as it is added to a block's scores."""
        own = mask[:, None, block, :seen].expand(-1, self.sharing, -1, -1).flatten(1, 2)
        wide: Tensor = own if len(own) == 1 else own.repeat_interleave(self.kv_heads, dim=0)
        return wide


def _shares(
    groups: _Groups, q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, block: slice, seen: int
) -> Tensor:
    """P of a block of queries."""
    own, keys = groups.take(q, block), k[:, :seen].transpose(1, 2)
    if mask is None:
        scores = _product(own, keys, scaling)
    else:
        scores = torch.baddbmm(groups.mask(mask, block, seen), own, keys, alpha=scaling)
    return torch.softmax(scores, -1)


def _product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Scaling * a b."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scaling)


def _added(total: Tensor | None, more: Tensor, like: Tensor) -> Tensor:
    """A sum over blocks, of which the first ones may say less about the last keys."""
    if total is None and more.shape == like.shape:
        return more
    total = torch.zeros_like(like) if total is None else total
    total[:, : more.shape[1]] += more
    return total
