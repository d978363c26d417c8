"""Splits that can be trusted: in proportion, seeded, and not the same text on two sides."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.columns import Columns, inputs_of
from tunesmith.data.formats import Row
from tunesmith.errors import DataError, counted

Indices = NDArray[np.int64]
Digests = NDArray[np.uint64]


def stratified_split(
    strata: Indices, digests: Digests, fraction: float, seed: int, name: str = "validation"
) -> tuple[Indices, Indices]:
    """(kept, drawn) indices, ascending: each class gives its share, rows that say the same stay on one side.

    The shares are rounded so that together they make `fraction` of all rows (largest remainders); every class keeps a
    text. Equal rows that are more than what is still missing are not drawn: others are in their place.

    Raises:
        DataError: the fraction is less than one row, or no rows can be drawn.
    """
    _, classes, counts = np.unique(strata, return_inverse=True, return_counts=True)
    wanted = round(fraction * len(strata))
    if wanted < 1:
        rows = f"{fraction:g} of {counted(len(strata), 'row')} is none"
        hint = f"a larger fraction, a file of its own, or data.{name}=null"
        raise DataError(rows, where=f"data.{name}", hint=hint)
    can_give = counts - _smallest_text(classes, digests, len(counts))
    ideal = fraction * counts * (can_give > 0)
    shares = np.minimum(np.floor(ideal).astype(np.int64), can_give)
    by_remainder = np.argsort(-(ideal - np.floor(ideal)), kind="stable")
    for code in np.concatenate([by_remainder] * 2):
        if shares.sum() >= wanted:
            break
        shares[code] += shares[code] < can_give[code]
    if not shares.any():
        what = "every class has a single text: no split is possible"
        raise DataError(what, where=f"data.{name}", hint=f"a file of its own, or data.{name}=null")
    order = np.random.default_rng([seed, len(strata)]).permutation(len(strata))
    by_class = order[np.argsort(classes[order], kind="stable")]
    drawn = _whole_texts(by_class, classes, digests, shares.tolist(), can_give.tolist())
    if not len(drawn):
        what = f"{fraction:g} of {len(strata)} rows is less than rows that say the same, which stay together"
        hint = f"a larger fraction, a file of its own, or data.{name}=null"
        raise DataError(what, where=f"data.{name}", hint=hint)
    return np.setdiff1d(np.arange(len(strata)), drawn), np.sort(drawn)


def _smallest_text(classes: Indices, digests: Digests, num_classes: int) -> Indices:
    """In how few rows of each class one text stands: what at least is left of it when texts are drawn whole."""
    pairs, rows = np.unique(np.stack([classes.astype(np.uint64), digests]), axis=1, return_counts=True)
    fewest = np.full(num_classes, len(classes))
    np.minimum.at(fewest, pairs[0].astype(np.int64), rows)
    return fewest


def _whole_texts(
    by_class: Indices, classes: Indices, digests: Digests, shares: list[int], can_give: list[int]
) -> Indices:
    """Rows in the order given, each with all that say the same, as long as they fit into the shares of their classes;
    then such as fit into what is missing from all shares together.
    """
    texts: dict[int, list[int]] = {}
    for row, key in zip(by_class.tolist(), digests[by_class].tolist(), strict=True):
        texts.setdefault(key, []).append(row)
    codes, wanted = classes.tolist(), sum(shares)
    drawn: list[int] = []
    taken = [0] * len(shares)
    for limits in (shares, can_give):
        for key, rows in list(texts.items()):
            if len(drawn) + len(rows) > wanted:
                continue
            needs = Counter(codes[row] for row in rows)
            missing = any(taken[code] < shares[code] for code in needs)
            if missing and all(taken[code] + need <= limits[code] for code, need in needs.items()):
                drawn += texts.pop(key)
                for code, need in needs.items():
                    taken[code] += need
    return np.asarray(drawn, dtype=np.int64)


def digest(row: Row, columns: Columns, form: Literal["NFC", "NFKC"] = "NFC") -> int:
    """64 bits of a row's inputs, without regard to case, white space and the way accents are coded; by NFKC also
    without regard to the width of characters.
    """
    texts = [str(row.values[name]) for name in sorted(c.name for c in inputs_of(columns)) if name in row.values]
    return _digest("\0".join(texts), form)


def group_digest(row: Row) -> int:
    """64 bits of the group that a row belongs to."""
    return _digest(str(row.values["group"]))


def _digest(text: str, form: Literal["NFC", "NFKC"] = "NFC") -> int:
    plain = " ".join(unicodedata.normalize(form, text).lower().split())
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def join_groups(groups: Digests, digests: Digests) -> Digests:
    """What stays on one side: each group with those that share a text with it; the groups alone, where more than half
    of all rows would hang together so and little could be drawn.
    """
    above: dict[int, int] = {}

    def top(group: int) -> int:
        while (up := above.setdefault(group, group)) != group:
            above[group] = group = above[up]
        return group

    first: dict[int, int] = {}
    for group, digest in zip(groups.tolist(), digests.tolist(), strict=True):
        above[top(group)] = top(first.setdefault(digest, group))
    found = np.array([top(group) for group in groups.tolist()], dtype=np.uint64)
    return found if np.unique(found, return_counts=True)[1].max() <= len(found) / 2 else groups


def count_overlap(train: Digests, other: Digests) -> int:
    """How many rows of `other` say what a row of `train` says."""
    return int(np.isin(other, train).sum())


def count_duplicates(digests: Digests, strata: Indices) -> tuple[int, int]:
    """How many rows say what an earlier one says, and how many texts stand there in several classes."""
    distinct = np.unique(digests)
    in_classes = np.unique(np.stack([digests, strata.astype(np.uint64)]), axis=1)[0]
    return len(digests) - len(distinct), int((np.unique(in_classes, return_counts=True)[1] > 1).sum())


def refuse_same_file(train: Path, other: Path, name: str) -> None:
    """A split that is the training file would measure nothing.

    Raises:
        DataError: they are one file.
    """
    if train == other or (train.exists() and other.exists() and train.samefile(other)):
        raise DataError(
            f"data.{name} is the training file", where=str(other), hint=f"give other rows, or data.{name}=0.1"
        )
