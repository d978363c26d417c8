"""A packed weight multiplies like its decoded values in any dtype, forward and backward, at a few bits per value."""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tunesmith.errors import RecipeError
from tunesmith.kernels.ops import quantized
from tunesmith.kernels.ops.quantized import Bits, QuantizedLinear, QuantizedWeight, numbers_in

BITS: tuple[Bits, ...] = (4, 8)
ROUNDING = {4: 0.12, 8: 0.01}
"""Relative quantization error of a random weight, by bits."""


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(96, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", BITS)
def test_it_is_nearly_the_weight_in_a_few_bits(bits: Bits, weight: torch.Tensor) -> None:
    kept = QuantizedWeight(weight, bits)
    assert (kept.dequantized() - weight).norm() < ROUNDING[bits] * weight.norm()
    assert kept.dequantized().shape == weight.shape and kept.dequantized(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(QuantizedWeight(weight, bits).dequantized(), kept.dequantized()), "the same each time"
    large = QuantizedWeight(torch.randn(512, 1024), bits)
    held = sum(one.numel() * one.element_size() for one in (*large.parameters(), *large.buffers()))
    assert held * 8 / (512 * 1024) < bits + 0.15
    assert list(kept.state_dict()) == ["codes"], "what is made anew from the weight is not saved"


@pytest.mark.parametrize("shape", ((64, 32), (96, 80), (312, 1200), (7, 33)))
@pytest.mark.parametrize("bits", BITS)
def test_rows_of_any_length(bits: Bits, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert (QuantizedWeight(weight, bits).dequantized() - weight).norm() < ROUNDING[bits] * weight.norm()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("biased", (False, True))
def test_product_and_gradient_are_those_of_what_it_decodes_to(
    bits: Bits, dtype: torch.dtype, biased: bool, weight: torch.Tensor
) -> None:
    kept, bias = QuantizedWeight(weight, bits), torch.randn(96) if biased else None
    x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    y = kept.product(x, bias)
    expected = F.linear(x, kept.dequantized(dtype), None if bias is None else bias.to(dtype))
    assert y.dtype == dtype and torch.equal(y, expected)
    upward = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(one, x, upward)[0] for one in (y, expected)))


def test_autocast_decides_the_format(weight: torch.Tensor) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = QuantizedWeight(weight, 4).product(x, None)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.float32


def test_nothing_of_a_weight_s_size_is_kept_for_backward(weight: torch.Tensor) -> None:
    saved: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        QuantizedWeight(weight, 4).product(torch.randn(3, 64, requires_grad=True), None)
    assert not saved


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("transposed", (False, True))
def test_a_linear_map_of_it(bits: Bits, transposed: bool, weight: torch.Tensor) -> None:
    linear = QuantizedLinear(
        weight.t() if transposed else weight,
        torch.nn.Parameter(torch.ones(96), requires_grad=False),
        bits,
        transposed=transposed,
    )
    x = torch.randn(3, 64)
    assert torch.allclose(linear(x), x @ linear.weight.dequantized().t() + 1, atol=1e-5)
    assert torch.equal(copy.deepcopy(linear)(x), linear(x))
    model = torch.nn.Sequential(linear, torch.nn.Linear(96, 2))
    assert numbers_in(model) == 96 * 64 + 96 + 96 * 2 + 2
    assert not any(p.requires_grad for name, p in linear.named_parameters() if "codes" in name)


def test_the_extra_is_named_where_it_is_missing(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized._bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RecipeError, match=r"technique.bits: .*pip install 'tunesmith\[quantize\]'"):
        QuantizedWeight(weight, 4)


def test_the_library_warns_of_no_kernel_that_nobody_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes")
    with quantized.quiet_bitsandbytes():
        logger.warning("no kernel at the hub")
    logger.warning("a warning of its own")
    assert [record.message for record in caplog.records] == ["a warning of its own"]
