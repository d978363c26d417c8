"""Dropout whose mask costs a draw of 16 bits an element (Srivastava 2014).

PyTorch draws a float for each element on a CPU, which takes longer than the matrix product before it. Here four masks
come from each 64-bit word of SFC64, seeded from PyTorch's generator, so that a seed still decides every draw. The kept
share is right to 1 / 65536.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Dropout", "keep_scale", "use_fast_dropout"]


def keep_scale(x: Tensor, p: float) -> Tensor:
    """A tensor like `x` that is 0 with probability p and 1 / (1 - p) elsewhere."""
    if x.device.type != "cpu":
        return torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
    count = x.numel()
    seed = int(torch.empty((), dtype=torch.int64).random_().item())
    words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, size=-(-count // 4), dtype=np.uint64)
    kept = words.view(np.uint16)[:count] >= np.uint16(round(p * 65536))
    if x.dtype == torch.bfloat16:
        scale = torch.tensor(1 / (1 - p), dtype=torch.bfloat16).view(torch.int16).item()
        bits = kept.view(np.uint8).astype(np.int16) * np.int16(scale)
        return torch.from_numpy(bits).view(torch.bfloat16).view(x.shape)
    scales = kept.view(np.uint8).astype(np.float32) * np.float32(1 / (1 - p))
    return torch.from_numpy(scales).view(x.shape).to(x.dtype)


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
