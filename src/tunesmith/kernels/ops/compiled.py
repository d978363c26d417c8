"""Element-wise arithmetic in one pass on a GPU: the plain formula, compiled by Inductor for any number of tokens.

On a CPU the functions beside the formulas are faster than what Inductor makes, and need no compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

__all__ = ["fused", "fuses"]

FUSED_ON = ("cuda",)
BACKEND = "inductor"


def fuses(x: Tensor) -> bool:
    """Whether arithmetic on x is to be compiled."""
    return x.device.type in FUSED_ON and _has_compiler()


def fused(formula: Callable[..., Any], *given: Any) -> Any:
    """What the formula gives, in the format of what it is given, and its gradients."""
    with torch.autocast(given[0].device.type, enabled=False):
        return _compiled(formula, BACKEND)(*given)


@cache
def _has_compiler() -> bool:
    return has_triton()


@cache
def _compiled(formula: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(formula, dynamic=True, backend=backend)  # plainly, where that cannot be
