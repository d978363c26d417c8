"""Token-level metrics of language models, accumulated batch by batch as sums."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.batches import Batch
from tunesmith.data.encoded import Encoded
from tunesmith.data.text.texts import from_bytes
from tunesmith.metrics.classification import check_finite
from tunesmith.metrics.texts import TextMetrics

MAX_MEAN_LOSS = 700.0
"""exp(709.8) overflows a float."""


class PerplexityMetrics:
    """Causal language modeling: mean token loss in nats, perplexity, token accuracy, and metrics of generated texts."""

    primary = "loss"

    def __init__(
        self, texts: TextMetrics | None = None, max_texts: int | None = None, of_answers: Collection[str] = ()
    ) -> None:
        """Without `texts`, `of_answers` names the metrics of generated texts that the task has otherwise."""
        self._texts, self._max_texts = texts, max_texts
        self.of_answers = frozenset(of_answers if texts is None else texts.names)
        self._loss = 0.0
        self._correct = self._tokens = 0

    def answers_needed(self, encoded: Encoded) -> int:
        """Return `max_texts`, or the number of examples; 0 without references."""
        if self._texts is None or "reference" not in encoded:
            return 0
        return min(self._max_texts or len(encoded), len(encoded))

    def update(
        self, batch: Batch, outputs: Tensor | None = None, answers: Sequence[dict[str, Any]] | None = None
    ) -> None:
        """Add a batch: log-probabilities of labels and most likely tokens (tokens, 2), or generated texts."""
        if outputs is not None:
            check_finite(outputs)
            self._loss -= float(outputs[:, 0].double().sum())
            self._correct += int((outputs[:, 0] >= outputs[:, 1]).sum())
            self._tokens += len(outputs)
        if answers is not None:
            assert self._texts is not None, "created without text metrics"
            texts = [next(iter(answer.values())) for answer in answers]
            self._texts.update(texts, from_bytes(batch.ragged("reference")))

    def compute(self) -> dict[str, Any]:
        """Return the metrics of all batches so far."""
        scores = _token_metrics(self._loss, self._correct, self._tokens)
        return scores | (self._texts.compute() if self._texts is not None else {})


def _token_metrics(loss: float, correct: int, tokens: int) -> dict[str, Any]:
    mean = loss / max(tokens, 1)
    return {"loss": mean, "perplexity": math.exp(min(mean, MAX_MEAN_LOSS)), "accuracy": correct / max(tokens, 1)}


class MaskedTokenMetrics:
    """Masked language modeling: mean cross-entropy in nats, perplexity and accuracy of the masked tokens."""

    primary = "loss"
    of_answers: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._loss = 0.0
        self._correct = self._tokens = 0

    def answers_needed(self, encoded: Encoded) -> int:
        """Return 0: only outputs are evaluated."""
        return 0

    def update(self, batch: Batch, outputs: Tensor | None = None, answers: Any = None) -> None:
        """Add a batch."""  # logits (masked tokens, vocabulary)
        assert outputs is not None, "evaluates outputs"
        check_finite(outputs)
        labels = batch.ragged("label").values
        self._loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        self._correct += int((outputs.argmax(-1) == labels).sum())
        self._tokens += len(labels)

    def compute(self) -> dict[str, Any]:
        """Return the metrics of all batches so far."""
        return _token_metrics(self._loss, self._correct, self._tokens)
