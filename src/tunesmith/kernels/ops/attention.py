"""Attention over groups of sequences of similar length, with dropout, as one autograd function.

    P = softmax(s Q K^T + mask + b)     O = (D * P) V        D: 0 with probability p, else 1 / (1 - p)
    dV = (D * P)^T dO    dP = D * (dO V^T)    dS = P * (dP - rowsum(P * dP))    dQ = s dS K    dK = s dS^T Q

PyTorch's fused attention has no dropout on a CPU, and is slower than these four products over short sequences (128
tokens in bf16: 8.5 ms against 3.3). The backward pass keeps P and D in the dtype of the products.

On a GPU, in half precision and without dropout, PyTorch's variable-length kernel (FlashAttention-2, Dao 2023,
arXiv 2307.08691) is used; it computes no padding and stores no scores.

The relative bias b (T5, Raffel 2020, arXiv 1910.10683) depends on the distance between query and key alone:

    score(q, k) = q . k + b[head, k - q]

T5 expands it to one number per pair of tokens, as many as there are scores. Here it stays one number per distance, and
sequences of all lengths in a batch share it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tunesmith.kernels.ops.dropout import keep_scale
from tunesmith.kernels.ops.linear import compute_dtype
from tunesmith.kernels.ops.padding import PaddedView

__all__ = [
    "AttentionGroup",
    "AttentionGroups",
    "VarlenSequences",
    "attend",
    "bias_index",
    "has_relative_bias",
    "relative_bias",
]


def _varlen_attn() -> Any:
    """Return PyTorch's variable-length kernel if it supports windows and scales; it runs on GPUs."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


VARLEN_ATTN = _varlen_attn()


class AttentionGroup(Protocol):
    """Sequences that attend in one call, padded to the longest of them."""

    rows: int

    def bias(self, dtype: torch.dtype, prefix: int) -> Tensor | None:
        """Return 0 where a query may attend to a key, else a very low number.

        # (rows or 1, 1, queries or 1, prefix + keys)
        """


@dataclass(frozen=True)
class VarlenSequences:
    """All sequences of a batch, concatenated."""

    offsets: Tensor
    """Start of each sequence, and end of the last one.  # (sequences + 1,), int32"""

    longest: int
    causal: bool

    def supports(self, dtype: torch.dtype, width: int) -> bool:
        """Return whether the kernel supports heads of this dtype and width."""
        half = dtype in (torch.bfloat16, torch.float16)
        return VARLEN_ATTN is not None and half and width % 8 == 0 and width <= 256

    def attend(self, q: Tensor, k: Tensor, v: Tensor, width: int, scaling: float) -> Tensor:
        """Return O of the module's formula, without dropout."""
        queries, keys, values = (x.view(len(x), -1, width) for x in (q, k, v))
        repeats = queries.shape[1] // keys.shape[1]
        if repeats > 1:  # PyTorch 2.11 has no `enable_gqa` there
            keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        offsets = self.offsets, self.offsets, self.longest, self.longest
        window = (-1, 0) if self.causal else (-1, -1)
        output: Tensor = VARLEN_ATTN(queries, keys, values, *offsets, scale=scaling, window_size=window)
        return output.flatten(1)


