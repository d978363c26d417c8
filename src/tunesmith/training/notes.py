"""Notes for the user on the data of a run: rows left out, repeated texts, suspicious labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tunesmith.data import splits
from tunesmith.errors import counted, shorten

MISSING = frozenset({"na", "n/a", "#n/a", "<na>", "nan", "nil", "none", "null"})
"""Labels that look like a missing value."""

MAX_CLASSES_NAMED = 3


def merge_notes(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Return one note for each distinct text, with all the names that it applies to.

    `notes` are pairs of a name (split or file) and a text that starts with its own separator.
    """
    names: dict[str, list[str]] = {}
    for name, text in notes:
        names.setdefault(text, []).append(name)
    return [", ".join(own) + text for text, own in names.items()]


def skipped_rows(skipped: Counter[str]) -> str:
    """Return the number of rows left out for each reason, most frequent first."""
    return ", ".join(f"{counted(count, 'row')} ({reason})" for reason, count in skipped.most_common())


def labels_like_missing(targets: Iterable[Any]) -> list[str]:
    """Return a note for each class whose name looks like a missing value."""
    counts = Counter(target for target in targets if isinstance(target, str) and target.lower() in MISSING)
    return [
        f"{count} train row{'s are' if count > 1 else ' is'} labeled {shorten(name)}, which is treated as a class"
        for name, count in sorted(counts.items())
    ]


def repeated_texts(count: int, conflicting: int, rows: int) -> str:
    """Return the note on rows whose text occurs in an earlier row; `conflicting` texts have different labels."""
    note = f"{count:,} of {rows:,} train rows repeat the text of an earlier row"
    return f"{note}; {conflicting} of these texts have different labels" if conflicting else note


def duplicates_of_train(name: str, count: int, rows: int, drawn_by: str | None) -> str:
    """Return the note on rows of a split that are also in train; `drawn_by`: the group column if drawn from train."""
    note = f"{count:,} of {rows:,} {name} rows are duplicate rows of train; scores will be optimistic"
    if drawn_by is None:
        return f"{note}; remove them from one of the files, or set data.{name}=0.1 to draw rows that train lacks"
    return f"{note}; nearly all groups of {drawn_by} share texts: remove duplicates (`tunesmith data check` lists them)"


def classes_only_in_train(
    targets: Sequence[Any], strata: splits.Indices, units: splits.Digests, unit: str
) -> list[str]:
    """Return a note on classes with a single text (or group), which cannot be in two splits."""
    pairs = np.unique(np.stack([strata.astype(np.uint64), units]), axis=1)[0]
    _, first = np.unique(strata, return_index=True)
    counts = np.unique(pairs, return_counts=True)[1]
    names = [shorten(targets[index]) for index in first[counts == 1]]
    if not names:
        return []
    who = f"{counted(len(names), 'class', 'classes')} {'has' if len(names) == 1 else 'have'}"
    return [f"{who} a single {unit}, which stays in train and is never scored: {', '.join(names[:MAX_CLASSES_NAMED])}"]
