"""A frozen weight in 4 or 8 bits (bitsandbytes), which is dequantized for each product, forward and backward.

    4    NF4 in blocks of 64, their scales in 8 bits in blocks of 256          (QLoRA, Dettmers 2023, arXiv 2305.14314)
    8    an integer from -127 to 127 and one scale per row           (LLM.int8(), Dettmers 2022, arXiv 2208.07339)

    y = x dequantize(W)^T + b        dx = dy dequantize(W)

Products are computed in the dtype of the input, or of autocast. LLM.int8() quantizes the input to 8 bits as well; here
the input keeps its dtype, so that a model computes the same outputs as in training on every device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.errors import RecipeError

Bits = Literal[4, 8]


class QuantizedWeight(nn.Module):
    """The codes of a weight (out, in) and their scales."""

    rows: Tensor
    scales: Tensor
    mean: Tensor
    scales_of_scales: Tensor
    table: Tensor

    def __init__(self, weight: Tensor, bits: Bits) -> None:
        super().__init__()
        self.bits, self.shape, self.dtype = bits, weight.shape, weight.dtype
        weight = weight.detach().contiguous()
        library = _bitsandbytes()
        if bits == 8:
            codes, rows, _ = library.int8_vectorwise_quant(weight.half())
            scales = {"rows": rows}
        else:
            codes, state = library.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
            blocks = state.state2
            scales = {
                "scales": state.absmax,
                "mean": state.offset,
                "scales_of_scales": blocks.absmax,
                "table": blocks.code,
            }
        self.codes = nn.Parameter(codes, requires_grad=False)
        for name, value in scales.items():
            self.register_buffer(name, value, persistent=False)  # recomputed from the weight, never saved

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight as products use it.  # (out, in)"""
        if self.bits == 8:
            return self.codes.to(dtype).mul_(self.rows[:, None] / 127)
        library = _bitsandbytes()
        scales = library.QuantState(self.scales_of_scales, blocksize=256, code=self.table, dtype=torch.float32)
        # flat: by rows, bitsandbytes' CPU kernel reads wrong scales if their length is no multiple of 64
        flat = torch.Size([self.shape.numel()])
        state = library.QuantState(
            self.scales, flat, blocksize=64, quant_type="nf4", dtype=dtype, offset=self.mean, state2=scales
        )
        weight: Tensor = library.dequantize_4bit(self.codes, state)
        return weight.view(self.shape)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return y of the module's formula.  # (..., in) -> (..., out)"""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y: Tensor = _Product.apply(x.to(dtype), None if bias is None else bias.to(dtype), self)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        """Return the text in `print(model)`."""
        return f"{tuple(self.shape)} in {self.bits} bits"


class QuantizedLinear(nn.Module):
    """A frozen linear layer with a quantized weight; `transposed`: it replaces GPT-2's `Conv1D`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: Bits, *, transposed: bool = False) -> None:
        super().__init__()
        self.weight = QuantizedWeight(weight.t() if transposed else weight, bits)
        self.bias = bias
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer.  # (..., in) -> (..., out)"""
        return self.weight.product(x, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad @ ctx.weight.dequantized(grad.dtype), None, None


def numbers_in(model: nn.Module) -> int:
    """Return the number of parameters of a model; a quantized weight counts its elements, not its codes."""
    quantized = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    codes = {id(module.codes) for module in quantized}
    plain = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in codes)
    return plain + sum(module.shape.numel() for module in quantized)


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Suppress warnings while bitsandbytes is imported, by us or by PEFT, about kernels that are not used here."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@cache
def _bitsandbytes() -> Any:
    """Import bitsandbytes, which the extra `quantize` installs."""
    try:
        with quiet_bitsandbytes():
            from bitsandbytes import functional
    except ImportError as error:
        hint = "pip install 'tunesmith[quantize]'"
        raise RecipeError("technique.bits: bitsandbytes is not installed", hint=hint) from error
    return functional
