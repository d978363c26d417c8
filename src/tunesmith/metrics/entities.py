"""Scores of entities, exact in both boundaries and in type, as CoNLL counts them (Tjong Kim Sang & De Meulder 2003).

    P = right / said    R = right / meant    F1 = 2PR / (P + R)

`f1` is over all entities together, `f1_macro` the mean over the types that are meant or said. Equal to seqeval's.
What is wrong is told apart from the side of what is meant: the same words under another type (`type`), other words of
the same type that touch it (`boundary`), both wrong (`boundary_and_type`), nothing (`missed`); and from that of what
is said: touching nothing that is meant (`spurious`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.data.batches import Batch
from tunesmith.data.encoded import Encoded
from tunesmith.data.tags import TagSet
from tunesmith.metrics.classification import MAX_CLASSES_SHOWN, check_finite

Array = NDArray[Any]
Entities = tuple[Array, Array, Array]


class EntityScores:
    """Precision, recall and F1 of entities; accuracy and loss of words."""

    primary = "f1"
    of_answers: frozenset[str] = frozenset()

    def __init__(self, tags: Sequence[str]) -> None:
        self.tag_set = TagSet(tags)
        self._said: list[Array] = []
        self._meant: list[Array] = []
        self._lengths: list[Array] = []
        self._loss = 0.0

    def answers_needed(self, encoded: Encoded) -> int:
        """None."""
        return 0

    def update(self, batch: Batch, outputs: Tensor | None = None, answers: Any = None) -> None:
        """Take in logits (words, tags) of all sentences of a batch in a row."""
        assert outputs is not None, "these scores are of outputs"
        check_finite(outputs)
        tags = batch.ragged("tags")
        self._loss += float(F.cross_entropy(outputs, tags.values, reduction="sum"))
        self._said.append(outputs.argmax(-1).cpu().numpy())
        self._meant.append(tags.values.cpu().numpy())
        self._lengths.append(tags.lengths.cpu().numpy())

    def compute(self) -> dict[str, Any]:
        """The scores so far."""
        said, meant = np.concatenate(self._said), np.concatenate(self._meant)
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(self._lengths))])
        found, wanted = self.tag_set.entities(said, offsets), self.tag_set.entities(meant, offsets)
        right = wanted[2][np.isin(_keys(wanted), _keys(found))]
        counts = np.stack(
            [np.bincount(types, minlength=len(self.tag_set.types)) for types in (right, found[2], wanted[2])]
        )
        each = {
            name: {**_scores(*counts[:, number].tolist()), "support": int(counts[2, number])}
            for number, name in enumerate(self.tag_set.types)
            if counts[:, number].any()
        }
        scores: dict[str, Any] = {
            **_scores(*counts.sum(1).tolist()),
            "f1_macro": float(np.mean([one["f1"] for one in each.values()])) if each else 0.0,
            "accuracy": float((said == meant).mean()),
            "loss": self._loss / len(meant),
        }
        if len(each) <= MAX_CLASSES_SHOWN:
            scores["entities"] = each
        return scores | {"errors": {"right": len(right)} | _errors(wanted, found)}


def _scores(right: int, said: int, meant: int) -> dict[str, Any]:
    """Precision, recall and F1; 0 where nothing is said, or meant."""
    return {
        "f1": 2 * right / max(said + meant, 1),
        "precision": right / max(said, 1),
        "recall": right / max(meant, 1),
    }


def _keys(entities: Entities) -> Array:
    """A number for each entity that no other one has."""
    starts, ends, types = (x.astype(np.int64) for x in entities)
    return (starts << 32) + ((ends - starts) << 16) + types


def _errors(meant: Entities, said: Entities) -> dict[str, int]:
    """How many of those meant are wrong in which way, and how many of those said touch none."""
    counts = dict.fromkeys(("type", "boundary", "boundary_and_type", "missed", "spurious"), 0)
    first, after = _touching(meant, said)
    for start, end, kind, low, high in zip(*(x.tolist() for x in (*meant, first, after)), strict=True):
        touching = [(int(said[0][n]), int(said[1][n]), int(said[2][n])) for n in range(low, high)]
        if (start, end, kind) in touching:
            continue
        if not touching:
            counts["missed"] += 1
        elif any(one[:2] == (start, end) for one in touching):
            counts["type"] += 1
        else:
            counts["boundary" if any(one[2] == kind for one in touching) else "boundary_and_type"] += 1
    first, after = _touching(said, meant)
    counts["spurious"] = int((first == after).sum())
    return counts


def _touching(entities: Entities, others: Entities) -> tuple[Array, Array]:
    """For each entity the range of the others that share a word with it."""
    return np.searchsorted(others[1], entities[0], side="right"), np.searchsorted(others[0], entities[1], side="left")
