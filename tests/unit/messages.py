"""Comparison of messages by their parts: place, key words, values and fix, not by whole sentences."""

from __future__ import annotations

import re


def has_parts(message: str, start: str, *parts: str) -> bool:
    """Return whether a message begins with `start`, followed by these parts in this order."""
    return re.match(".*".join(map(re.escape, (start, *parts))), message, re.S) is not None
