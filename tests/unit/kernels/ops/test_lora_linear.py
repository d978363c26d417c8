from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tunesmith.kernels.ops.linear import adapted_weight, lora_linear


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_map_is_that_of_the_adapted_weight(magnitude: bool, transposed: bool, biased: bool) -> None:
    x, A, B = torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(6, 4)
    weight = torch.randn(8, 6) if transposed else torch.randn(6, 8)
    bias, m = torch.randn(6) if biased else None, torch.rand(6) + 0.5 if magnitude else None
    whole = adapted_weight(weight, A, B, 0.5, transposed=transposed, magnitude=m)
    assert whole.shape == weight.shape
    plain = (weight.t() if transposed else weight) + 0.5 * B @ A
    if m is not None:
        plain = plain * (m / plain.norm(dim=1))[:, None]
    torch.testing.assert_close(whole.t() if transposed else whole, plain)
    y = lora_linear(x, weight, bias, A, B, 0.5, transposed=transposed, magnitude=m)
    torch.testing.assert_close(y, F.linear(x, plain, bias), atol=1e-5, rtol=1e-5)


def test_the_gradients_are_those_of_the_formula() -> None:
    x, weight = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.randn(6, 8, dtype=torch.float64)
    A = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    B = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, A, B: lora_linear(x, weight, None, A, B, 0.5), (x, A, B))


def test_the_length_is_a_constant_of_the_gradient() -> None:
    x, weight, m = torch.randn(5, 8), torch.randn(6, 8), torch.rand(6)
    A, B = torch.randn(4, 8, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    lora_linear(x, weight, None, A, B, 0.5, magnitude=m).sum().backward()
    length = (weight + 0.5 * B @ A).norm(dim=1).detach()
    (expected,) = torch.autograd.grad(((x @ (weight + 0.5 * B @ A).t()) * (m / length)).sum(), [A])
    torch.testing.assert_close(A.grad, expected, atol=1e-5, rtol=1e-5)


def test_the_lengths_are_taken_in_fp32_under_autocast() -> None:
    weight, A, B, m = torch.randn(6, 8), torch.randn(4, 8), torch.randn(6, 4), torch.ones(6)
    right = adapted_weight(weight, A, B, 0.5, transposed=False, magnitude=m)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adapted_weight(weight, A, B, 0.5, transposed=False, magnitude=m), right)


def test_dropout_falls_on_the_addition_alone() -> None:
    x, weight, A, B = torch.randn(5, 8), torch.randn(6, 8), torch.randn(4, 8), torch.randn(6, 4)
    dropped = [lora_linear(x, weight, None, A, B, 0.5, dropout=0.5) for _ in range(2)]
    assert not torch.equal(*dropped)
    zero = torch.zeros_like(B)
    assert torch.equal(lora_linear(x, weight, None, A, zero, 0.5, dropout=0.5), F.linear(x, weight))
