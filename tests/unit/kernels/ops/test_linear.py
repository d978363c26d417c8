from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.kernels.ops.elementwise import Activation
from tunesmith.kernels.ops.linear import LinearPart, compute_dtype, linear_part, linears, plain_linears

ACTIVATIONS: tuple[Activation, ...] = ("none", "gelu", "gelu_tanh", "relu", "silu")


def _parts(draw: torch.Generator, *, wide: int, outs: tuple[int, ...], learn: str) -> list[LinearPart]:
    def tensor(*shape: int, learns: bool) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_(learns)

    parts = []
    for number, out in enumerate(outs):
        weight = tensor(out, wide, learns=learn == "all")
        bias = tensor(out, learns=learn != "low") if number % 2 == 0 else None
        low = (tensor(3, wide, learns=True), tensor(out, 3, learns=True)) if learn != "bias" and number != 1 else ()
        parts.append(LinearPart(weight, bias, *low, scaling=0.5 + number))
    return parts


@pytest.mark.parametrize("learn", ["all", "low", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "outs"), [((7, 5), (4,)), ((2, 3, 8), (6, 2, 9)), ((1, 1), (1, 1))])
def test_outputs_and_gradients_are_those_of_the_plain_formula(
    shape: tuple[int, ...], outs: tuple[int, ...], activation: Activation, learn: str
) -> None:
    draw = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()
    parts = _parts(draw, wide=shape[-1], outs=outs, learn=learn)
    wanted = [
        t for part in parts for t in (part.weight, part.bias, part.A, part.B) if t is not None and t.requires_grad
    ]

    def found(through: Any) -> tuple[Tensor, ...]:
        ys = through(x, parts, activation)
        loss = sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in ys)
        return (*ys, *torch.autograd.grad(loss, [x, *wanted]))

    for ours, plain in zip(found(linears), found(plain_linears), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)


def test_under_autocast_products_are_in_its_format_and_gradients_in_that_of_what_learns() -> None:
    x, part = (
        torch.randn(4, 8, requires_grad=True),
        LinearPart(torch.randn(6, 8), None, torch.randn(2, 8), torch.zeros(6, 2)),
    )
    assert part.A is not None and part.B is not None
    part.A.requires_grad_()
    part.B.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(x) == torch.bfloat16
        (y,) = linears(x, [part])
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad is not None and part.B.grad is not None and part.A.grad is not None
    assert x.grad.dtype == part.B.grad.dtype == torch.float32
    (plain,) = plain_linears(x, [part])
    assert torch.dist(y.float(), plain) < 0.01 * plain.norm()
    assert part.A.grad.abs().max() == 0, "B is zero"


def test_what_nobody_learns_from_is_not_computed() -> None:
    x = torch.randn(4, 8)
    bias = torch.zeros(6, requires_grad=True)
    (y,) = linears(x, [LinearPart(torch.randn(6, 8), bias)])
    y.sum().backward()
    assert x.grad is None and bias.grad is not None and bias.grad.eq(4).all()


def test_a_module_with_hooks_or_of_another_kind_is_no_part() -> None:
    linear = nn.Linear(3, 2)
    part = linear_part(linear)
    assert part is not None and part.weight is linear.weight and part.bias is linear.bias
    linear.register_forward_hook(lambda *_: None)
    assert linear_part(linear) is None and linear_part(nn.Identity()) is None
