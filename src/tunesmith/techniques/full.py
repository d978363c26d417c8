"""Every parameter learns: W' = W - lr * Adam(dL/dW).

With `layer_lr_decay` d < 1, what stands at depth k of n blocks (0 the embeddings, n + 1 what follows the blocks) learns
at lr * d ** (n + 1 - k): discriminative fine-tuning (Howard and Ruder 2018, arXiv 1801.06146), as in ELECTRA (Clark
2020, arXiv 2003.10555).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn

from tunesmith.models.anatomy import Anatomy
from tunesmith.techniques import HEAD_FACTOR, Technique, learn_only, rate_by_depth, rate_by_width

LEARNING_RATE = 1e-4
"""Measured on a model 384 wide (docs/techniques/full.md)."""


class Full(Technique):
    """Every parameter learns: W' = W - lr * Adam(dL/dW).

    Learns all there is: gradients and two Adam moments for each parameter.
    Use it with thousands of rows or more, and where the base is small. It is the measure for the others, and the most
    expensive.
    """

    layer_lr_decay: float = Field(1.0, gt=0, le=1, description="factor on the rate per block downwards; 1: none")

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Let every parameter learn but those that are computed."""
        learn_only(model, {name for name, _ in model.named_parameters()} - anatomy.fixed)

    def learning_rate(self, anatomy: Anatomy) -> float:
        """`LEARNING_RATE`, falling with the width."""
        return rate_by_width(LEARNING_RATE, anatomy)

    def head_learning_rate(self, learning_rate: float) -> float:
        """`HEAD_FACTOR` times as fast."""
        return HEAD_FACTOR * learning_rate

    def lr_scale(self, name: str, anatomy: Anatomy) -> float:
        """Lower blocks learn slower."""
        return rate_by_depth(self.layer_lr_decay, name, anatomy)
