"""Faults of translation pairs: swapped sides, and targets that copy the source.

A naive Bayes classifier, fitted on the pairs themselves, predicts the side of a text from its words. A row counts as
swapped if both of its texts are classified as the other side. No word list and no language model is needed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from tunesmith.data.findings import Fault
from tunesmith.data.formats import Row
from tunesmith.data.text.augment import split_words

MAX_COUNTED_ROWS = 20_000
"""Maximum rows used for the word counts."""

MIN_LOG_ODDS = 3.0
"""Minimum log odds against each side for a row to count as swapped."""


def pair_faults(rows: Iterable[Row]) -> Iterator[Fault]:
    """Yield a fault for each row that is untranslated or swapped."""
    rows = iter(rows)
    first = list(islice(rows, MAX_COUNTED_ROWS))
    counts = [Counter(word for row in first for word in _words(row, side)) for side in ("source", "target")]
    for part in (first, rows):
        for row in part:
            yield from _faults(row, *counts)


def _words(row: Row, side: str) -> list[str]:
    return split_words(str(row.values.get(side, "")).lower())


def _faults(row: Row, sources: Counter[str], targets: Counter[str]) -> Iterator[Fault]:
    source, target = (str(row.values.get(side, "")).strip() for side in ("source", "target"))
    pair = f"{source} -> {target}"
    if source == target:
        fix = "translate it, or remove it: the model would learn to copy"
        yield Fault("copied-source", "the target is a copy of the source", row.place, pair, fix)
    elif all(
        sum(math.log((own[word] + 1) / (other[word] + 1)) for word in set(_words(row, side))) < -MIN_LOG_ODDS
        for side, own, other in (("source", sources, targets), ("target", targets, sources))
    ):
        yield Fault("swapped-pair", "source and target appear to be swapped", row.place, pair, "swap them")
