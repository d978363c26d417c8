from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.kernels.ops.elementwise import ACTIVATIONS, glu, plain_glu, plain_rope, rope


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
def test_gates_and_their_gradients(activation: Any) -> None:
    gate, up = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, plain = glu(gate, up, activation), plain_glu(gate, up, activation)
    torch.testing.assert_close(plain, ACTIVATIONS[activation](gate) * up)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(
        torch.autograd.grad(ours.sin().sum(), [gate, up]),
        torch.autograd.grad(plain.sin().sum(), [gate, up]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("heads", "width"), [(3, 8), (1, 2)])
def test_rotations_and_their_gradient(heads: int, width: int) -> None:
    x = torch.randn(7, heads * width, dtype=torch.float64, requires_grad=True)
    cos, sin = (torch.randn(7, width, dtype=torch.float64) for _ in range(2))
    split = x.view(7, heads, width)
    turned = torch.cat([-split[..., width // 2 :], split[..., : width // 2]], -1)
    ours, plain = rope(x, cos, sin), plain_rope(x, cos, sin)
    torch.testing.assert_close(plain, (split * cos[:, None] + turned * sin[:, None]).view_as(x))
    torch.testing.assert_close(ours, plain)
    (one,), (other,) = (torch.autograd.grad(y.sin().sum(), x) for y in (ours, plain))
    torch.testing.assert_close(one, other)
