"""Which tokens of a text a masked language model is to guess: whole words at random (Devlin 2019, arXiv 1810.04805).

Of the tokens that are chosen, 80 % become the mask, 10 % some other token, 10 % stay. What is chosen is a function of
(seed, epoch, index of the example) alone, however examples are cut into batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import RecipeError

Array = NDArray[Any]
MASK_RATE, RANDOM_RATE = 0.8, 0.1
SEED_STREAM = 15
"""Tells these numbers from others drawn from the same seed and epoch."""


@dataclass(frozen=True)
class MaskingVocabulary:
    """What masking must know of a tokenizer: the mask, what may stand for another token, and how tokens are spelled."""

    mask: int
    ordinary: Array  # (tokens that are not special,)
    spelling: list[str]

    @classmethod
    def of(cls, processor: Any) -> MaskingVocabulary:
        """Read them off.

        Raises:
            RecipeError: the tokenizer has no mask.
        """
        if processor.mask_token_id is None:
            what = "model: its tokenizer has no mask token, so it is none that fills masks"
            raise RecipeError(what, hint="give an encoder such as BERT or RoBERTa")
        spelling = [""] * len(processor)
        for token, index in processor.get_vocab().items():
            spelling[index] = token
        ordinary = np.setdiff1d(np.arange(len(processor)), processor.all_special_ids)
        return cls(int(processor.mask_token_id), ordinary, spelling)


def choose_positions(words: Array, mask_share: float, generator: np.random.Generator) -> Array:
    """The positions of whole words, in random order until `mask_share` of all tokens is reached, one word at least.

    `words` has the number of each token's word, -1 for what is never chosen. A word that is more than what is missing
    is passed over.
    """
    places = np.flatnonzero(words >= 0)
    if not len(places):
        return places
    _, numbers, sizes = np.unique(words[places], return_inverse=True, return_counts=True)
    missing = max(1, round(mask_share * len(places)))
    order = generator.permutation(len(sizes))
    taken = np.zeros(len(sizes), bool)
    for word, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if size <= missing:
            taken[word] = True
            missing -= size
            if not missing:
                break
    if not taken.any():
        taken[order[0]] = True
    return places[taken[numbers]]


def mask_tokens(
    ids: Array, words: Array, mask_share: float, vocabulary: MaskingVocabulary, *, seed: int, epoch: int, index: int
) -> tuple[Array, Array]:
    """(what the model sees, the positions at which it is to guess `ids`)."""
    generator = np.random.default_rng([SEED_STREAM, seed, epoch, index])
    places = choose_positions(words, mask_share, generator)
    kind, other = generator.random(len(places)), generator.integers(len(vocabulary.ordinary), size=len(places))
    seen = ids.copy()
    seen[places[kind < MASK_RATE]] = vocabulary.mask
    as_other = (kind >= MASK_RATE) & (kind < MASK_RATE + RANDOM_RATE)
    seen[places[as_other]] = vocabulary.ordinary[other[as_other]]
    return seen, places
