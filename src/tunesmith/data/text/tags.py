"""Tagging schemes: detection of the scheme, faults in tag sequences, and the entities that the tags mark.

    BIO     B-X I-X I-X     B begins, I continues               IO      I-X I-X, or X X: adjacent words are one entity
    IOB1    I-X I-X         B only directly after another X     BIOES   B-X I-X E-X, one word S-X
    BILOU   B-X I-X L-X, one word U-X                           BMES    B-X M-X E-X, one word S-X

Entities are decoded as in the CoNLL evaluation (Tjong Kim Sang 2000), which also covers invalid sequences as a model
may predict: a word continues an entity if the previous tag is B or I, its own is I or E, and the types are equal.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.formats import Row
from tunesmith.errors import shorten

Scheme = Literal["BIO", "IO", "IOB1", "BIOES", "BILOU", "BMES"]
Indices = NDArray[np.int64]
PREFIXES: dict[Scheme, str] = {
    "BIO": "BI",
    "IO": "I",
    "IOB1": "BI",
    "BIOES": "BIES",
    "BILOU": "BILU",
    "BMES": "BMES",
}
"""Prefixes of each scheme. If several schemes fit equally well, the first is chosen."""

_PREFIXED = re.compile(r"([BIESLUM])-(.+)")
_MISSPELLED = re.compile(r"([BIESLUMbieslum])\W*[-_ :.–—]\W*(.+)")
"""A prefix in lower case or with another separator, such as `B_PER`."""

_CANONICAL_PREFIX = {"L": "E", "U": "S", "M": "I"}


@dataclass(frozen=True, slots=True)
class TagFault:
    """Fault of a tag: its index in the sentence, what is wrong, and a hint."""

    index: int
    what: str
    hint: str


def split_tag(tag: str) -> tuple[str, str]:
    """Split a tag into prefix (O, B, I, E or S) and entity type; a tag without a prefix counts as I."""
    if tag == "O":
        return "O", ""
    if (match := _PREFIXED.fullmatch(tag)) is None:
        return "I", tag
    return _CANONICAL_PREFIX.get(match[1], match[1]), match[2]


def scheme_of(sentences: Iterable[Sequence[str]]) -> Scheme | None:
    """Detect the scheme in which most sentences are valid; None if every tag is O."""
    kinds = Counter(frozenset(_pairs(tags)) for tags in sentences)
    kinds.pop(frozenset({("O", "O")}), None)
    if not kinds:
        return None
    valid = {
        scheme: sum(
            times
            for pairs, times in kinds.items()
            if all(_transition_fault(before, tag, scheme) is None for before, tag in pairs)
        )
        for scheme in PREFIXES
    }
    return max(valid, key=valid.__getitem__)


def tag_faults(tags: Sequence[str], scheme: Scheme) -> list[TagFault]:
    """Return the faults of the tags of one sentence."""
    faults = []
    for index, (before, tag) in enumerate(_pairs(tags)):
        if (wrong := _transition_fault(before, tag, scheme)) is not None:
            faults.append(TagFault(min(index, len(tags) - 1), *wrong))
    return faults


def row_faults(rows: Iterable[tuple[Row, Sequence[str]]], scheme: Scheme) -> Iterator[tuple[str, TagFault]]:
    """Yield (place, fault) of every faulty tag of rows with their tags."""
    for row, tags in rows:
        for fault in tag_faults(tags, scheme):
            yield row.place_of(fault.index), fault


def _pairs(tags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Return pairs of consecutive tags; the beginning and the end of the sentence count as O."""
    return zip(("O", *tags), (*tags, "O"), strict=True)


