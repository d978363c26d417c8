"""Whole-word masking for masked language models (Devlin 2019, arXiv 1810.04805).

Of the chosen tokens, 80 % become the mask token, 10 % a random token, 10 % stay. The choice depends on (seed, epoch,
index of the example) alone, not on how examples are batched.
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
"""Separates this random stream from others of the same seed and epoch."""


@dataclass(frozen=True)
class MaskingVocabulary:
    """Parts of a tokenizer that masking needs: the mask token, the non-special tokens, and the text of each token."""

    mask: int
    ordinary: Array  # (tokens that are not special,)
    spelling: list[str]

    @classmethod
    def of(cls, processor: Any) -> MaskingVocabulary:
        """Read them from a tokenizer.

        Raises:
            RecipeError: the tokenizer has no mask token.
        """
        if processor.mask_token_id is None:
            what = "model: its tokenizer has no mask token, so it is not a masked language model"
            raise RecipeError(what, hint="use an encoder such as BERT or RoBERTa")
        spelling = [""] * len(processor)
        for token, index in processor.get_vocab().items():
            spelling[index] = token
        ordinary = np.setdiff1d(np.arange(len(processor)), processor.all_special_ids)
        return cls(int(processor.mask_token_id), ordinary, spelling)


def choose_positions(words: Array, mask_share: float, generator: np.random.Generator) -> Array:
    """Choose whole words at random until `mask_share` of all tokens is reached, at least one word; return positions.

    `words` has the index of each token's word, -1 for tokens that are never chosen. A word that would exceed the share
    is skipped.
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
    """Return (masked input ids, positions to predict)."""
    generator = np.random.default_rng([SEED_STREAM, seed, epoch, index])
    places = choose_positions(words, mask_share, generator)
    kind, other = generator.random(len(places)), generator.integers(len(vocabulary.ordinary), size=len(places))
    masked = ids.copy()
    masked[places[kind < MASK_RATE]] = vocabulary.mask
    is_random = (kind >= MASK_RATE) & (kind < MASK_RATE + RANDOM_RATE)
    masked[places[is_random]] = vocabulary.ordinary[other[is_random]]
    return masked, places
