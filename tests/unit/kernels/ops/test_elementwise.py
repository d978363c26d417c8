from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.ops.elementwise import (
    add_norm,
    add_rms_norm,
    plain_add_norm,
    plain_add_rms_norm,
    plain_rms_norm,
    rms_norm,
)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 16), (1, 4)])
def test_outputs_and_gradients_are_those_of_the_plain_formula(shape: tuple[int, ...], learns: bool) -> None:
    x, y, weight, bias = (torch.randn(size, dtype=torch.float64) for size in (shape, shape, shape[-1:], shape[-1:]))
    wanted = [x.requires_grad_(), y.requires_grad_()]
    wanted += [weight.requires_grad_(), bias.requires_grad_()] if learns else []
    for read in ((True, True), (True, False), (False, True)):
        _same(add_norm(x, y, weight, bias, 1e-5), plain_add_norm(x, y, weight, bias, 1e-5), read, wanted)


def _same(ours: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor], read: tuple[bool, bool], of: list[Tensor]) -> None:
    """Sum and norm are equal, and so are the gradients of a loss of one of them or both."""
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    losses = [
        torch.stack([one.sin().sum() for one, wants in zip(both, read, strict=True) if wants]).sum()
        for both in (ours, plain)
    ]
    found, expected = (torch.autograd.grad(loss, of, allow_unused=True) for loss in losses)
    for mine, its in zip(found, expected, strict=True):
        assert (mine is None) == (its is None)
        if mine is not None and its is not None:
            torch.testing.assert_close(mine, its, atol=1e-9, rtol=1e-9)


def test_dropout_falls_on_what_is_added_alone() -> None:
    x, y = torch.randn(400, 32), torch.randn(400, 32, requires_grad=True)
    weight, bias = torch.ones(32), torch.zeros(32)
    torch.manual_seed(0)
    total, first = add_norm(x, y, weight, bias, 1e-5, 0.25)
    torch.manual_seed(0)
    _, again = add_norm(x, y, weight, bias, 1e-5, 0.25)
    assert torch.equal(first, again) and not torch.equal(first, add_norm(x, y, weight, bias, 1e-5)[1])
    for loss in (first.square().sum() + first.sin().sum(), total.square().sum()):
        (grad,) = torch.autograd.grad(loss, y, retain_graph=True)
        assert 0.22 < grad.eq(0).float().mean() < 0.28, "a quarter of y leads nowhere"
    assert torch.allclose(
        add_norm(x, torch.zeros_like(y), weight, bias, 1e-5, 0.25)[1], plain_add_norm(x, 0 * y, weight, bias, 1e-5)[1]
    )


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 16), (1, 4)])
def test_rms_norms_are_those_of_torch(shape: tuple[int, ...], learns: bool) -> None:
    x, y, weight = (torch.randn(size, dtype=torch.float64) for size in (shape, shape, shape[-1:]))
    wanted = [x.requires_grad_(), y.requires_grad_(), *([weight.requires_grad_()] if learns else [])]
    for read in ((True, True), (True, False), (False, True)):
        _same(add_rms_norm(x, y, weight, 1e-5), plain_add_rms_norm(x, y, weight, 1e-5), read, wanted)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), plain_rms_norm(x, weight, 1e-5))
    torch.testing.assert_close(plain_rms_norm(x, weight, 1e-5), F.rms_norm(x, x.shape[-1:], weight, 1e-5))
