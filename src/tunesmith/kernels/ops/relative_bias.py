"""A learned number for each distance between a query and a key (T5, Raffel 2020, arXiv 1910.10683).

    score(q, k) = q . k + b[head, k - q]

T5 makes of them a number for each pair of tokens, as many as there are scores; here they stay one for each distance, of
which sequences of any length in a step take theirs. Its first block has them, the others are handed them on.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["distances_of", "has_distances", "pairs", "use_distances"]


def has_distances(attention: nn.Module) -> bool:
    """Whether an attention adds such numbers, of its own."""
    return isinstance(getattr(attention, "relative_attention_bias", None), nn.Embedding)


def distances_of(attention: Any, longest: int) -> Tensor:
    """The b of the module's formula, for sequences up to `longest`: of distances from 1 - longest to longest - 1.

    # (heads, 2 * longest - 1)
    """
    table = attention.relative_attention_bias
    buckets = attention._relative_position_bucket(
        torch.arange(1 - longest, longest, device=table.weight.device),
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    found: Tensor = table(buckets).t()
    return found


def pairs(distances: Tensor, longest: int) -> Tensor:
    """Where in b the number of each pair of tokens is.  # (longest, longest), queries by keys"""
    places = torch.arange(longest, device=distances.device)
    return places[None] - places[:, None] + distances.shape[1] // 2


def use_distances(attention: Any, wanted: Any) -> None:
    """Let a module's own way give `distances_of` while `wanted()`, instead of a number for each pair, in place."""

    def compute_bias(self: Any, query_length: int, key_length: int, *args: Any, **kwargs: Any) -> Tensor:
        if wanted():
            return distances_of(self, query_length)
        found: Tensor = type(self).compute_bias(self, query_length, key_length, *args, **kwargs)
        return found

    attention.compute_bias = MethodType(compute_bias, attention)
