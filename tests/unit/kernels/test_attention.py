from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.kernels import attention as kernel
from tunesmith.kernels.attention import HIDDEN, attention, plain_attention

SHAPES = ((2, 4, 4, 9, 9, 8), (3, 6, 2, 17, 17, 4), (1, 9, 3, 40, 45, 8), (2, 2, 1, 1, 6, 4))
"""(rows, heads, kv heads, queries, keys, width)"""


@pytest.fixture(autouse=True, params=["one block, kept", "blocks, computed again"])
def blocks(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if request.param.startswith("blocks"):
        monkeypatch.setattr(kernel, "BLOCK", 8)
        monkeypatch.setattr(kernel, "KEPT", 0)


def _mask(kind: str, rows: int, queries: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    """Of causal attention the keys before the queries are a prefix."""
    if kind == "none":
        return None
    seen = torch.ones(1, queries, keys, dtype=torch.bool).tril(keys - queries)
    if kind == "rows":
        seen = (torch.arange(keys) < torch.arange(1, rows + 1)[:, None])[:, None, :].expand(-1, queries, -1)
    if kind == "window":
        seen = seen & ~torch.ones_like(seen).tril(keys - queries - 3)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, HIDDEN)


def _both(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> list[list[Tensor]]:
    rows, heads, kv_heads, queries, keys, width = shape
    # as a model gives them: the heads of a token lie side by side
    given = [
        torch.randn(rows, n, h, width, dtype=dtype).transpose(1, 2)
        for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    ]
    mask, weights = _mask(kind, rows, queries, keys, dtype), torch.randn(rows, heads, queries, width, dtype=dtype)
    found = []
    for form, more in ((attention, {"causal": kind in ("causal", "window")}), (plain_attention, {})):
        tensors = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in given]
        answers = form(*tensors, mask, 0.3, **more)  # type: ignore[arg-type]
        (answers * weights).sum().backward()
        found.append([answers.detach(), *(x.grad for x in tensors if x.grad is not None)])
    return found


@pytest.mark.parametrize("kind", ["none", "causal", "rows", "window"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_answers_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], kind: str) -> None:
    for one, expected in zip(*_both(shape, kind, torch.float32), strict=True):
        torch.testing.assert_close(one, expected, atol=2e-6, rtol=2e-6)
    for one, expected in zip(*_both(shape, kind, torch.bfloat16), strict=True):
        assert torch.dist(one, expected) <= 0.02 * expected.norm()


def test_a_query_that_may_see_nothing_breaks_nothing() -> None:
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 3, 3)
    mask[:, 2] = HIDDEN
    answers = attention(q, k, v, mask, 0.5)
    (answers[:, :, :2]).sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))  # type: ignore[union-attr]


def test_dropout_draws_what_the_formula_draws() -> None:
    q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
    found = []
    for form in (attention, plain_attention):
        torch.manual_seed(1)
        answers = form(q, k, v, None, 0.5, dropout=0.4)
        found.append([answers, *torch.autograd.grad(answers.square().sum(), (q, k, v))])
    for one, expected in zip(*found, strict=True):
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)
