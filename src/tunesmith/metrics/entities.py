"""Entity-level metrics, exact in boundaries and type, as in CoNLL (Tjong Kim Sang & De Meulder 2003).

    P = correct / predicted    R = correct / true    F1 = 2PR / (P + R)

`f1` is the micro average, `f1_macro` the mean over the types that are true or predicted. Equal to seqeval's.
A true entity that is not predicted exactly counts as one error: the same words with another type (`type`), overlapping
words with the same type (`boundary`) or another one (`boundary_and_type`), or no overlap (`missed`). A predicted
entity without overlap is `spurious`.
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
from tunesmith.data.text.tags import TagSet
from tunesmith.metrics.classification import MAX_CLASSES_SHOWN, check_finite

Array = NDArray[Any]
Entities = tuple[Array, Array, Array]


class EntityMetrics:
    """Precision, recall and F1 of entities; accuracy and loss of words."""

    primary = "f1"
    of_answers: frozenset[str] = frozenset()

    def __init__(self, tags: Sequence[str]) -> None:
        self.tag_set = TagSet(tags)
        self._predictions: list[Array] = []
        self._labels: list[Array] = []
        self._lengths: list[Array] = []
        self._loss = 0.0

    def answers_needed(self, encoded: Encoded) -> int:
        """Return 0: only outputs are evaluated."""
        return 0

    def update(self, batch: Batch, outputs: Tensor | None = None, answers: Any = None) -> None:
        """Add a batch."""  # logits (words, tags), all sentences concatenated
        assert outputs is not None, "evaluates outputs"
        check_finite(outputs)
        tags = batch.ragged("tags")
        self._loss += float(F.cross_entropy(outputs, tags.values, reduction="sum"))
        self._predictions.append(outputs.argmax(-1).cpu().numpy())
        self._labels.append(tags.values.cpu().numpy())
        self._lengths.append(tags.lengths.cpu().numpy())

    def compute(self) -> dict[str, Any]:
        """Return the metrics of all batches so far."""
        predictions, labels = np.concatenate(self._predictions), np.concatenate(self._labels)
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(self._lengths))])
        predicted, true = self.tag_set.entities(predictions, offsets), self.tag_set.entities(labels, offsets)
        correct = true[2][np.isin(_keys(true), _keys(predicted))]
        counts = np.stack(
            [np.bincount(types, minlength=len(self.tag_set.types)) for types in (correct, predicted[2], true[2])]
        )
        per_type = {
            name: {**_scores(*counts[:, number].tolist()), "support": int(counts[2, number])}
            for number, name in enumerate(self.tag_set.types)
            if counts[:, number].any()
        }
        scores: dict[str, Any] = {
            **_scores(*counts.sum(1).tolist()),
            "f1_macro": float(np.mean([scores["f1"] for scores in per_type.values()])) if per_type else 0.0,
            "accuracy": float((predictions == labels).mean()),
            "loss": self._loss / len(labels),
        }
        if len(per_type) <= MAX_CLASSES_SHOWN:
            scores["entities"] = per_type
        return scores | {"errors": {"right": len(correct)} | _errors(true, predicted)}


def _scores(correct: int, predicted: int, true: int) -> dict[str, Any]:
    """Return precision, recall and F1; 0 where the denominator is 0."""
    return {
        "f1": 2 * correct / max(predicted + true, 1),
        "precision": correct / max(predicted, 1),
        "recall": correct / max(true, 1),
    }


def _keys(entities: Entities) -> Array:
    """Return a unique integer for each entity."""
    starts, ends, types = (x.astype(np.int64) for x in entities)
    return (starts << 32) + ((ends - starts) << 16) + types


def _errors(true: Entities, predicted: Entities) -> dict[str, int]:
    """Count the errors of true entities by kind, and the spurious predictions."""
    counts = dict.fromkeys(("type", "boundary", "boundary_and_type", "missed", "spurious"), 0)
    first, after = _overlapping(true, predicted)
    for start, end, kind, low, high in zip(*(x.tolist() for x in (*true, first, after)), strict=True):
        overlapping = [(int(predicted[0][n]), int(predicted[1][n]), int(predicted[2][n])) for n in range(low, high)]
        if (start, end, kind) in overlapping:
            continue
        if not overlapping:
            counts["missed"] += 1
        elif any(other[:2] == (start, end) for other in overlapping):
            counts["type"] += 1
        else:
            counts["boundary" if any(other[2] == kind for other in overlapping) else "boundary_and_type"] += 1
    first, after = _overlapping(predicted, true)
    counts["spurious"] = int((first == after).sum())
    return counts


def _overlapping(entities: Entities, others: Entities) -> tuple[Array, Array]:
    """Return for each entity the range of the others that share a word with it."""
    return np.searchsorted(others[1], entities[0], side="right"), np.searchsorted(others[0], entities[1], side="left")
