"""Only biases learn: y = W x + b with b free and W fixed (Ben Zaken 2022, arXiv 2106.10199)."""

from __future__ import annotations

from typing import Any

from torch import nn

from tunesmith.errors import RecipeError
from tunesmith.models.anatomy import Anatomy
from tunesmith.techniques import Technique, learn_only

LEARNING_RATE = 5e-3
"""Of biases; chosen on validation of two data sets with a model 384 wide: docs/techniques/bitfit.md."""

HEAD_FACTOR = 4.0
"""How much faster a new head learns; measured with 24 classes and few examples of each, in the card."""


class Bitfit(Technique):
    """Only biases learn, those of the norms as well: y = W x + b with W fixed (Ben Zaken 2022, arXiv 2106.10199).

    Learns about one parameter in a thousand, and what is new (the head).
    Use it with few examples, and where the model must stay what it was: little can be forgotten by a bias.
    """

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Let every bias of the pretrained body learn."""
        names = (name for name in anatomy.parameters if name not in anatomy.learns_always)
        biases = {name for name in names if name.endswith("bias")}
        if not biases:
            raise RecipeError(
                f"this {anatomy.family} model has no biases, so there is nothing for it to learn",
                where="technique",
                hint="use technique=ia3 or lora, which add what learns",
            )
        learn_only(model, biases | anatomy.learns_always)

    def learning_rate(self, anatomy: Anatomy) -> float:
        """`LEARNING_RATE`; what is added to states knows no width."""
        return LEARNING_RATE

    def head_learning_rate(self, learning_rate: float) -> float:
        """`HEAD_FACTOR` times as fast."""
        return HEAD_FACTOR * learning_rate
