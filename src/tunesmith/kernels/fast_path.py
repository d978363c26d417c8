"""The fast paths of one model: which are on, for which blocks, and why the others are off."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from tunesmith.kernels.edits import Edits
from tunesmith.kernels.ops.grad_buffers import NO_BUFFERS, GradBuffers, LookedUpRows

if TYPE_CHECKING:
    from tunesmith.kernels.chunked_loss import LMHead
    from tunesmith.kernels.last_block import LastBlock

__all__ = ["FastPath", "PathStatus", "fast_path"]


@dataclass(frozen=True)
class PathStatus:
    """Status of one fast path on one model."""

    on: bool
    blocks: tuple[str, ...] = ()
    """Module paths of the blocks that use it; empty for a fast path outside the blocks."""

    reason: str = ""
    """Reason why it is off, or off for some blocks."""

    applies: bool = True
    """False if the path is not meant for this model or device. The run's output then does not mention it."""


@dataclass
class FastPath:
    """The fast paths of one model, and what code outside the kernels needs to know about them."""

    statuses: dict[str, PathStatus] = field(default_factory=dict)
    """Name -> status, in the order of the run's output."""

    num_blocks: int = 0
    unpadded: bool = False
    """True if blocks compute on valid tokens only, so that padding costs nothing."""

    last_block: LastBlock | None = None
    """The tokens of the last block whose output is read; None if unknown."""

    lm_head: LMHead | None = None
    """The LM head, if loss and log-probabilities are computed from hidden states; None if from logits."""

    looked_up: Mapping[Tensor, LookedUpRows] = field(default_factory=dict)
    """Embedding table -> its rows that have a gradient or momentum."""

    buffers: GradBuffers = NO_BUFFERS
    padded_attention: str = ""
    """The model's own attention implementation, which computes with padding."""

    edits: Edits = field(default_factory=Edits)
    _model: weakref.ref[nn.Module] | None = None

    def attach(self, model: nn.Module) -> None:
        """Register this object as the result of `fast_path(model)`."""
        self._model = weakref.ref(model)
        _PATHS[model] = self

    def undo(self) -> None:
        """Restore the model's own code."""
        self.edits.undo()
        self.unpadded, self.last_block, self.lm_head = False, None, None
        self.looked_up, self.buffers = {}, NO_BUFFERS
        self.statuses = {name: PathStatus(False, reason="undone") for name in self.statuses}
        model = None if self._model is None else self._model()
        if model is not None:
            _PATHS.pop(model, None)

    def summary(self) -> str:
        """Return one line for the run's output."""
        on, off = [], []
        for name, status in self.statuses.items():
            label = name.replace("_", " ")
            if status.on:
                partly = 0 < len(status.blocks) < self.num_blocks
                on.append(f"{label} ({len(status.blocks)} of {self.num_blocks} blocks)" if partly else label)
            if status.reason and status.applies:
                off.append(f"{label}{' in the other blocks' if status.on else ''} ({status.reason})")
        return f"fast paths: {', '.join(on) or 'none'}" + (f"; off: {'; '.join(off)}" if off else "")

    def dump(self) -> dict[str, Any]:
        """Return the statuses as plain values, for `run.json`."""
        return {
            name: {
                "on": status.on,
                **({"blocks": list(status.blocks)} if status.blocks else {}),
                **({"reason": status.reason} if status.reason else {}),
            }
            for name, status in self.statuses.items()
        }

    @contextmanager
    def with_padding(self, model: Any) -> Iterator[None]:
        """Temporarily use the model's own attention, with padding, for generation with a key-value cache."""
        if not self.unpadded:
            yield
            return
        fast = model.config._attn_implementation
        model.set_attn_implementation(self.padded_attention)
        try:
            yield
        finally:
            model.set_attn_implementation(fast)

    @contextmanager
    def all_tokens(self) -> Iterator[None]:
        """Temporarily compute the last block for all tokens, for a model whose virtual tokens are disabled."""
        if self.last_block is None:
            yield
            return
        self.last_block.disabled = True
        try:
            yield
        finally:
            self.last_block.disabled = False


_PATHS: WeakKeyDictionary[nn.Module, FastPath] = WeakKeyDictionary()
"""Model -> its fast paths, for tasks and techniques, which receive only the model. An entry lives as long as its model;
a copy of the model has none."""


def fast_path(model: nn.Module) -> FastPath:
    """Return the fast paths of a model; all are off if `accelerate` has not been called on it."""
    return _PATHS.get(model) or FastPath()
