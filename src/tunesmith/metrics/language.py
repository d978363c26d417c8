"""Scores of guessed tokens, built up batch by batch: sums alone are kept."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.batches import Batch
from tunesmith.metrics.classification import check_finite

MOST_NATS = 700.0
"""Beyond, perplexity is no number that a float holds."""


class TokenScores:
    """Mean cross-entropy (nats a token), perplexity, and the share of tokens guessed right."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._right = self._tokens = 0

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Take in logits (tokens, vocabulary)."""
        check_finite(outputs)
        labels = batch.ragged("label").values
        self._loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        self._right += int((outputs.argmax(-1) == labels).sum())
        self._tokens += len(labels)

    def compute(self) -> dict[str, Any]:
        """The scores so far."""
        tokens = max(self._tokens, 1)
        loss = self._loss / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, MOST_NATS)), "accuracy": self._right / tokens}
