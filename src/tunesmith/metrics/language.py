"""Scores of guessed tokens, built up batch by batch: sums alone are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.batches import Batch
from tunesmith.data.encoded import Encoded
from tunesmith.data.texts import from_bytes
from tunesmith.metrics.classification import check_finite
from tunesmith.metrics.texts import TextScores

MOST_NATS = 700.0
"""Beyond, perplexity is no number that a float holds."""


class SurpriseScores:
    """Mean surprise (nats a token), perplexity, the share of tokens that were the likeliest; and scores of texts."""

    primary = "loss"

    def __init__(self, texts: TextScores | None = None, max_texts: int | None = None) -> None:
        self._texts, self._max_texts = texts, max_texts
        self._loss = 0.0
        self._right = self._tokens = 0

    @property
    def of_answers(self) -> frozenset[str]:
        """The scores of texts."""
        return frozenset(self._texts.names) if self._texts is not None else frozenset()

    def answers_needed(self, encoded: Encoded) -> int:
        """`max_texts` of the examples that have a reference."""
        if self._texts is None or "reference" not in encoded:
            return 0
        return min(self._max_texts or len(encoded), len(encoded))

    def update(
        self, batch: Batch, outputs: Tensor | None = None, answers: Sequence[dict[str, Any]] | None = None
    ) -> None:
        """Add the log-probabilities of the labels and of the likeliest tokens (tokens, 2), or texts as answers."""
        if outputs is not None:
            check_finite(outputs)
            self._loss -= float(outputs[:, 0].double().sum())
            self._right += int((outputs[:, 0] >= outputs[:, 1]).sum())
            self._tokens += len(outputs)
        if answers is not None:
            assert self._texts is not None, "scores of texts are wanted"
            texts = [next(iter(answer.values())) for answer in answers]
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

    primary = "loss"
    of_answers: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._loss = 0.0
        self._right = self._tokens = 0

    def answers_needed(self, encoded: Encoded) -> int:
        """None."""
        return 0

    def update(self, batch: Batch, outputs: Tensor | None = None, answers: Any = None) -> None:
        """Take in logits (tokens, vocabulary)."""
        assert outputs is not None, "these scores are of outputs"
        check_finite(outputs)
        labels = batch.ragged("label").values
        self._loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        self._right += int((outputs.argmax(-1) == labels).sum())
        self._tokens += len(labels)

    def compute(self) -> dict[str, Any]:
        """The scores so far."""
        return _of_tokens(self._loss, self._right, self._tokens)
