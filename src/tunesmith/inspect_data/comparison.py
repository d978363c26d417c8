"""Faults that concern two rows: duplicates, leaks between splits, conflicting labels, and groups in two splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data import splits
from tunesmith.data.columns import of_kind, predicts_labels
from tunesmith.data.findings import Fault, Level
from tunesmith.data.formats import Row
from tunesmith.data.text import duplicates
from tunesmith.data.text.spans import words_of
from tunesmith.inspect_data.files import File, display_text
from tunesmith.inspect_data.row_index import RowIndex
from tunesmith.tasks import Task

MAX_LEAK_SHARE = 0.01
"""Share of near duplicates of train in a split at and above which its scores are invalid."""


@dataclass(frozen=True)
class RowComparison:
    """Comparison of the rows in an index with each other.

    `parts` has the split of each row, as an index into `names`. Both include splits that are drawn from train.
    """

    task: Task | None
    files: Sequence[File]
    are_splits: bool
    """False if the files of a folder are not named like splits."""
    index: RowIndex

    @property
    def labeled(self) -> bool:
        """True if targets are classes, numbers or tags; a text may have several valid translations."""
        return self.task is not None and predicts_labels(self.task.columns)

    @property
    def _tagged(self) -> bool:
        return self.task is not None and of_kind(self.task.columns, "tags") is not None

    @property
    def _leak_level(self) -> Level:
        return "error" if self.are_splits else "warning"

    def duplicate_faults(self, file: File, row: Row, target: Any, earlier: int) -> Iterator[Fault]:
        """Yield the faults of a row that duplicates an earlier one: duplicate or leak, and conflicting labels."""
        see, earlier_file = self.index.place(earlier), self.files[self.index.file[earlier]]
        if earlier_file is file:
            what = f"a row of {file.name} duplicates an earlier one"
            yield Fault("duplicate", what, row.place, display_text(row, file.schema), "keep one of them", see=see)
        else:
            what, level = f"a row of {file.name} duplicates a row of {earlier_file.name}", self._leak_level
            kind, fix = "leak" if self.are_splits else "duplicate", "remove it from one of the two"
            yield Fault(kind, what, row.place, display_text(row, file.schema), fix, level, see)
        earlier_code = self.index.target[earlier]
        if self.labeled and target is not None and earlier_code not in (self.index.targets[target], -1):
            labels = self._label_difference(row, target, list(self.index.targets)[earlier_code])
            what, fix = "identical texts have different labels", "correct one of the labels"
            yield Fault("label-conflict", what, row.place, f"{labels}: {display_text(row, file.schema)}", fix, see=see)

    def _label_difference(self, row: Row, here: Any, there: Any) -> str:
        """Describe two different targets of one text; for tags, the first word whose tags differ."""
        if self._tagged and len(here) == len(there):
            at = next(at for at, (tag, other) in enumerate(zip(here, there, strict=True)) if tag != other)
            return f"{words_of(row).words[at]} is {here[at]} here, {there[at]} there"
        return f"{_label(here)} here, {_label(there)} there"

    def near_duplicate_faults(
        self, pairs: splits.Indices, texts: Mapping[int, str], parts: splits.Indices, names: Sequence[str]
    ) -> Iterator[Fault]:
        """Yield a fault for each pair of candidates whose texts are near duplicates."""
        normalized = {row: duplicates.normalize(text) for row, text in texts.items()}
        similar = [
            (later, earlier, similarity) if parts[later] < parts[earlier] else (earlier, later, similarity)
            for earlier, later, similarity in duplicates.near_duplicates(pairs, normalized, parts)
        ]
        leaks = Counter(int(parts[later]) for earlier, later, _ in similar if parts[earlier] != parts[later])
        share = {part: count / np.count_nonzero(parts == part) for part, count in leaks.items()}
        for earlier, later, similarity in similar:
            name, other = names[parts[later]], names[parts[earlier]]
            kind, fix = "near-duplicate", "keep one of them"
            level: Level = "warning"
            what = f"a row of {name} nearly duplicates {'an earlier one' if name == other else f'a row of {other}'}"
            if name != other and self.are_splits:
                kind, fix = "near-leak", "keep such rows in one split, or remove one of them"
                level = "error" if share[int(parts[later])] >= MAX_LEAK_SHARE else "warning"
                what += " (splits drawn by the recipe)" if {name, other} & self.files[0].drawn.keys() else ""
            see = f"{self.index.place(earlier)} ({similarity:.0%} similar{self._other_label(later, earlier)})"
            yield Fault(kind, what, self.index.place(later), texts[later], fix, level, see)

    def _other_label(self, row: int, other: int) -> str:
        """Describe the labels of two near duplicates if they differ."""
        here, there = self.index.target[row], self.index.target[other]
        if not self.labeled or self._tagged or here == there:
            return ""
        labels = list(self.index.targets)
        return f", {_label(labels[here])} here and {_label(labels[there])} there" if min(here, there) >= 0 else ""

    def group_faults(self, group: str, parts: splits.Indices, names: Sequence[str]) -> Iterator[Fault]:
        """Yield a fault for each value of column `group` that occurs in two splits, or would if a split were drawn."""
        values, first = list(self.index.groups), dict[int, int]()
        undrawn = self.are_splits and len(names) == 1
        for row, (code, part) in enumerate(zip(self.index.group, parts.tolist(), strict=True)):
            earlier = first.setdefault(code, row)
            if code < 0 or earlier == row or not (undrawn or part != parts[earlier]):
                continue
            if self._is_train(parts, row, earlier):
                row, earlier = earlier, row
            kind = "group" if undrawn else "group-leak"
            level: Level = "warning" if undrawn else self._leak_level
            what = f"a row of {names[parts[row]]} shares its {group} with {names[parts[earlier]]}"
            fix = f"put all rows of a {group} in one split"
            if undrawn:
                what = f"a row shares its {group} with an earlier one; a random split could separate them"
                fix = f"set data.group={group} to keep them in one split"
            place, see = self.index.place(row), self.index.place(earlier)
            yield Fault(kind, what, place, f"{group}={values[code]}", fix, level, see)

    def _is_train(self, parts: splits.Indices, row: int, other: int) -> bool:
        """Return whether `row` is a training row and `other` is not."""
        return self.files[0].name == "train" and parts[row] == 0 != parts[other]


def _label(target: Any) -> str:
    label = ", ".join(target) if isinstance(target, tuple) else str(target)
    return label if len(label) <= 24 else f"{label[:23]}…"
