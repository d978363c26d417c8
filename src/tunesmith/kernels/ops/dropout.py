"""Dropout (Srivastava 2014) on a CPU, with a mask that costs one 16-bit multiplication per element.

PyTorch draws one float per element on a CPU, which takes longer than the matrix product before it. Here a table of 2^20
random 16-bit numbers is drawn once. A mask is a slice of the table that starts at a random position, times a random odd
number. Position and factor come from PyTorch's generator, so a seed determines every mask. Multiplication by an odd
number permutes the 16-bit numbers, so the elements of a slice stay independent and uniform; another factor gives other
masks from the same slice (multiply-shift hashing, Dietzfelbinger 1997). The keep probability is exact to 1 / 65536.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["dropout_forward", "keep_scale"]

SLICE_ELEMENTS = 2**19
"""Maximum number of elements of one slice; the table has twice as many."""


@cache
def _table() -> Tensor:
    words = np.random.Generator(np.random.SFC64(0)).integers(0, 2**64, size=SLICE_ELEMENTS // 2, dtype=np.uint64)
    return torch.from_numpy(words.view(np.int16))


def _draw(count: int) -> Tensor:
    """Draw uniform numbers over the range of int16.  # (count,)"""
    seeds = torch.empty(max(1, -(-count // SLICE_ELEMENTS)), dtype=torch.int64).random_().tolist()
    parts = []
    for number, seed in enumerate(seeds):
        start, odd = seed % SLICE_ELEMENTS, seed // SLICE_ELEMENTS % 2**15 * 2 + 1 - 2**15
        size = min(SLICE_ELEMENTS, count - number * SLICE_ELEMENTS)
        parts.append(_table()[start : start + size] * odd)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def keep_scale(x: Tensor, p: float) -> Tensor:
    """Return a tensor like `x` that is 0 with probability p and 1 / (1 - p) elsewhere."""
    if x.device.type != "cpu":
        return torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
    kept = _draw(x.numel()).ge_(min(round(p * 2**16), 2**16 - 1) - 2**15)
    if x.dtype == torch.bfloat16:
        scale = torch.tensor(1 / (1 - p), dtype=torch.bfloat16).view(torch.int16).item()
        return kept.mul_(scale).view(torch.bfloat16).view(x.shape)
    return kept.to(x.dtype).mul_(1 / (1 - p)).view(x.shape)


def dropout_forward(module: nn.Dropout, input: Tensor) -> Tensor:  # noqa: A002 - nn.Dropout's name
    """Apply an `nn.Dropout`, in training on a CPU by `keep_scale`."""
    if not module.training or module.p == 0.0 or input.device.type != "cpu":
        return nn.Dropout.forward(module, input)
    return input * keep_scale(input, module.p)
