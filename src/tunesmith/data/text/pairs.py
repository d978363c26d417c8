"""What is wrong with pairs of texts of which one is to translate the other: sides exchanged, a source that was copied.

Which side a word belongs to is learned from the pairs themselves: a row is exchanged where its words, on both sides,
are those of the other one (naive Bayes). No list of words and no knowledge of a language is needed.
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
"""Rows that words are counted in."""

MIN_LOG_ODDS = 3.0
"""By how much the logarithm of the odds must speak against each side."""


def pair_faults(rows: Iterable[Row]) -> Iterator[Fault]:
    """One for each row that is no translation, or one the other way round."""
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
    shown = f"{source} -> {target}"
    if source == target:
        fix = "translate it, or remove it: a model learns to copy"
        yield Fault("copied-source", "a target is its source word for word", row.place, shown, fix)
    elif all(
        sum(math.log((own[word] + 1) / (other[word] + 1)) for word in set(_words(row, side))) < -MIN_LOG_ODDS
        for side, own, other in (("source", sources, targets), ("target", targets, sources))
    ):
        what = "source and target are in each other's place"
        yield Fault("swapped-pair", what, row.place, shown, "exchange them")
