"""Faults of columns, classes, texts and tokens, for `data check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.columns import Columns
from tunesmith.data.findings import Fault, Level
from tunesmith.data.formats import Row
from tunesmith.data.formats.raw import BadRow, RawRow
from tunesmith.data.text.private import find_private
from tunesmith.errors import shorten
from tunesmith.inspect_data.files import Column, File, display_text
from tunesmith.tasks import Inspection

MAX_IMBALANCE = 10
"""Ratio of the largest to the smallest class at and above which imbalance is reported."""
MIN_CLASS_ROWS = 5
"""Minimum rows of a class; fewer are too few to train on and to score."""
MAX_UNKNOWN = 0.05
"""Maximum share of unknown tokens; above it the tokenizer probably does not fit the language."""


class ColumnScan:
    """Scan of a file's columns for empty cells and constant columns."""

    def __init__(self, file: File) -> None:
        self.file, self.rows = file, 0
        self.first: dict[Column, Any] = {}
        self.varies: set[Column] = set()
        self.empty: dict[Column, list[int]] = {name: [] for name in file.names}

    def add(self, raw: RawRow | BadRow) -> None:
        """Add a row."""
        if isinstance(raw, BadRow):
            return
        self.rows += 1
        for name, lines in self.empty.items():
            value = raw.values.get(name)
            if value is None or value != value or (isinstance(value, str) and not value.strip()):
                lines.append(raw.line)
            if name not in self.varies and self.first.setdefault(name, value) != value:
                self.varies.add(name)

    def faults(self) -> Iterator[Fault]:
        """Yield faults of empty and constant columns. A row with an empty required cell is reported as a bad row."""
        path, used = self.file.path, set(self.file.columns.values())
        for name, lines in self.empty.items() if self.rows > 1 else ():
            title = f"column {name}" if isinstance(name, int) else shorten(name, 40)[1:-1]
            if len(lines) == self.rows:
                yield Fault("empty-field", f"{title} is empty in every row", str(path), "", "remove the column")
            elif name not in self.varies:
                what = f"{title} has the same value in every row"
                fix = "check that it is the right column" if name in used else "remove the column: it is uninformative"
                yield Fault("constant-field", what, str(path), self.first.get(name), fix)
            elif name not in used:
                what, fix = f"{title} is empty in some rows of {self.file.name}", "fill it in if it is needed"
                yield from (Fault("empty-field", what, f"{path}:{line}", "", fix) for line in lines)


def private_faults(row: Row, columns: Columns) -> Iterator[Fault]:
    """Yield a fault for each match of personal data, with its value masked."""
    fix = "replace it: a model can reproduce its training data"
    for kind, value in find_private(display_text(row, columns)):
        yield Fault("private", f"{kind} in a text", row.place, value, fix)


def class_faults(files: Sequence[File]) -> Iterator[Fault]:
    """Yield faults of imbalanced or rare classes in train."""
    train = files[0]
    ordered = train.classes.most_common()
    (most, high), (least, low) = ordered[0], ordered[-1]
    if high >= MAX_IMBALANCE * low:
        what = f"the largest class has {high / low:.0f} times as many rows as the smallest"
        value, fix = f"{most}: {high}, {least}: {low}", "set data.class_weights=balanced, and compare f1_macro"
        yield Fault("imbalance", what, str(train.path), value, fix)
    for name, count in ordered:
        if count < MIN_CLASS_ROWS:
            what, fix = (
                f"a class has fewer than {MIN_CLASS_ROWS} rows in train",
                "add rows, or merge it with another class",
            )
            yield Fault("rare-class", what, str(train.path), f"{name}: {count}", fix)


def unknown_labels(file: File, known: set[str], rows: Iterator[tuple[str, Any]], level: Level) -> Iterator[Fault]:
    """Yield a fault for each label that does not occur in train; `rows` are (place, target)."""
    fix = "correct it, remove the row, or add such rows to train"
    for place, target in rows:
        unknown = {target} - known if isinstance(target, str) else set(target) - known
        if unknown:
            what = f"a label of {file.name} is not in train"
            yield Fault("unknown-label", what, place, ", ".join(sorted(unknown)), fix, level)


def size_faults(file: File, rows: Sequence[Row], inspection: Inspection, unit: str) -> Iterator[Fault]:
    """Yield faults of truncated rows and unknown tokens, and set the file's lengths in `unit`."""
    sizes, limit = np.array(inspection.sizes), inspection.limit
    share = sum(inspection.unknown) / max(int(sizes.sum()), 1)
    file.lengths = {
        "unit": unit,
        **length_summary(sizes),
        "limit": limit,
        "rows": len(rows),
        "unknown": round(share, 6),
    }
    fix = f"raise {inspection.limit_key}, or shorten the row: the rest is truncated"
    for row, size in zip(rows, inspection.sizes, strict=True):
        if limit is not None and size > limit:
            what = f"a row of {file.name} is longer than the limit of {limit} {unit}"
            yield Fault("too-long", what, row.place, f"{size:,} {unit}: {display_text(row, file.schema)}", fix)
    if share > MAX_UNKNOWN:
        worst = rows[int(np.argmax(np.array(inspection.unknown) / np.maximum(sizes, 1)))]
        what = f"{share:.0%} of the {unit} of {file.name} are unknown to this model"
        value = display_text(worst, file.schema)
        yield Fault("unknown-tokens", what, worst.place, value, "choose a model that fits the language")


def length_summary(lengths: NDArray[np.int64]) -> dict[str, Any]:
    """Return median, 95th percentile and maximum."""
    median, high = np.percentile(lengths, (50, 95)).tolist()
    return {"median": round(median, 1), "p95": round(high, 1), "longest": int(lengths.max())}