class AttentionGroups(NamedTuple):
    """All groups of a batch, and its concatenated sequences if there is a kernel for them."""

    groups: Sequence[AttentionGroup]
    queries: PaddedView
    keys: PaddedView
    """Padded view of keys and values."""

    sequences: VarlenSequences | None = None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: AttentionGroups,
    *,
    width: int,
    scaling: float,
    dropout: float = 0.0,
    prefix: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return O of the module's formula for heads of `width`.

    All queries attend to a `prefix` (2, kv heads, length, width). A relative `bias` (heads, 2 * longest - 1) requires
    that all tokens of a sequence are queries and that there is no prefix.

    # (queries, heads * width), (total, kv heads * width) twice -> (queries, heads * width)
    """
    dtype = compute_dtype(v)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    plain = prefix is None and bias is None and not dropout
    if groups.sequences is not None and plain and groups.sequences.supports(dtype, width):
        return groups.sequences.attend(q, k, v, width, scaling)
    output: Tensor = _Attend.apply(q, k, v, prefix, bias, groups, width, scaling, dropout)  # type: ignore[no-untyped-call]
    return output


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: Tensor | None,
        relative: Tensor | None,
        all_groups: AttentionGroups,
        width: int,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        groups, view_q, view_k, _ = all_groups
        repeats, length = q.shape[1] // k.shape[1], 0 if prefix is None else prefix.shape[2]
        padded = view_q.pad(q), view_k.pad(k), view_k.pad(v)
        out, kept = view_q.empty_like(q), []
        for group, rows_q, rows_k in zip(groups, view_q.groups, view_k.groups, strict=True):
            queries = _split_heads(padded[0][rows_q], group, width, scaling)
            keys, values = (_split_heads(x[rows_k], group, width) for x in padded[1:])
            if prefix is not None:
                keys, values = (
                    _with_prefix(own.to(x.dtype), x, group) for own, x in zip(prefix, (keys, values), strict=True)
                )
            keys, values = (_repeat_heads(x, repeats) for x in (keys, values))
            bias = group.bias(q.dtype, length)
            if relative is not None:
                own = relative[:, bias_index(relative, queries.shape[1])].to(q.dtype)[None]
                bias = own if bias is None else bias + own
            if bias is None:
                scores = torch.bmm(queries, keys.transpose(1, 2))
            else:
                same_for_all = bias.shape[:2] == (1, 1)
                heads = len(queries) // group.rows
                bias = bias[0] if same_for_all else bias.expand(group.rows, heads, -1, -1).flatten(0, 1)
                scores = torch.baddbmm(bias, queries, keys.transpose(1, 2))
            weights = _softmax(scores)
            keep = keep_scale(weights, dropout) if dropout else None
            _merge_heads(torch.bmm(weights if keep is None else weights * keep, values), out[rows_q], group)
            kept += [queries, keys, values, weights, keep]
        ctx.save_for_backward(*kept, relative)
        ctx.groups, ctx.width, ctx.scaling, ctx.repeats, ctx.length = all_groups, width, scaling, repeats, length
        ctx.prefix = None if prefix is None else (prefix.shape, prefix.dtype)
        return view_q.unpad(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        groups, view_q, view_k, _ = ctx.groups
        *kept, relative = ctx.saved_tensors
        d_prefix = d_relative = None
        if ctx.needs_input_grad[4]:
            d_relative = torch.zeros_like(relative, dtype=torch.float32)
        if ctx.prefix is not None:
            d_prefix = grad.new_zeros(ctx.prefix[0], dtype=torch.float32)
        padded = view_q.pad(grad, zeros=True)
        d_q = view_q.empty_like(grad)
        d_k, d_v = (view_k.empty_like(grad[:, : grad.shape[1] // ctx.repeats]) for _ in range(2))
        for number, (group, rows_q, rows_k) in enumerate(zip(groups, view_q.groups, view_k.groups, strict=True)):
            queries, keys, values, weights, keep = kept[5 * number : 5 * number + 5]
            d_output = _split_heads(padded[rows_q], group, ctx.width)
            d_values = torch.bmm((weights if keep is None else weights * keep).transpose(1, 2), d_output)
            d_weights = torch.bmm(d_output, values.transpose(1, 2))
            if keep is not None:
                d_weights.mul_(keep)
            d_scores = _softmax_backward(d_weights, weights)
            if d_relative is not None:
                d_pairs = d_scores.view(group.rows, -1, *d_scores.shape[1:]).sum(0, dtype=torch.float32).flatten(1)
                d_relative.index_add_(1, bias_index(relative, d_scores.shape[1]).flatten(), d_pairs)
            _merge_heads(torch.bmm(d_scores, keys), d_q[rows_q], group, ctx.scaling)
            d_keys = torch.bmm(d_scores.transpose(1, 2), queries)
            for place, (d, rows) in enumerate(((d_keys, d_k), (d_values, d_v))):
                d = _sum_heads(d, ctx.repeats)
                if d_prefix is not None:
                    own = d.view(group.rows, -1, *d.shape[1:])
                    d_prefix[place] += own[:, :, : ctx.length].sum(0, dtype=torch.float32)
                    d = own[:, :, ctx.length :].flatten(0, 1)
                _merge_heads(d, rows[rows_k], group)
        if d_prefix is not None:
            d_prefix = d_prefix.to(ctx.prefix[1])
        if d_relative is not None:
            d_relative = d_relative.to(relative.dtype)
        return view_q.unpad(d_q), view_k.unpad(d_k), view_k.unpad(d_v), d_prefix, d_relative, None, None, None, None


def _softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last axis; on a CPU rows shorter than 64 are up to 5 times as fast in fp32."""
    if x.shape[-1] < 64 and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return torch._softmax(x.float(), -1, False).to(x.dtype)
    return torch._softmax(x, -1, False)


