"""`FastPath`: which fast paths one model takes, for which blocks, and why it does not take the others."""

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
    """One fast path on one model."""

    on: bool
    blocks: tuple[str, ...] = ()
    """Module paths of the blocks that take it; empty for a path outside the blocks."""

    reason: str = ""
    """Why it is off, or off for some blocks."""

    applies: bool = True
    """False if the path is not meant for such a model or device, so that nobody misses it."""


@dataclass
class FastPath:
    """The fast paths of one model. All that code outside the model needs to know about them is here."""

    statuses: dict[str, PathStatus] = field(default_factory=dict)
    """By name, in the order of the run's output."""

    num_blocks: int = 0
    unpadded: bool = False
    """Blocks compute on valid tokens only, so that padding costs nothing."""

    last_block: LastBlock | None = None
    """Which tokens' outputs of the last block are read; None if unknown."""

    lm_head: LMHead | None = None
    """Loss and scores from hidden states; None if they take logits."""

    looked_up: Mapping[Tensor, LookedUpRows] = field(default_factory=dict)
    """Embedding table -> its rows that have a gradient or momentum."""

    buffers: GradBuffers = NO_BUFFERS
    padded_attention: str = ""
    """The model's own attention implementation, which computes with padding."""

    edits: Edits = field(default_factory=Edits)
    _model: weakref.ref[nn.Module] | None = None

    def attach(self, model: nn.Module) -> None:
        """Let `fast_path(model)` return this object."""
        self._model = weakref.ref(model)
        _PATHS[model] = self

    def undo(self) -> None:
        """Put the model's own code back."""
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
                some = 0 < len(status.blocks) < self.num_blocks
                on.append(f"{label} ({len(status.blocks)} of {self.num_blocks} blocks)" if some else label)
            if status.reason and status.applies:
                off.append(f"{label}{' of the others' if status.on else ''} ({status.reason})")
        return f"fast paths: {', '.join(on) or 'none'}" + (f"; off: {'; '.join(off)}" if off else "")

    def dump(self) -> dict[str, Any]:
        """Return everything as plain values, for `run.json`."""
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
        """Let a model attend with padding for a while, as generation with a key-value cache needs."""
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
        """Let the last block compute all tokens for a while, as a model without its virtual tokens needs."""
        if self.last_block is None:
            yield
            return
        self.last_block.disabled = True
        try:
            yield
        finally:
            self.last_block.disabled = False


_PATHS: WeakKeyDictionary[nn.Module, FastPath] = WeakKeyDictionary()
"""Tasks and techniques are given a model and nothing beside it; here they find its fast path. An entry lives as long as
its model; a copy of the model has none."""


def fast_path(model: nn.Module) -> FastPath:
    """Return the fast path of a model; one that is off throughout if `accelerate` has not been called on it."""
    return _PATHS.get(model) or FastPath()