@lru_cache(maxsize=65536)
def _transition_fault(before: str, tag: str, scheme: Scheme) -> tuple[str, str] | None:
    """Return (fault, hint) of a tag after the previous tag; None if it is valid there."""
    if tag != "O" and not is_tag_of(tag, scheme):
        return f"{shorten(tag)} is not a tag of the {scheme} scheme", _suggest_tag(tag, scheme)
    if scheme == "IO" or (before != "O" and not is_tag_of(before, scheme)):
        return None
    (part_before, type_before), (part, type_) = split_tag(before), split_tag(tag)
    inside = part_before in "BI" and part in "IE" and type_before == type_
    if scheme == "IOB1":
        if part == "B" and type_before != type_:
            what = f"{shorten(tag)} after {shorten(before)}: IOB1 uses B only after another {type_}"
            return what, f"write I-{type_}"
        return None
    if part in "IE" and not inside:
        what = f"{shorten(tag)} after {shorten(before)}: a {scheme} entity cannot begin like this"
        return what, f"begin it with B-{type_}"
    if scheme != "BIO" and part_before in "BI" and not inside:
        ends = [
            f"{letter}-{type_before}" for letter in PREFIXES[scheme] if _CANONICAL_PREFIX.get(letter, letter) in "ES"
        ]
        return f"{shorten(tag)} after {shorten(before)}: unfinished entity", f"in {scheme}, end it with one of {ends}"
    return None


def is_tag_of(tag: str, scheme: Scheme) -> bool:
    """Return whether a tag other than O is valid in a scheme."""
    prefixed = _PREFIXED.fullmatch(tag)
    if prefixed is None:
        return scheme == "IO" and not _MISSPELLED.fullmatch(tag)
    return prefixed[1] in PREFIXES[scheme]


def _suggest_tag(tag: str, scheme: Scheme) -> str:
    """Return a hint for an invalid tag."""
    misspelled = _MISSPELLED.fullmatch(tag)
    if misspelled and misspelled[1].upper() in PREFIXES[scheme]:
        return f"did you mean '{misspelled[1].upper()}-{misspelled[2]}'?"
    return f"use O or {', '.join(f'{letter}-TYPE' for letter in PREFIXES[scheme])}"


def tags_of_types(types: Iterable[str], scheme: Scheme, bare: bool) -> list[str]:
    """Return all tags of a scheme for the types, O first. `bare`: IO without prefixes."""
    names = sorted(types)
    return ["O", *(names if bare else [f"{letter}-{name}" for name in names for letter in PREFIXES[scheme]])]


class TagSet:
    """Decoder of entities from sequences of tag ids."""

    def __init__(self, names: Sequence[str]) -> None:
        parts = [split_tag(name) for name in names]
        self.names = list(names)
        self.types = sorted({type_ for part, type_ in parts if part != "O"})
        self._type = np.array([-1 if part == "O" else self.types.index(type_) for part, type_ in parts])
        self._open = np.array([part in "BI" for part, _ in parts])
        self._goes_on = np.array([part in "IE" for part, _ in parts])

    def entities(self, tags: Indices, offsets: Indices) -> tuple[Indices, Indices, Indices]:
        """Return starts, ends (exclusive) and types of all entities, ascending.

        `tags`: tag ids of all sentences, concatenated, (words,). `offsets`: sentence boundaries, (sentences + 1,).
        """
        types = self._type[tags]
        goes_on = np.zeros(len(tags) + 1, dtype=bool)
        goes_on[1:-1] = self._open[tags[:-1]] & self._goes_on[tags[1:]] & (types[1:] == types[:-1])
        goes_on[offsets] = False
        starts = np.flatnonzero((types >= 0) & ~goes_on[:-1])
        ends = np.flatnonzero((types >= 0) & ~goes_on[1:]) + 1
        return starts, ends, types[starts]

    def spans(self, tags: Sequence[str]) -> list[tuple[int, int, str]]:
        """Return (first word, word after the last, type) of the entities of one sentence."""
        codes = np.array([self.names.index(tag) for tag in tags], dtype=np.int64)
        starts, ends, types = (part.tolist() for part in self.entities(codes, np.array([0, len(codes)])))
        return [(start, end, self.types[type_]) for start, end, type_ in zip(starts, ends, types, strict=True)]
