from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from tunesmith.kernels import layout as layout_module
from tunesmith.kernels.last_block import select_queries
from tunesmith.kernels.layout import Layout
from tunesmith.kernels.ops import attention
from tunesmith.kernels.ops.attention import attend

LENGTHS = ([12, 3, 7, 7, 1], [5, 5, 5], [9], [1, 2, 3, 40], [8, 8, 1, 1, 16])


def _layout(lengths: list[int], may_see: Any) -> Layout:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return Layout(mask, len(lengths), max(lengths), may_see)


def _plain(q: Tensor, k: Tensor, v: Tensor, layout: Layout, width: int, causal: bool, prefix: Tensor | None) -> Tensor:
    """Compute PyTorch's attention one text at a time."""
    out = torch.zeros_like(q)
    for start, length in zip(layout.starts[:-1], layout.lengths, strict=True):
        own = slice(int(start), int(start + length))
        queries, keys, values = (x[own].view(length, -1, width).transpose(0, 1) for x in (q, k, v))
        keys, values = (
            x if prefix is None else torch.cat([p, x], 1)
            for p, x in zip(prefix if prefix is not None else (None, None), (keys, values), strict=True)
        )
        times = len(queries) // len(keys)
        keys, values = (x.repeat_interleave(times, 0) for x in (keys, values))
        mask = None
        if causal:
            mask = torch.ones(length, keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - length)
        seen = F.scaled_dot_product_attention(queries, keys, values, mask, scale=0.3)
        out = out.index_copy(0, torch.arange(own.start, own.stop), seen.transpose(0, 1).flatten(1))
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_outputs_and_gradients_are_those_of_torch(lengths: list[int], prefix: int, causal: bool) -> None:
    layout = _layout(lengths, causal_mask_function if causal else bidirectional_mask_function)
    torch.manual_seed(0)
    wide = dict(dtype=torch.float64, requires_grad=True)
    q = torch.randn(layout.total, 16, **wide)  # type: ignore[call-overload]
    k, v = (torch.randn(layout.total, 8, **wide) for _ in range(2))  # type: ignore[call-overload]
    before = torch.randn(2, 2, prefix, 4, **wide) if prefix else None  # type: ignore[call-overload]
    wanted = [q, k, v] if before is None else [q, k, v, before]
    ours = attend(q, k, v, layout.attention_groups, width=4, scaling=0.3, prefix=before)
    plain = _plain(q, k, v, layout, 4, causal, before)
    weight = torch.randn_like(plain)
    weight[layout.total - layout.spare :] = 0
    torch.testing.assert_close(ours, plain)
    for one, other in zip(
        torch.autograd.grad((ours * weight).sum(), wanted),
        torch.autograd.grad((plain * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_few_ask_and_are_answered_the_same(lengths: list[int], causal: bool) -> None:
    layout = _layout(lengths, causal_mask_function if causal else bidirectional_mask_function)
    draw = np.random.default_rng(0)
    wanted = torch.tensor([(row, place) for row, n in enumerate(lengths) for place in range(n) if draw.random() < 0.4])
    wanted = wanted.reshape(-1, 2)[torch.randperm(len(wanted))] if len(wanted) else torch.zeros(1, 2, dtype=torch.long)
    places, together = select_queries(layout, wanted)
    q, k, v = (torch.randn(layout.total, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    some = attend(q[places], k, v, together, width=4, scaling=0.5)
    whole = attend(q, k, v, layout.attention_groups, width=4, scaling=0.5)[places]
    torch.testing.assert_close(some, whole)
    for one, other in zip(
        torch.autograd.grad(some.square().sum(), [q, k, v]),
        torch.autograd.grad(whole.square().sum(), [q, k, v]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    expected = sorted(int(layout.starts[row]) + place for row, place in wanted.tolist())
    assert places.tolist() == expected


def test_nobody_asks() -> None:
    layout = _layout([3, 5], bidirectional_mask_function)
    places, together = select_queries(layout, torch.zeros(0, 2, dtype=torch.long))
    q, k, v = (torch.randn(n, 8, requires_grad=True) for n in (0, layout.total, layout.total))
    seen = attend(q, k, v, together, width=4, scaling=0.5, dropout=0.1)
    seen.sum().backward()
    assert len(places) == 0 and seen.shape == (0, 8) and k.grad is not None and k.grad.eq(0).all()


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, most: int, longest: int, **how: Any
) -> Tensor:
    """The documented semantics of PyTorch's `varlen_attn`, which runs only on GPUs."""
    assert q_ends.dtype == torch.int32 and torch.equal(q_ends, k_ends) and most == longest
    assert q_ends.diff().max() <= longest and q.shape == k.shape == v.shape
    assert how["window_size"] in ((-1, -1), (-1, 0))
    parts = [
        F.scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=how["window_size"] == (-1, 0), scale=how["scale"]
        ).transpose(0, 1)
        for a, b in zip(q_ends.tolist()[:-1], q_ends.tolist()[1:], strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_one_after_another_is_what_groups_give(
    lengths: list[int], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "VARLEN_ATTN", _varlen)
    monkeypatch.setattr(layout_module, "VARLEN_DEVICES", ("cpu",))
    layout = _layout(lengths, causal_mask_function if causal else bidirectional_mask_function)
    half = dict(dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (torch.randn(layout.total, width, **half) for width in (16, 8, 8))  # type: ignore[call-overload]
    sequences = layout.attention_groups.sequences
    assert sequences is not None and sequences.supports(torch.bfloat16, 8)
    weight = torch.randn(layout.total, 16, dtype=torch.bfloat16)
    weight[layout.total - layout.spare :] = 0

    def run(together: attention.AttentionGroups) -> tuple[Tensor, ...]:
        seen = attend(q, k, v, together, width=8, scaling=0.3)
        valid = seen[: layout.total - layout.spare]
        return (valid, *torch.autograd.grad((seen * weight).sum(), [q, k, v]))

    for one, other in zip(
        run(layout.attention_groups), run(layout.attention_groups._replace(sequences=None)), strict=True
    ):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, atol=0.03, rtol=0.03)


def test_what_has_no_kernel_goes_by_groups_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("it has no dropout, no prefix, no fp32 and no heads of 4")

    monkeypatch.setattr(attention, "VARLEN_ATTN", refuse)
    monkeypatch.setattr(layout_module, "VARLEN_DEVICES", ("cpu",))
    together = _layout([3, 5], causal_mask_function).attention_groups
    assert together.sequences is not None
    x = torch.randn(32, 8, dtype=torch.bfloat16)
    attend(x, x, x, together, width=8, scaling=1.0, dropout=0.1)
    attend(x, x, x, together, width=8, scaling=1.0, prefix=torch.randn(2, 1, 2, 8))
    attend(x, x, x, together, width=4, scaling=1.0)
    attend(x.float(), x.float(), x.float(), together, width=8, scaling=1.0)
    assert _layout([3, 5], lambda *_: torch.tensor(True)).attention_groups.sequences is None


def test_dropout_leaves_out_its_share_and_the_gradient_is_that_of_what_was_kept() -> None:
    layout = _layout([16] * 4, bidirectional_mask_function)
    q, k, v = (torch.randn(layout.total, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(dropout: float) -> Tensor:
        torch.manual_seed(1)
        return attend(q, k, v, layout.attention_groups, width=8, scaling=0.3, dropout=dropout)

    torch.testing.assert_close(run(0.3), run(0.3))
    assert not torch.allclose(run(0.3), run(0.0))
    mean = torch.stack(
        [attend(q, k, v, layout.attention_groups, width=8, scaling=0.3, dropout=0.3) for _ in range(2000)]
    ).mean(0)
    assert torch.dist(mean, run(0.0)) < 0.05 * run(0.0).norm()
    direction = torch.randn_like(q)
    (grad,) = torch.autograd.grad(run(0.3).sin().sum(), q)
    with torch.no_grad():
        before, step = q.clone(), 1e-6
        q.copy_(before + step * direction)
        above = run(0.3).sin().sum()
        q.copy_(before - step * direction)
        below = run(0.3).sin().sum()
        q.copy_(before)
    torch.testing.assert_close((grad * direction).sum(), (above - below) / (2 * step), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", (8, 24, 31, 32, 48, 64))
def test_softmax_in_bf16_is_right_at_every_length(length: int) -> None:
    scores = torch.randn(3, 5, length, generator=torch.Generator().manual_seed(length)).bfloat16()
    grad = torch.randn(3, 5, length, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = scores.double().requires_grad_()
    shares = exact.softmax(-1)
    found = attention._softmax(scores)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), shares.detach(), atol=0, rtol=2**-8)
    (wanted,) = torch.autograd.grad(shares, exact, grad.double())
    torch.testing.assert_close(attention._softmax_backward(grad, found).double(), wanted, atol=2**-8, rtol=2**-6)
