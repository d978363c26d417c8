"""What is wrong with data: faults of rows, and faults of one kind together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.errors import CONTROL, shorten

LONGEST = 160
"""Characters of what is shown of a value; of a text 80."""
Level = Literal["error", "warning"]
"""An error stops a run or falsifies its scores."""
ERROR_KINDS = frozenset({"bad-row", "bad-label", "refused", "unreadable"})
"""Kinds whose value is what an error says, with quotation marks of its own."""
MAX_FAULTS = 10_000
"""Of one finding so many faults are kept; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One row, column or file: what is wrong with which value, and the way out. `see` is a place to compare with.

    Faults of the same kind that say the same are one finding.
    """

    kind: str
    what: str
    place: str
    value: object
    fix: str
    level: Level = "warning"
    see: str = ""

    def dump(self) -> dict[str, Any]:
        """File, line (None where the fault is not of one row), value cut to a line, fix."""
        file, _, line = self.place.rpartition(":")
        at = {"file": file, "line": int(line)} if line.isdigit() else {"file": self.place, "line": None}
        value = str(self.value) if self.kind in ERROR_KINDS else shorten(self.value)[1:-1]
        told = at | {"value": CONTROL.sub("?", value[:LONGEST]), "fix": self.fix}
        return told | ({"see": self.see} if self.see else {})


@dataclass
class Findings:
    """Faults as they come in."""

    faults: dict[tuple[Level, str, str], list[Fault]] = field(default_factory=dict)
    counts: Counter[tuple[Level, str, str]] = field(default_factory=Counter)

    def add(self, faults: Iterable[Fault]) -> None:
        """Take in some more."""
        for fault in faults:
            key = (fault.level, fault.kind, fault.what)
            self.counts[key] += 1
            kept = self.faults.setdefault(key, [])
            if len(kept) < MAX_FAULTS:
                kept.append(fault)

    def dump(self) -> list[dict[str, Any]]:
        """Each finding as plain values, errors first, then by kind."""
        return [
            {
                "kind": kind,
                "level": level,
                "what": what,
                "count": self.counts[level, kind, what],
                "fix": faults[0].fix,
                "faults": [fault.dump() for fault in faults],
            }
            for (level, kind, what), faults in sorted(self.faults.items())
        ]
