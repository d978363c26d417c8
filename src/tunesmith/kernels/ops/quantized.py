"""A frozen weight in 4 or 8 bits by bitsandbytes, decoded for each product, forward and backward, and never kept.

    4    NF4 in blocks of 64, their scales in 8 bits in blocks of 256          (QLoRA, Dettmers 2023, arXiv 2305.14314)
    8    a whole number from -127 to 127 and one scale a row         (LLM.int8(), Dettmers 2022, arXiv 2208.07339)

    y = x decode(W)^T + b        dx = dy decode(W)

What is multiplied is in the format of the input, or of autocast. LLM.int8() rounds the input to 8 bits too; here it is
left as it is, so that a model answers as it was trained, on every device.
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


class Packed(nn.Module):
    """The codes of a weight (out, in), and what decodes them."""

    rows: Tensor
    scales: Tensor
    mean: Tensor
    scales_of_scales: Tensor
    table: Tensor

    def __init__(self, weight: Tensor, bits: Bits) -> None:
        super().__init__()
        self.bits, self.shape, self.dtype = bits, weight.shape, weight.dtype
        weight = weight.detach().contiguous()
        library = _library()
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
            self.register_buffer(name, value, persistent=False)  # made anew from the weight, never saved

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as it is multiplied.  # (out, in)"""
        if self.bits == 8:
            return self.codes.to(dtype).mul_(self.rows[:, None] / 127)
        library = _library()
        scales = library.QuantState(self.scales_of_scales, blocksize=256, code=self.table, dtype=torch.float32)
        flat = torch.Size([self.shape.numel()])  # by rows, its CPU kernel takes wrong scales where 64 parts no row
        state = library.QuantState(
            self.scales, flat, blocksize=64, quant_type="nf4", dtype=dtype, offset=self.mean, state2=scales
        )
        found: Tensor = library.dequantize_4bit(self.codes, state)
        return found.view(self.shape)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out)."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        found: Tensor = _Product.apply(x.to(dtype), None if bias is None else bias.to(dtype), self)  # type: ignore[no-untyped-call]
        return found

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{tuple(self.shape)} in {self.bits} bits"


class PackedLinear(nn.Module):
    """A frozen linear map of packed weight; `transposed`: it stands where GPT-2's `Conv1D` stood."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: Bits, *, transposed: bool = False) -> None:
        super().__init__()
        self.weight = Packed(weight.t() if transposed else weight, bits)
        self.bias = bias
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.weight.product(x, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: Packed) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed.decoded(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad @ ctx.packed.decoded(grad.dtype), None, None


def numbers_in(model: nn.Module) -> int:
    """How many parameters a model has, packed ones counted as the numbers that they stand for."""
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    codes = {id(module.codes) for module in packed}
    plain = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in codes)
    return plain + sum(module.shape.numel() for module in packed)


@contextmanager
def quiet_library() -> Iterator[None]:
    """While bitsandbytes is imported, by us or by PEFT: it misses kernels that are not asked for here."""
    talk = logging.getLogger("bitsandbytes")
    before = talk.level
    talk.setLevel(logging.ERROR)
    try:
        yield
    finally:
        talk.setLevel(before)


@cache
def _library() -> Any:
    """bitsandbytes, where the extra is installed."""
    try:
        with quiet_library():
            from bitsandbytes import functional
    except ImportError as error:
        hint = "pip install 'tunesmith[quantize]'"
        raise RecipeError("technique.bits: it needs bitsandbytes", hint=hint) from error
    return functional
