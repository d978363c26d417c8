"""Near duplicates by MinHash with banding (LSH), followed by exact similarity of the candidates.

Similarity is the Jaccard index of the sets of character shingles of length `SHINGLE` (Broder 1997, "On the resemblance
and containment of documents"). Two texts of similarity s share one of b bands of r hashes with probability
1 - (1 - s^r)^b: 0.988 at 0.7 and 0.005 at 0.15, so few pairs are compared. Each text needs 96 bytes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

SHINGLE = 4
BANDS, HASHES_PER_BAND = 24, 5
MIN_SIMILARITY = 0.7
"""Similarity from which two texts are near duplicates."""
MIN_CHARS = 16
"""Minimum length; shorter texts are similar to many others by chance."""
MAX_CHARS = 20_000
"""Maximum characters compared; of a longer text only the beginning is compared."""
NEIGHBORS = 4
"""Each text in a band is compared with the first text of equal key, and with this many of those before it."""
MAX_CANDIDATES = 3
"""Maximum candidates per text in its own split, and in the other splits."""
BLOCK_CHARS = 2**16
"""Characters hashed at once, sized to fit the CPU cache."""

Keys = NDArray[np.uint32]
Indices = NDArray[np.int64]
_random = np.random.default_rng(0)
_FACTORS = _random.integers(2**31, size=BANDS * HASHES_PER_BAND, dtype=np.uint32) * 2 + 1
_SUMMANDS = _random.integers(2**32, size=BANDS * HASHES_PER_BAND, dtype=np.uint32)
_POSITIONS = _random.integers(2**63, size=SHINGLE, dtype=np.uint64) * 2 + 1


def normalize(text: str) -> str:
    """Normalize a text for comparison: case, white space and the width of characters are ignored."""
    return " ".join(unicodedata.normalize("NFKC", text[:MAX_CHARS]).lower().split())


def band_keys(texts: Sequence[str]) -> Keys:
    """Return one key per band for each normalized text of at least SHINGLE characters."""  # (texts, BANDS)
    keys = np.empty((len(texts), BANDS), dtype=np.uint32)
    start = 0
    while start < len(texts):
        stop, chars = start + 1, len(texts[start])
        while stop < len(texts) and (chars := chars + len(texts[stop])) <= BLOCK_CHARS:
            stop += 1
        keys[start:stop] = _keys_of_block(texts[start:stop])
        start = stop
    return keys


def _keys_of_block(texts: Sequence[str]) -> Keys:
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in texts])
    num_shingles = len(codes) - SHINGLE + 1
    hashed = np.zeros(num_shingles, dtype=np.uint64)
    for k in range(SHINGLE):
        hashed += codes[k : k + num_shingles] * _POSITIONS[k]
    ends = np.cumsum(lengths)
    inside = np.ones(num_shingles, dtype=bool)
    for back in range(1, SHINGLE):  # exclude shingles that span two texts
        inside[ends[:-1] - back] = False
    shingles = (hashed >> np.uint64(32)).astype(np.uint32)[inside]
    starts = np.concatenate([[0], np.cumsum(lengths - SHINGLE + 1)[:-1]])
    keys = np.zeros((len(texts), BANDS), dtype=np.uint32)
    for number, (factor, summand) in enumerate(zip(_FACTORS, _SUMMANDS, strict=True)):
        least = np.minimum.reduceat(shingles * factor + summand, starts)
        band = number // HASHES_PER_BAND
        keys[:, band] = (keys[:, band] ^ least) * np.uint32(0x9E3779B1) + (keys[:, band] >> np.uint32(15))
    return keys


def candidates(keys: Keys, parts: Indices) -> Indices:
    """Return pairs (earlier, later) that may be near duplicates; `parts` has the split of each text.

    Each text gets up to MAX_CANDIDATES earlier texts of its own split, and as many of other splits.
    """  # (pairs, 2)
    size = len(keys)
    codes = [code for band in range(BANDS) for code in _pairs_in_band(keys[:, band], size)]
    pairs, shared = np.unique(np.concatenate([*codes, np.empty(0, dtype=np.int64)]), return_counts=True)
    earlier, later = pairs // max(size, 1), pairs % max(size, 1)
    across = parts[earlier] != parts[later]
    order = np.lexsort((earlier, -shared, across, later))
    earlier, later, across = earlier[order], later[order], across[order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (later[1:] != later[:-1]) | (across[1:] != across[:-1])
    first = np.flatnonzero(begins)
    rank = np.arange(len(order)) - first[np.cumsum(begins) - 1] if len(order) else order
    return np.stack([earlier, later], axis=1)[rank < MAX_CANDIDATES]


def _pairs_in_band(keys: NDArray[np.uint32], size: int) -> Iterator[Indices]:
    """Yield codes (earlier * size + later) of texts with the same key."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.ones(size, dtype=bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    first = np.flatnonzero(begins)[np.cumsum(begins) - 1] if size else order
    for distance in range(1, NEIGHBORS + 1):
        at = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not len(at):
            return
        yield order[at] * size + order[at + distance]
    at = np.flatnonzero(np.arange(size) - first > NEIGHBORS)
    yield order[first[at]] * size + order[at]


def near_duplicates(pairs: Indices, texts: Mapping[int, str], parts: Indices) -> Iterator[tuple[int, int, float]]:
    """Yield (earlier, later, similarity) of near duplicates among `candidates`, at most one per split and one across.

    `texts` are normalized.
    """
    shingled, last, done = set[str](), -1, (-1, False)
    for earlier, later in pairs.tolist():
        key = (later, bool(parts[earlier] != parts[later]))
        if key == done:
            continue
        if later != last:
            shingled, last = shingles(texts[later]), later
        other = shingles(texts[earlier])
        both = len(shingled & other)
        similarity = both / (len(shingled) + len(other) - both)
        if similarity >= MIN_SIMILARITY:
            done = key
            yield earlier, later, similarity


def shingles(text: str) -> set[str]:
    """Return all substrings of SHINGLE characters of a normalized text."""
    return {text[at : at + SHINGLE] for at in range(len(text) - SHINGLE + 1)}
