"""Reversible changes to the modules of a model: replaced methods, hooks, settings."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["Edits", "set_mode"]


class Edits:
    """A list of changes, each with the function that reverts it; it keeps no module alive."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Replace the forward pass of this instance by `forward(module, ...)`."""
        self.set_method(module, "forward", forward)

    def set_method(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Replace a method of this instance by `function(module, ...)`."""
        owner, before = weakref.ref(module), vars(module).get(name)
        setattr(module, name, MethodType(function, module))

        def undo() -> None:
            if (own := owner()) is not None:
                vars(own).pop(name, None)
                if before is not None:
                    setattr(own, name, before)

        self._undo.append(undo)

    def add_hooks(self, *handles: Any) -> None:
        """Add the handles of registered hooks."""
        self._undo += [handle.remove for handle in handles]

    def set_attention(self, model: Any, name: str) -> None:
        """Switch a model to another of transformers' attention implementations."""
        owner, before = weakref.ref(model), model.config._attn_implementation
        model.set_attn_implementation(name)

        def undo() -> None:
            if (own := owner()) is not None:
                own.set_attn_implementation(before)

        self._undo.append(undo)

    def extend(self, other: Edits) -> None:
        """Move the changes of another list to this one."""
        self._undo += other._undo
        other._undo = []

    def undo(self) -> None:
        """Revert all changes, the latest first."""
        while self._undo:
            self._undo.pop()()


@contextmanager
def set_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Temporarily put all modules into training or eval mode; restore the mode of each afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
