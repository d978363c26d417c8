"""The lower part of the model stays as it is; the head, and with `last_n_blocks` the top blocks, learn.

`head_only` is linear probing with the model's own head. `gradual` opens the chosen blocks one by one from the top in
equal shares of the run, the head alone first: gradual unfreezing (Howard and Ruder 2018, arXiv 1801.06146, 3.3).
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator
from torch import nn

from tunesmith.errors import RecipeError
from tunesmith.models.anatomy import Anatomy
from tunesmith.techniques import HEAD_FACTOR, Technique, learn_only, rate_by_depth, rate_by_width

LEARNING_RATE = 2e-4
"""Of the last blocks; measured on a model 384 wide (docs/techniques/freeze.md)."""

HEAD_LEARNING_RATE = 1e-1
"""Of a head alone, up to 384 wide, where it was measured; a wider model turns more weights in each step."""


class Freeze(Technique):
    """The lower part stays as it is: the head alone learns, or with last_n_blocks the top blocks too.

    Learns the head, and of n blocks the last ones.
    Use it as the cheapest thing that could work, and against forgetting. A head alone on features that were not made
    for the task stays far below the others.
    """

    last_n_blocks: int | None = Field(None, ge=1, description="how many blocks learn, from the top")
    head_only: bool = Field(False, description="only the head learns; the default where last_n_blocks is not given")
    gradual: bool = Field(False, description="open the blocks one by one from the top during the run")
    layer_lr_decay: float = Field(1.0, gt=0, le=1, description="factor on the rate per block downwards; 1: none")

    @model_validator(mode="before")
    @classmethod
    def _head_by_default(cls, keys: Any) -> Any:
        if isinstance(keys, dict) and keys.get("last_n_blocks") is None:
            return {"head_only": True, **keys}
        return keys

    @model_validator(mode="after")
    def _sane(self) -> Self:
        if self.head_only == (self.last_n_blocks is not None):
            raise ValueError("give either head_only: true or last_n_blocks")
        if self.head_only and self.gradual:
            raise ValueError("gradual opens blocks, and head_only leaves none to open; give last_n_blocks")
        if self.head_only and self.layer_lr_decay != 1:
            raise ValueError("layer_lr_decay slows blocks, and head_only trains none; give last_n_blocks")
        return self

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Freeze the embeddings and all blocks but the last."""
        if not self.last_n_blocks and not anatomy.learns_always:
            raise RecipeError(
                f"this {anatomy.family} model has no head of its own, so nothing would learn",
                where="technique.head_only",
                hint="give last_n_blocks, or use technique=lora",
            )
        if self.last_n_blocks and self.last_n_blocks > len(anatomy.blocks):
            raise RecipeError(
                f"{self.last_n_blocks} blocks are to learn and the model has {len(anatomy.blocks)}",
                where="technique.last_n_blocks",
                hint=f"give 1 to {len(anatomy.blocks)}" if anatomy.blocks else "use technique=full",
            )
        learn_only(model, self._learning(model, anatomy, self.last_n_blocks or 0))

    def thaw(self, model: nn.Module, anatomy: Anatomy, progress: float) -> None:
        """With `gradual`, each of last_n_blocks + 1 equal shares of the run opens one more block, the first none."""
        if self.gradual and self.last_n_blocks:
            first = 0 if self._learning(model, anatomy, 0) else 1  # nothing follows the blocks: begin with the last one
            opened = min(self.last_n_blocks, max(first, int(progress * (self.last_n_blocks + 1))))
            learn_only(model, self._learning(model, anatomy, opened))

    def _learning(self, model: nn.Module, anatomy: Anatomy, blocks: int) -> set[str]:
        """The parameters that learn with the last `blocks` blocks open."""
        lowest = len(anatomy.blocks) + 1 - blocks
        above = {name for name, _ in model.named_parameters() if anatomy.depth_of(name) >= lowest}
        return above | anatomy.learns_always if self.last_n_blocks else set(anatomy.learns_always)

    def learning_rate(self, anatomy: Anatomy) -> float:
        """`HEAD_LEARNING_RATE` for a head alone, else `LEARNING_RATE`; both fall with the width."""
        if self.head_only:
            return min(HEAD_LEARNING_RATE, rate_by_width(HEAD_LEARNING_RATE, anatomy))
        return rate_by_width(LEARNING_RATE, anatomy)

    def head_learning_rate(self, learning_rate: float) -> float:
        """`HEAD_FACTOR` times as fast as blocks."""
        return learning_rate if self.head_only else HEAD_FACTOR * learning_rate

    def lr_scale(self, name: str, anatomy: Anatomy) -> float:
        """Lower blocks learn slower."""
        return rate_by_depth(self.layer_lr_decay, name, anatomy)
