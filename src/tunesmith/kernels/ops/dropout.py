"""Dropout whose mask costs a multiplication of 16 bits an element (Srivastava 2014).

PyTorch draws a float for each element on a CPU, which takes longer than the matrix product before it. Here a table of
2^20 random numbers of 16 bits is drawn once, and a mask is a stretch of it that begins somewhere, times an odd number:
both drawn from PyTorch's generator, so that a seed still decides every mask. An odd number permutes the numbers of 16
bits, so the elements of a stretch stay independent and uniform; another one gives other masks of the same stretch
(multiply-shift hashing, Dietzfelbinger 1997). The kept share is right to 1 / 65536.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Dropout", "keep_scale", "use_fast_dropout"]

STRETCH = 2**19
"""How many elements are drawn at once; the table has twice as many."""


@cache
def _table() -> Tensor:
    words = np.random.Generator(np.random.SFC64(0)).integers(0, 2**64, size=STRETCH // 2, dtype=np.uint64)
    return torch.from_numpy(words.view(np.int16))


def _draw(count: int) -> Tensor:
    """Uniform numbers of 16 bits, of which the lowest are negative.  # (count,)"""
    seeds = torch.empty(max(1, -(-count // STRETCH)), dtype=torch.int64).random_().tolist()
    parts = []
    for number, seed in enumerate(seeds):
        start, odd = seed % STRETCH, seed // STRETCH % 2**15 * 2 + 1 - 2**15
        parts.append(_table()[start : start + min(STRETCH, count - number * STRETCH)] * odd)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def keep_scale(x: Tensor, p: float) -> Tensor:
    """A tensor like `x` that is 0 with probability p and 1 / (1 - p) elsewhere."""
    if x.device.type != "cpu":
        return torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
    kept = _draw(x.numel()).ge_(min(round(p * 2**16), 2**16 - 1) - 2**15)
    if x.dtype == torch.bfloat16:
        scale = torch.tensor(1 / (1 - p), dtype=torch.bfloat16).view(torch.int16).item()
        return kept.mul_(scale).view(torch.bfloat16).view(x.shape)
    return kept.to(x.dtype).mul_(1 / (1 - p)).view(x.shape)


class Dropout(nn.Dropout):
    """`nn.Dropout` for training on a CPU."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Dropout's name
        """The input, with a share p of its elements zero."""
        if not self.training or self.p == 0.0 or input.device.type != "cpu":
            return super().forward(input)
        return input * keep_scale(input, self.p)


def use_fast_dropout(model: nn.Module) -> None:
    """Let every `nn.Dropout` of the model be this one, in place."""
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = Dropout