def _softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """Return dS of the module's formula; on a CPU rows shorter than 32 are faster in fp32."""
    if grad.shape[-1] < 32 and grad.dtype == torch.bfloat16 and grad.device.type == "cpu":
        return torch._softmax_backward_data(grad.float(), weights.float(), -1, torch.float32).to(grad.dtype)
    return torch._softmax_backward_data(grad, weights, -1, weights.dtype)


def _split_heads(x: Tensor, group: AttentionGroup, width: int, scale: float | None = None) -> Tensor:
    """Return a copy by heads, times `scale`.  # (rows * tokens, heads * width) -> (rows * heads, tokens, width)"""
    by_head = x.view(group.rows, len(x) // group.rows, -1, width).transpose(1, 2)
    out = by_head.new_empty(by_head.shape)
    return (out.copy_(by_head) if scale is None else torch.mul(by_head, scale, out=out)).flatten(0, 1)


def _merge_heads(x: Tensor, rows: Tensor, group: AttentionGroup, scale: float | None = None) -> None:
    """Write (rows * heads, tokens, width), times `scale`, into (rows * tokens, heads * width)."""
    by_row = rows.view(group.rows, x.shape[1], -1, x.shape[2]).transpose(1, 2)
    x = x.view(by_row.shape)
    by_row.copy_(x) if scale is None else torch.mul(x, scale, out=by_row)


def _with_prefix(own: Tensor, x: Tensor, group: AttentionGroup) -> Tensor:
    """Prepend a prefix (kv heads, length, width) to keys or values (rows * kv heads, longest, width)."""
    return torch.cat([own.repeat(group.rows, 1, 1), x], 1)


def _repeat_heads(x: Tensor, times: int) -> Tensor:
    """Repeat each key head once for each of its query heads."""
    return x if times == 1 else x.repeat_interleave(times, 0)


def _sum_heads(x: Tensor, times: int) -> Tensor:
    """Invert `_repeat_heads`, for gradients."""
    return x if times == 1 else x.view(-1, times, *x.shape[1:]).sum(1)


# --- relative bias


def has_relative_bias(attention: nn.Module) -> bool:
    """Return whether an attention module has its own relative bias."""
    return isinstance(getattr(attention, "relative_attention_bias", None), nn.Embedding)


def relative_bias(attention: Any, longest: int) -> Tensor:
    """Return b of the module's formula for sequences up to `longest`: distances from 1 - longest to longest - 1.

    # (heads, 2 * longest - 1)
    """
    table = attention.relative_attention_bias
    buckets = attention._relative_position_bucket(
        torch.arange(1 - longest, longest, device=table.weight.device),
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    bias: Tensor = table(buckets).t()
    return bias


def bias_index(bias: Tensor, longest: int) -> Tensor:
    """Return the position in b of each pair of tokens.  # (longest, longest), queries by keys"""
    positions = torch.arange(longest, device=bias.device)
    return positions[None] - positions[:, None] + bias.shape[1] // 2
