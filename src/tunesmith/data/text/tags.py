"""Tags of words: which scheme they are written in, what is wrong with them, and the entities that they mark.

    BIO     B-X I-X I-X     B begins, I goes on                 IO      I-X I-X, or X X: neighbours are one
    IOB1    I-X I-X         B only right after another X        BIOES   B-X I-X E-X, one word S-X
    BILOU   B-X I-X L-X, one word U-X                           BMES    B-X M-X E-X, one word S-X

Entities are read as CoNLL's evaluation reads them (Tjong Kim Sang 2000), also from tags that are no sound sequence, as
a model's may be: a word goes on with the entity before it if that is B or I, the word is I or E, and both say one type.
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
"""The first letters of each scheme's tags; of schemes that fit as well as each other, the first one is meant."""

_PREFIXED = re.compile(r"([BIESLUM])-(.+)")
_MISSPELLED = re.compile(r"([BIESLUMbieslum])\W*[-_ :.–—]\W*(.+)")
"""A prefix in small letters, or with another mark behind it: `B_PER` is no type of its own."""

_CANONICAL_PREFIX = {"L": "E", "U": "S", "M": "I"}


@dataclass(frozen=True, slots=True)
class TagFault:
    """What is wrong with a tag: which one of its sentence, what, and the way out."""

    index: int
    what: str
    hint: str


def split_tag(tag: str) -> tuple[str, str]:
    """The part that a word has in an entity (O, B, I, E or S), and the entity's type; without a prefix it is I."""
    if tag == "O":
        return "O", ""
    if (found := _PREFIXED.fullmatch(tag)) is None:
        return "I", tag
    return _CANONICAL_PREFIX.get(found[1], found[1]), found[2]


def scheme_of(sentences: Iterable[Sequence[str]]) -> Scheme | None:
    """The scheme in which most sentences are sound; None where no word has a tag."""
    kinds = Counter(frozenset(_pairs(tags)) for tags in sentences)
    kinds.pop(frozenset({("O", "O")}), None)
    if not kinds:
        return None
    sound = {
        scheme: sum(
            times
            for pairs, times in kinds.items()
            if all(_transition_fault(before, tag, scheme) is None for before, tag in pairs)
        )
        for scheme in PREFIXES
    }
    return max(sound, key=sound.__getitem__)


def tag_faults(tags: Sequence[str], scheme: Scheme) -> list[TagFault]:
    """What is wrong with the tags of one sentence."""
    found = []
    for index, (before, tag) in enumerate(_pairs(tags)):
        if (wrong := _transition_fault(before, tag, scheme)) is not None:
            found.append(TagFault(min(index, len(tags) - 1), *wrong))
    return found


def row_faults(rows: Iterable[tuple[Row, Sequence[str]]], scheme: Scheme) -> Iterator[tuple[str, TagFault]]:
    """(place, fault) of every wrong tag in rows with their tags; the place is a line of the file."""
    for row, tags in rows:
        for fault in tag_faults(tags, scheme):
            yield row.place_of(fault.index), fault


def _pairs(tags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each tag with the one before it, and the end of the sentence as an O."""
    return zip(("O", *tags), (*tags, "O"), strict=True)


@lru_cache(maxsize=65536)
def _transition_fault(before: str, tag: str, scheme: Scheme) -> tuple[str, str] | None:
    """What is wrong with a tag after another, and the way out."""
    if tag != "O" and not is_tag_of(tag, scheme):
        return f"{shorten(tag)} is no tag of {scheme}", _suggest_tag(tag, scheme)
    if scheme == "IO" or (before != "O" and not is_tag_of(before, scheme)):
        return None
    (part_before, type_before), (part, type_) = split_tag(before), split_tag(tag)
    inside = part_before in "BI" and part in "IE" and type_before == type_
    if scheme == "IOB1":
        if part == "B" and type_before != type_:
            return f"{shorten(tag)} after {shorten(before)}: in IOB1 it stands only after another {type_}", f"I-{type_}"
        return None
    if part in "IE" and not inside:
        return f"{shorten(tag)} after {shorten(before)}: in {scheme} no entity begins so", f"begin it with B-{type_}"
    if scheme != "BIO" and part_before in "BI" and not inside:
        ends = [
            f"{letter}-{type_before}" for letter in PREFIXES[scheme] if _CANONICAL_PREFIX.get(letter, letter) in "ES"
        ]
        return f"{shorten(tag)} after {shorten(before)}, which is left open", f"in {scheme} entities end: {ends}"
    return None


def is_tag_of(tag: str, scheme: Scheme) -> bool:
    """Whether a tag other than O is one of a scheme's."""
    prefixed = _PREFIXED.fullmatch(tag)
    if prefixed is None:
        return scheme == "IO" and not _MISSPELLED.fullmatch(tag)
    return prefixed[1] in PREFIXES[scheme]


def _suggest_tag(tag: str, scheme: Scheme) -> str:
    """The tag that a misspelt one may be."""
    near = _MISSPELLED.fullmatch(tag)
    if near and near[1].upper() in PREFIXES[scheme]:
        return f"did you mean '{near[1].upper()}-{near[2]}'?"
    return f"its tags are O and {', '.join(f'{letter}-TYPE' for letter in PREFIXES[scheme])}"


def tags_of_types(types: Iterable[str], scheme: Scheme, bare: bool) -> list[str]:
    """All tags of a scheme for these types, O first; `bare`: IO without prefixes."""
    names = sorted(types)
    return ["O", *(names if bare else [f"{letter}-{name}" for name in names for letter in PREFIXES[scheme]])]


class TagSet:
    """The entities in sequences of tags, given as numbers of these names."""

    def __init__(self, names: Sequence[str]) -> None:
        parts = [split_tag(name) for name in names]
        self.names = list(names)
        self.types = sorted({type_ for part, type_ in parts if part != "O"})
        self._type = np.array([-1 if part == "O" else self.types.index(type_) for part, type_ in parts])
        self._open = np.array([part in "BI" for part, _ in parts])
        self._goes_on = np.array([part in "IE" for part, _ in parts])

    def entities(self, tags: Indices, offsets: Indices) -> tuple[Indices, Indices, Indices]:
        """Starts, ends (exclusive) and types of all entities, ascending.

        `tags`: of all sentences in a row, (words,); `offsets`: where each begins, and the end, (sentences + 1,).
        """
        types = self._type[tags]
        goes_on = np.zeros(len(tags) + 1, dtype=bool)
        goes_on[1:-1] = self._open[tags[:-1]] & self._goes_on[tags[1:]] & (types[1:] == types[:-1])
        goes_on[offsets] = False
        starts = np.flatnonzero((types >= 0) & ~goes_on[:-1])
        ends = np.flatnonzero((types >= 0) & ~goes_on[1:]) + 1
        return starts, ends, types[starts]

    def spans(self, tags: Sequence[str]) -> list[tuple[int, int, str]]:
        """(first word, word after the last, type) of the entities of one sentence."""
        codes = np.array([self.names.index(tag) for tag in tags], dtype=np.int64)
        found = self.entities(codes, np.array([0, len(codes)]))
        return [(start, end, self.types[kind]) for start, end, kind in zip(*(x.tolist() for x in found), strict=True)]
