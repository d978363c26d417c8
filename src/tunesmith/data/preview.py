"""One encoded example as a person reads it: what `data show` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Token:
    """One token as the model reads it. `target`: what is to be predicted there; None where no loss is computed."""

    text: str
    special: bool
    target: str | None = None


@dataclass(frozen=True)
class Preview:
    """An example after encoding.

    `windows` are its tokens, a list for each forward row; `lines` describe inputs of another kind (the size of a
    picture); `target` is that of the whole example, where it has one; `cut`: whether a part of it is not read.
    """

    target: str | None = None
    cut: bool = False
    windows: list[list[Token]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def dump(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
