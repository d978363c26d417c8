"""Splits that can be trusted: in proportion, seeded, and not the same rows twice."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.formats import Row
from tunesmith.errors import DataError

Indices = NDArray[np.int64]
Digests = NDArray[np.uint64]


def stratified_split(strata: Indices, fraction: float, seed: int, name: str = "validation") -> tuple[Indices, Indices]:
    """(kept, drawn) indices, ascending: each class gives its share, a class with a single row gives none.

    The shares are rounded so that together they make `fraction` of all rows (largest remainders).

    Raises:
        DataError: the fraction is less than one row.
    """
    codes, inverse, counts = np.unique(strata, return_inverse=True, return_counts=True)
    wanted = round(fraction * len(strata))
    if wanted < 1:
        rows = f"{fraction:g} of {len(strata)} rows is none"
        hint = f"a larger fraction, a file of its own, or data.{name}=null"
        raise DataError(rows, where=f"data.{name}", hint=hint)
    can_give = np.where(counts > 1, counts - 1, 0)
    ideal = fraction * counts * (counts > 1)
    shares = np.minimum(np.floor(ideal).astype(np.int64), can_give)
    by_remainder = np.argsort(-(ideal - np.floor(ideal)), kind="stable")
    for code in np.concatenate([by_remainder] * 2):
        if shares.sum() >= wanted:
            break
        shares[code] += shares[code] < can_give[code]
    order = np.random.default_rng([seed, len(strata)]).permutation(len(strata))
    by_class = order[np.argsort(inverse[order], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    drawn = np.concatenate([by_class[start : start + share] for start, share in zip(starts, shares, strict=True)])
    if not len(drawn):
        what = "every class has a single row: no split is possible"
        raise DataError(what, where=f"data.{name}", hint=f"a file of its own, or data.{name}=null")
    return np.setdiff1d(np.arange(len(strata)), drawn), np.sort(drawn)


def digest(row: Row) -> int:
    """64 bits of what a row says beside its label, but for case, white space and the way accents are coded."""
    texts = [str(value) for role, value in sorted(row.values.items()) if role != "label"]
    plain = " ".join(unicodedata.normalize("NFC", "\0".join(texts)).lower().split())
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def overlap(train: Digests, other: Digests) -> int:
    """How many rows of `other` say what a row of `train` says."""
    return int(np.isin(other, train).sum())


def repeats(digests: Digests, strata: Indices) -> tuple[int, int]:
    """How many rows say what an earlier one says, and how many texts stand there in several classes."""
    distinct = np.unique(digests)
    in_classes = np.unique(np.stack([digests, strata.astype(np.uint64)]), axis=1)[0]
    return len(digests) - len(distinct), int((np.unique(in_classes, return_counts=True)[1] > 1).sum())


def refuse_same_file(train: Path, other: Path, name: str) -> None:
    """A split that is the training file would measure nothing.

    Raises:
        DataError: they are one file.
    """
    if train.samefile(other):
        raise DataError(
            f"data.{name} is the training file", where=str(other), hint=f"give other rows, or data.{name}=0.1"
        )
