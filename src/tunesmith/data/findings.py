"""Faults in data, and findings: faults of the same kind grouped together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.errors import CONTROL, shorten

MAX_VALUE_CHARS = 160
"""Characters shown of a message; other values are cut to 80."""
Level = Literal["error", "warning"]
"""An error stops a run or invalidates its scores."""
ERROR_KINDS = frozenset({"bad-row", "bad-label", "refused", "unreadable"})
"""Kinds whose value is an error message, which has its own quotation marks."""
MAX_FAULTS = 10_000
"""Faults kept per finding; the rest are only counted."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Fault of a row, column or file: what is wrong, the value, and the fix. `see` is a related place to compare.

    Faults with the same level, kind and description (`what`) form one finding.
    """

    kind: str
    what: str
    place: str
    value: object
    fix: str
    level: Level = "warning"
    see: str = ""

    def dump(self) -> dict[str, Any]:
        """Return the fault as plain values: file, line (None if it concerns no single row), shortened value, fix."""
        file, _, line = self.place.rpartition(":")
        place = {"file": file, "line": int(line)} if line.isdigit() else {"file": self.place, "line": None}
        value = str(self.value) if self.kind in ERROR_KINDS else shorten(self.value)[1:-1]
        fault = place | {"value": CONTROL.sub("?", value[:MAX_VALUE_CHARS]), "fix": self.fix}
        return fault | ({"see": self.see} if self.see else {})


@dataclass
class Findings:
    """Faults collected so far, grouped by level, kind and description."""

    faults: dict[tuple[Level, str, str], list[Fault]] = field(default_factory=dict)
    counts: Counter[tuple[Level, str, str]] = field(default_factory=Counter)

    def add(self, faults: Iterable[Fault]) -> None:
        """Add faults."""
        for fault in faults:
            key = (fault.level, fault.kind, fault.what)
            self.counts[key] += 1
            kept = self.faults.setdefault(key, [])
            if len(kept) < MAX_FAULTS:
                kept.append(fault)

    def dump(self) -> list[dict[str, Any]]:
        """Return the findings as plain values, errors first, then by kind."""
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
