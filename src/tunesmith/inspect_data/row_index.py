"""Index of rows that `data check` keeps in memory: places, targets, groups, digests and MinHash keys."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data import splits
from tunesmith.data.text import duplicates


@dataclass
class RowIndex:
    """Index of the good rows of all files, in order."""

    paths: Sequence[Path]
    """Paths of the files."""
    file: array[int] = field(default_factory=lambda: array("H"))
    line: array[int] = field(default_factory=lambda: array("q"))
    target: array[int] = field(default_factory=lambda: array("q"))
    """Code of the row's target; -1 if it has none."""
    group: array[int] = field(default_factory=lambda: array("q"))
    text: dict[int, str] = field(default_factory=dict)
    """Row -> its file within a folder of texts."""
    by_digest: dict[int, int] = field(default_factory=dict)
    """Digest of a row's inputs -> number of the first row with it."""
    targets: dict[Any, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    distinct: array[int] = field(default_factory=lambda: array("q"))
    """Numbers of the rows that are compared for near duplicates; `keys` has their keys in the same order."""
    keys: list[duplicates.Keys] = field(default_factory=list)

    def place(self, row: int) -> str:
        """Return file and line of a row."""
        return f"{self.paths[self.file[row]] / self.text.get(row, '')}:{self.line[row]}"

    def hash(self, chunk: list[tuple[int, str]]) -> None:
        """Add rows (number, normalized text) to compare for near duplicates."""
        if chunk:
            self.keys.append(duplicates.band_keys([text for _, text in chunk]))
            self.distinct.extend(number for number, _ in chunk)
            chunk.clear()

    def candidates(self, parts: splits.Indices) -> splits.Indices:
        """Return pairs of rows that may be near duplicates."""
        distinct = np.frombuffer(self.distinct, dtype=np.int64)
        if not self.keys:
            return np.empty((0, 2), dtype=np.int64)
        return distinct[duplicates.candidates(np.concatenate(self.keys), parts[distinct])]
