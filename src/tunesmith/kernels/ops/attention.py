"""Attention over groups of sequences of like length, with dropout, as one autograd function.

    P = softmax(s Q K^T + mask + b)     O = (D * P) V        D: 0 with probability p, else 1 / (1 - p)
    dV = (D * P)^T dO    dP = D * (dO V^T)    dS = P * (dP - rowsum(P * dP))    dQ = s dS K    dK = s dS^T Q

PyTorch's fused attention has no dropout on a CPU, and over short sequences it takes longer than these four products
(128 tokens in bf16: 8.5 ms against 3.3). What is kept are P and D in the format of the products.

On a GPU, without dropout and in half precision, PyTorch's kernel for sequences one after another (FlashAttention-2, Dao
2023, arXiv 2307.08691) has no padding at all and keeps no scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tunesmith.kernels.ops.dropout import keep_scale
from tunesmith.kernels.ops.linear import compute_dtype
from tunesmith.kernels.ops.padding import Rectangles
from tunesmith.kernels.ops.relative_bias import pairs

__all__ = ["Rows", "Sequences", "Together", "attend"]


def _varlen_attn() -> Any:
    """PyTorch's kernel where it is one that knows windows and scales; it runs on GPUs."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


VARLEN_ATTN = _varlen_attn()


class Rows(Protocol):
    """Sequences that attend in one call, padded to the longest of them."""

    rows: int

    def bias(self, dtype: torch.dtype, prefix: int) -> Tensor | None:
        """0 where a query may see a key, else very low.  # (rows or 1, 1, queries or 1, prefix + keys)"""


@dataclass(frozen=True)
class Sequences:
    """All sequences of a batch, one after another."""

    starts: Tensor
    """Where each begins, and where the last one ends.  # (sequences + 1,), int32"""

    longest: int
    causal: bool

    def take(self, dtype: torch.dtype, width: int) -> bool:
        """Whether the kernel computes heads like these."""
        half = dtype in (torch.bfloat16, torch.float16)
        return VARLEN_ATTN is not None and half and width % 8 == 0 and width <= 256

    def attend(self, q: Tensor, k: Tensor, v: Tensor, width: int, scaling: float) -> Tensor:
        """O of the module's formula, without dropout."""
        queries, keys, values = (x.view(len(x), -1, width) for x in (q, k, v))
        shared = queries.shape[1] // keys.shape[1]
        if shared > 1:  # PyTorch 2.11 has no `enable_gqa` there
            keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
        ends = self.starts, self.starts, self.longest, self.longest
        window = (-1, 0) if self.causal else (-1, -1)
        seen: Tensor = VARLEN_ATTN(queries, keys, values, *ends, scale=scaling, window_size=window)
        return seen.flatten(1)


