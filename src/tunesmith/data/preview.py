"""Human-readable form of one encoded example, for `data show`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Token:
    """One input token. `target` is the prediction target at this position; None if no loss is computed there."""

    text: str
    special: bool
    target: str | None = None


@dataclass(frozen=True)
class Preview:
    """An encoded example.

    `windows` has its tokens, one list per sequence in the batch. `lines` describe other inputs (the size of an image).
    `target` is the target of the whole example, if there is one. `cut` is True if the example was truncated.
    """

    target: str | None = None
    cut: bool = False
    windows: list[list[Token]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def dump(self) -> dict[str, Any]:
        """Return the preview as plain values."""
        return asdict(self)
