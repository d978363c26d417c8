"""Full fine-tuning: W' = W - lr * Adam(dL/dW) for every parameter.

With `layer_lr_decay` d < 1, parameters at depth k of n blocks (0: embeddings, n + 1: after the blocks) have the
learning rate lr * d ** (n + 1 - k): discriminative fine-tuning (Howard and Ruder 2018, arXiv 1801.06146), as in ELECTRA
(Clark 2020, arXiv 2003.10555).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn

from tunesmith.models.anatomy import Anatomy
from tunesmith.techniques import HEAD_FACTOR, Technique, rate_by_depth, rate_by_width, set_trainable

LEARNING_RATE = 1e-4
"""Measured at hidden size 384 (docs/techniques/full.md)."""


class Full(Technique):
    """Full fine-tuning: every parameter is trained, W' = W - lr * Adam(dL/dW).

    Trains all parameters, with a gradient and two Adam moments each.
    Use it with thousands of rows or more, and with a small base. It is the reference for the other techniques, and the
    most expensive.
    """

    layer_lr_decay: float = Field(1.0, gt=0, le=1, description="learning-rate factor per block downwards; 1: none")

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Return one learning rate for all layers, and layer-wise decay."""
        return [{}, {"layer_lr_decay": 0.8}]

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Make every parameter trainable except fixed ones."""
        set_trainable(model, {name for name, _ in model.named_parameters()} - anatomy.fixed)

    def learning_rate(self, anatomy: Anatomy) -> float:
        """Return `LEARNING_RATE`, scaled by the width."""
        return rate_by_width(LEARNING_RATE, anatomy)

    def head_learning_rate(self, learning_rate: float) -> float:
        """Return `HEAD_FACTOR` times the learning rate of the other parameters."""
        return HEAD_FACTOR * learning_rate

    def lr_scale(self, name: str, anatomy: Anatomy) -> float:
        """Return a lower factor for lower blocks."""
        return rate_by_depth(self.layer_lr_decay, name, anatomy)
