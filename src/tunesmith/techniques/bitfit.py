"""BitFit: y = W x + b, with b trainable and W frozen (Ben Zaken 2022, arXiv 2106.10199)."""

from __future__ import annotations

from typing import Any

from torch import nn

from tunesmith.errors import RecipeError
from tunesmith.models.anatomy import Anatomy
from tunesmith.techniques import Technique, set_trainable

LEARNING_RATE = 5e-3
"""Chosen on validation of two data sets at hidden size 384: docs/techniques/bitfit.md."""

HEAD_FACTOR = 4.0
"""Ratio of the learning rates of a new head and the biases; measured with 24 classes of few examples each."""


class Bitfit(Technique):
    """Bias-only fine-tuning, biases of norms included: y = W x + b with W frozen (Ben Zaken 2022, arXiv 2106.10199).

    Trains about 0.1 % of the parameters, and the new head.
    Use it with few examples, and against forgetting: biases change the model little.
    """

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Make every bias of the pretrained backbone trainable."""
        names = (name for name in anatomy.parameters if name not in anatomy.always_trainable)
        biases = {name for name in names if name.endswith("bias")}
        if not biases:
            raise RecipeError(
                f"this {anatomy.family} model has no biases to train",
                where="technique",
                hint="use technique=ia3 or lora",
            )
        set_trainable(model, biases | anatomy.always_trainable)

    def learning_rate(self, anatomy: Anatomy) -> float:
        """Return `LEARNING_RATE`, independent of the width."""
        return LEARNING_RATE

    def head_learning_rate(self, learning_rate: float) -> float:
        """Return `HEAD_FACTOR` times the learning rate of the biases."""
        return HEAD_FACTOR * learning_rate
