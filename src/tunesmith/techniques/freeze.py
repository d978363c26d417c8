"""Freezing of lower layers: only the head, or also the last blocks with `last_n_blocks`, are trained.

`head_only` is linear probing with the model's own head. `gradual` unfreezes the chosen blocks one by one from the top
in equal parts of the run, after the head alone (Howard and Ruder 2018, arXiv 1801.06146, 3.3).
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator
from torch import nn

from tunesmith.errors import RecipeError
from tunesmith.models.anatomy import Anatomy
from tunesmith.techniques import HEAD_FACTOR, Technique, rate_by_depth, rate_by_width, set_trainable

LEARNING_RATE = 2e-4
"""Learning rate of the last blocks, measured at hidden size 384 (docs/techniques/freeze.md)."""

HEAD_LEARNING_RATE = 1e-1
"""Learning rate of a head alone, measured at hidden size 384; lower for wider models."""


class Freeze(Technique):
    """Freezing of lower layers: only the head is trained, or also the last blocks with last_n_blocks.

    Trains the head, and the last of the blocks.
    Use it as the cheapest baseline, and against forgetting. A head alone on general features scores far below the
    other techniques.
    """

    last_n_blocks: int | None = Field(None, ge=1, description="number of blocks to train, from the top")
    head_only: bool = Field(False, description="train only the head; default without last_n_blocks")
    gradual: bool = Field(False, description="unfreeze the blocks one by one from the top during the run")
    layer_lr_decay: float = Field(1.0, gt=0, le=1, description="learning-rate factor per block downwards; 1: none")

    @model_validator(mode="before")
    @classmethod
    def _head_by_default(cls, keys: Any) -> Any:
        if isinstance(keys, dict) and keys.get("last_n_blocks") is None:
            return {"head_only": True, **keys}
        return keys

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.head_only == (self.last_n_blocks is not None):
            raise ValueError("give either head_only: true or last_n_blocks")
        if self.head_only and self.gradual:
            raise ValueError("gradual has no effect with head_only; give last_n_blocks")
        if self.head_only and self.layer_lr_decay != 1:
            raise ValueError("layer_lr_decay has no effect with head_only; give last_n_blocks")
        return self

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Return one block, the head alone, and gradual unfreezing."""
        return [{"last_n_blocks": 1}, {"head_only": True}, {"last_n_blocks": 2, "gradual": True}]

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Freeze the embeddings and all blocks but the last ones."""
        if not self.last_n_blocks and not anatomy.always_trainable:
            raise RecipeError(
                f"this {anatomy.family} model has no separate head, so it would have no trainable parameters",
                where="technique.head_only",
                hint="give last_n_blocks, or use technique=lora",
            )
        if self.last_n_blocks and self.last_n_blocks > len(anatomy.blocks):
            raise RecipeError(
                f"{self.last_n_blocks} is more than the {len(anatomy.blocks)} blocks of the model",
                where="technique.last_n_blocks",
                hint=f"give 1 to {len(anatomy.blocks)}" if anatomy.blocks else "use technique=full",
            )
        set_trainable(model, self._trainable(model, anatomy, self.last_n_blocks or 0))

    def update_trainable(self, model: nn.Module, anatomy: Anatomy, progress: float) -> None:
        """Unfreeze one more block after each of last_n_blocks + 1 equal parts of the run, if `gradual`."""
        if self.gradual and self.last_n_blocks:
            # if nothing above the blocks has parameters, the last block is trained from the start
            first = 0 if self._trainable(model, anatomy, 0) else 1
            unfrozen = min(self.last_n_blocks, max(first, int(progress * (self.last_n_blocks + 1))))
            set_trainable(model, self._trainable(model, anatomy, unfrozen))

    def _trainable(self, model: nn.Module, anatomy: Anatomy, blocks: int) -> set[str]:
        """Return the parameters of the last `blocks` blocks and of everything above them."""
        lowest = len(anatomy.blocks) + 1 - blocks
        above = {name for name, _ in model.named_parameters() if anatomy.depth_of(name) >= lowest}
        return above | anatomy.always_trainable if self.last_n_blocks else set(anatomy.always_trainable)

    def learning_rate(self, anatomy: Anatomy) -> float:
        """Return `HEAD_LEARNING_RATE` for a head alone, else `LEARNING_RATE`, scaled by the width."""
        if self.head_only:
            return min(HEAD_LEARNING_RATE, rate_by_width(HEAD_LEARNING_RATE, anatomy))
        return rate_by_width(LEARNING_RATE, anatomy)

    def head_learning_rate(self, learning_rate: float) -> float:
        """Return `HEAD_FACTOR` times the learning rate of the blocks; the same rate for a head alone."""
        return learning_rate if self.head_only else HEAD_FACTOR * learning_rate

    def lr_scale(self, name: str, anatomy: Anatomy) -> float:
        """Return a lower factor for lower blocks."""
        return rate_by_depth(self.layer_lr_decay, name, anatomy)