class Together(NamedTuple):
    """Who attends to whom: groups of like length, and all in one where there is a kernel for that."""

    groups: Sequence[Rows]
    asking: Rectangles
    """Their queries."""

    seen: Rectangles
    """Their keys and values."""

    sequences: Sequences | None = None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    together: Together,
    *,
    width: int,
    scaling: float,
    dropout: float = 0.0,
    prefix: Tensor | None = None,
    distances: Tensor | None = None,
) -> Tensor:
    """O of the module's formula, of heads `width` wide; a `prefix` (2, kv heads, length, width) is seen by all rows, b
    is of the `distances` between tokens (`distances.py`), where all of a sequence ask and there is no prefix.

    # (asking, heads * width), (total, kv heads * width) twice -> (asking, heads * width)
    """
    dtype = compute_dtype(v)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    plain = prefix is None and distances is None and not dropout
    if together.sequences is not None and plain and together.sequences.take(dtype, width):
        return together.sequences.attend(q, k, v, width, scaling)
    found: Tensor = _Attend.apply(q, k, v, prefix, distances, together, width, scaling, dropout)  # type: ignore[no-untyped-call]
    return found


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: Tensor | None,
        distances: Tensor | None,
        together: Together,
        width: int,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        groups, asking, seen, _ = together
        shared, length = q.shape[1] // k.shape[1], 0 if prefix is None else prefix.shape[2]
        padded = asking.take(q), seen.take(k), seen.take(v)
        out, kept = asking.like(q), []
        for group, asks, answers in zip(groups, asking.groups, seen.groups, strict=True):
            queries = _by_head(padded[0][asks], group, width, scaling)
            keys, values = (_by_head(x[answers], group, width) for x in padded[1:])
            if prefix is not None:
                keys, values = (
                    _behind(own.to(x.dtype), x, group) for own, x in zip(prefix, (keys, values), strict=True)
                )
            keys, values = (_repeated(x, shared) for x in (keys, values))
            bias = group.bias(q.dtype, length)
            if distances is not None:
                own = distances[:, pairs(distances, queries.shape[1])].to(q.dtype)[None]
                bias = own if bias is None else bias + own
            if bias is None:
                scores = torch.bmm(queries, keys.transpose(1, 2))
            else:
                alike = bias.shape[:2] == (1, 1)
                bias = bias[0] if alike else bias.expand(group.rows, len(queries) // group.rows, -1, -1).flatten(0, 1)
                scores = torch.baddbmm(bias, queries, keys.transpose(1, 2))
            shares = _softmax(scores)
            keep = keep_scale(shares, dropout) if dropout else None
            _put_rows(torch.bmm(shares if keep is None else shares * keep, values), out[asks], group)
            kept += [queries, keys, values, shares, keep]
        ctx.save_for_backward(*kept, distances)
        ctx.together, ctx.width, ctx.scaling, ctx.shared, ctx.length = together, width, scaling, shared, length
        ctx.prefix = None if prefix is None else (prefix.shape, prefix.dtype)
        return asking.put(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        groups, asking, seen, _ = ctx.together
        *kept, distances = ctx.saved_tensors
        of_prefix = of_distances = None
        if ctx.needs_input_grad[4]:
            of_distances = torch.zeros_like(distances, dtype=torch.float32)
        if ctx.prefix is not None:
            of_prefix = grad.new_zeros(ctx.prefix[0], dtype=torch.float32)
        padded = asking.take(grad, zeros=True)
        of_q = asking.like(grad)
        of_k, of_v = (seen.like(grad[:, : grad.shape[1] // ctx.shared]) for _ in range(2))
        for number, (group, asks, answers) in enumerate(zip(groups, asking.groups, seen.groups, strict=True)):
            queries, keys, values, shares, keep = kept[5 * number : 5 * number + 5]
            d_seen = _by_head(padded[asks], group, ctx.width)
            d_values = torch.bmm((shares if keep is None else shares * keep).transpose(1, 2), d_seen)
            d_shares = torch.bmm(d_seen, values.transpose(1, 2))
            if keep is not None:
                d_shares.mul_(keep)
            d_scores = _through_softmax(d_shares, shares)
            if of_distances is not None:
                of_pairs = d_scores.view(group.rows, -1, *d_scores.shape[1:]).sum(0, dtype=torch.float32).flatten(1)
                of_distances.index_add_(1, pairs(distances, d_scores.shape[1]).flatten(), of_pairs)
            _put_rows(torch.bmm(d_scores, keys), of_q[asks], group, ctx.scaling)
            d_keys = torch.bmm(d_scores.transpose(1, 2), queries)
            for place, (d, rows) in enumerate(((d_keys, of_k), (d_values, of_v))):
                d = _summed(d, ctx.shared)
                if of_prefix is not None:
                    own = d.view(group.rows, -1, *d.shape[1:])
                    of_prefix[place] += own[:, :, : ctx.length].sum(0, dtype=torch.float32)
                    d = own[:, :, ctx.length :].flatten(0, 1)
                _put_rows(d, rows[answers], group)
        if of_prefix is not None:
            of_prefix = of_prefix.to(ctx.prefix[1])
        if of_distances is not None:
            of_distances = of_distances.to(distances.dtype)
        return asking.put(of_q), seen.put(of_k), seen.put(of_v), of_prefix, of_distances, None, None, None, None


def _softmax(x: Tensor) -> Tensor:
    """Over the last axis; a row of less than 64 in bf16 takes a CPU up to five times as long as in fp32."""
    if x.shape[-1] < 64 and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return torch._softmax(x.float(), -1, False).to(x.dtype)
    return torch._softmax(x, -1, False)


def _through_softmax(grad: Tensor, shares: Tensor) -> Tensor:
    """The formula's dS; here it is rows of less than 32."""
    if grad.shape[-1] < 32 and grad.dtype == torch.bfloat16 and grad.device.type == "cpu":
        return torch._softmax_backward_data(grad.float(), shares.float(), -1, torch.float32).to(grad.dtype)
    return torch._softmax_backward_data(grad, shares, -1, shares.dtype)


def _by_head(x: Tensor, group: Rows, width: int, scale: float | None = None) -> Tensor:
    """(rows * tokens, heads * width) -> (rows * heads, tokens, width), a copy, times `scale`."""
    by_head = x.view(group.rows, len(x) // group.rows, -1, width).transpose(1, 2)
    out = by_head.new_empty(by_head.shape)
    return (out.copy_(by_head) if scale is None else torch.mul(by_head, scale, out=out)).flatten(0, 1)


def _put_rows(x: Tensor, rows: Tensor, group: Rows, scale: float | None = None) -> None:
    """(rows * heads, tokens, width), times `scale`, into (rows * tokens, heads * width)."""
    by_row = rows.view(group.rows, x.shape[1], -1, x.shape[2]).transpose(1, 2)
    x = x.view(by_row.shape)
    by_row.copy_(x) if scale is None else torch.mul(x, scale, out=by_row)


def _behind(own: Tensor, x: Tensor, group: Rows) -> Tensor:
    """Keys or values (rows * kv heads, longest, width) with those of the prefix (kv heads, length, width) first."""
    return torch.cat([own.repeat(group.rows, 1, 1), x], 1)


def _repeated(x: Tensor, times: int) -> Tensor:
    """Each key head as often as it has query heads."""
    return x if times == 1 else x.repeat_interleave(times, 0)


def _summed(x: Tensor, times: int) -> Tensor:
    """The inverse of `_repeated`, for gradients."""
    return x if times == 1 else x.view(-1, times, *x.shape[1:]).sum(1)
