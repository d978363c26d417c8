"""Train, validation and test splits: stratified, seeded, with identical texts kept in one split."""

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
    """Draw a stratified split; return (kept, drawn) indices, ascending. Rows with equal digests stay together.

    The shares of the classes are rounded by largest remainder to sum to `fraction` of all rows. Every class keeps at
    least one text. A group of equal rows that would exceed the remaining share is skipped.

    Raises:
        DataError: the fraction is less than one row, or no row can be drawn.
    """
    _, classes, counts = np.unique(strata, return_inverse=True, return_counts=True)
    wanted = round(fraction * len(strata))
    if wanted < 1:
        what = f"{fraction:g} of {counted(len(strata), 'row')} is less than one row"
        hint = f"set a larger fraction, a separate file, or data.{name}=null"
        raise DataError(what, where=f"data.{name}", hint=hint)
    can_give = counts - _smallest_text(classes, digests, len(counts))
    ideal = fraction * counts * (can_give > 0)
    shares = np.minimum(np.floor(ideal).astype(np.int64), can_give)
    by_remainder = np.argsort(-(ideal - np.floor(ideal)), kind="stable")
    for code in np.concatenate([by_remainder] * 2):
        if shares.sum() >= wanted:
            break
        shares[code] += shares[code] < can_give[code]
    if not shares.any():
        what = "every class has a single text, so no split can be drawn"
        raise DataError(what, where=f"data.{name}", hint=f"set a separate file, or data.{name}=null")
    order = np.random.default_rng([seed, len(strata)]).permutation(len(strata))
    by_class = order[np.argsort(classes[order], kind="stable")]
    drawn = _whole_texts(by_class, classes, digests, shares.tolist(), can_give.tolist())
    if not len(drawn):
        what = f"{fraction:g} of {len(strata)} rows is less than the smallest group of rows that must stay together"
        hint = f"set a larger fraction, a separate file, or data.{name}=null"
        raise DataError(what, where=f"data.{name}", hint=hint)
    return np.setdiff1d(np.arange(len(strata)), drawn), np.sort(drawn)


def _smallest_text(classes: Indices, digests: Digests, num_classes: int) -> Indices:
    """Return the rows of the least frequent text of each class, the minimum that the class must keep."""
    pairs, rows = np.unique(np.stack([classes.astype(np.uint64), digests]), axis=1, return_counts=True)
    fewest = np.full(num_classes, len(classes))
    np.minimum.at(fewest, pairs[0].astype(np.int64), rows)
    return fewest


def _whole_texts(
    by_class: Indices, classes: Indices, digests: Digests, shares: list[int], can_give: list[int]
) -> Indices:
    """Draw rows in the given order, each together with all rows of the same text.

    The first pass draws at most its share from each class. The second pass draws what the total still lacks.
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
    """Return a 64-bit hash of a row's inputs that ignores case, white space and Unicode composition.

    With NFKC it also ignores the width of characters.
    """
    texts = [str(row.values[name]) for name in sorted(c.name for c in inputs_of(columns)) if name in row.values]
    return _digest("\0".join(texts), form)


def group_digest(row: Row) -> int:
    """Return a 64-bit hash of the group that a row belongs to."""
    return _digest(str(row.values["group"]))


def _digest(text: str, form: Literal["NFC", "NFKC"] = "NFC") -> int:
    plain = " ".join(unicodedata.normalize(form, text).lower().split())
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def join_groups(groups: Digests, digests: Digests) -> Digests:
    """Merge groups that share a text (union-find), so that they stay in one split.

    Returns the original groups if a merged group would have more than half of all rows.
    """
    parents: dict[int, int] = {}

    def root(group: int) -> int:
        while (parent := parents.setdefault(group, group)) != group:
            parents[group] = group = parents[parent]
        return group

    first: dict[int, int] = {}
    for group, digest in zip(groups.tolist(), digests.tolist(), strict=True):
        parents[root(group)] = root(first.setdefault(digest, group))
    merged = np.array([root(group) for group in groups.tolist()], dtype=np.uint64)
    return merged if np.unique(merged, return_counts=True)[1].max() <= len(merged) / 2 else groups


def count_overlap(train: Digests, other: Digests) -> int:
    """Return the number of rows of `other` that duplicate a row of `train`."""
    return int(np.isin(other, train).sum())


def count_duplicates(digests: Digests, strata: Indices) -> tuple[int, int]:
    """Return the number of duplicate rows, and the number of texts that occur in several classes."""
    distinct = np.unique(digests)
    in_classes = np.unique(np.stack([digests, strata.astype(np.uint64)]), axis=1)[0]
    return len(digests) - len(distinct), int((np.unique(in_classes, return_counts=True)[1] > 1).sum())


def refuse_same_file(train: Path, other: Path, name: str) -> None:
    """Refuse a split that is the training file.

    Raises:
        DataError: both paths are the same file.
    """
    if train == other or (train.exists() and other.exists() and train.samefile(other)):
        raise DataError(
            f"data.{name} is the training file", where=str(other), hint=f"set another file, or data.{name}=0.1"
        )
