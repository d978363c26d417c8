"""Token-level metrics of language models, accumulated batch by batch as sums."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.batches import Batch
from tunesmith.data.texts import from_bytes
from tunesmith.metrics.classification import check_finite
from tunesmith.metrics.texts import TextMetrics

MAX_MEAN_LOSS = 700.0
"""exp(709.8) overflows a float."""


class PerplexityMetrics:
    """Causal language modeling: mean token loss in nats, perplexity, token accuracy, and metrics of generated texts."""

    def __init__(self, texts: TextMetrics | None = None) -> None:
        self._texts = texts
        self._loss = 0.0
        self._correct = self._tokens = 0

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Add a batch."""  # (tokens, 2): log-probability of the label and of the most likely token
        check_finite(outputs)
        self._loss -= float(outputs[:, 0].double().sum())
        self._correct += int((outputs[:, 0] >= outputs[:, 1]).sum())
        self._tokens += len(outputs)

    def update_texts(self, texts: list[str], batch: Batch) -> None:
        """Add generated texts; the batch has their references."""
        assert self._texts is not None, "created without text metrics"
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

    def __init__(self) -> None:
        self._loss = 0.0
        self._correct = self._tokens = 0

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Add a batch."""  # logits (masked tokens, vocabulary)
        check_finite(outputs)
        labels = batch.ragged("label").values
        self._loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        self._correct += int((outputs.argmax(-1) == labels).sum())
        self._tokens += len(labels)

    def compute(self) -> dict[str, Any]:
        """Return the metrics of all batches so far."""
        return _token_metrics(self._loss, self._correct, self._tokens)
