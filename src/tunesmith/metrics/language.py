"""Scores of guessed tokens, built up batch by batch: sums alone are kept."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.batches import Batch
from tunesmith.data.texts import from_bytes
from tunesmith.metrics.classification import check_finite
from tunesmith.metrics.texts import TextScores

MOST_NATS = 700.0
"""Beyond, perplexity is no number that a float holds."""


class SurpriseScores:
    """Mean surprise (nats a token), perplexity, the share of tokens that were the likeliest; and scores of texts."""

    def __init__(self, texts: TextScores | None = None) -> None:
        self._texts = texts
        self._loss = 0.0
        self._right = self._tokens = 0

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Take in the log-probabilities of what stands there and of what was likeliest."""  # (tokens, 2)
        check_finite(outputs)
        self._loss -= float(outputs[:, 0].double().sum())
        self._right += int((outputs[:, 0] >= outputs[:, 1]).sum())
        self._tokens += len(outputs)

    def update_texts(self, texts: list[str], batch: Batch) -> None:
        """Take in texts beside their references."""
        assert self._texts is not None, "scores of texts are asked for"
        self._texts.update(texts, from_bytes(batch.ragged("reference")))

    def compute(self) -> dict[str, Any]:
        """The scores so far."""
        scores = _of_tokens(self._loss, self._right, self._tokens)
        return scores | (self._texts.compute() if self._texts is not None else {})


def _of_tokens(loss: float, right: int, tokens: int) -> dict[str, Any]:
    mean = loss / max(tokens, 1)
    return {"loss": mean, "perplexity": math.exp(min(mean, MOST_NATS)), "accuracy": right / max(tokens, 1)}


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
        return _of_tokens(self._loss, self._right, self._tokens)
