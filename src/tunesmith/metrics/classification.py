"""Scores of classification and regression, built up batch by batch from logits.

Kept are the scores of each example (float32, examples x classes) and the sums of the losses, never hidden states.
Calibration: expected calibration error over 15 equal bins of confidence (Guo et al. 2017).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score
from torch import Tensor

from tunesmith.data.batches import Batch
from tunesmith.data.encoded import Encoded
from tunesmith.errors import NumericError

Array = NDArray[Any]
CALIBRATION_BINS = 15
MAX_CLASSES_SHOWN = 50


class ClassScores:
    """One class an example: accuracy, F1, AUROC, calibration error, confusion matrix."""

    primary = "accuracy"
    of_answers: frozenset[str] = frozenset()

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        self._probabilities: list[Array] = []
        self._labels: list[Array] = []
        self._loss = 0.0

    def answers_needed(self, encoded: Encoded) -> int:
        """None."""
        return 0

    def update(self, batch: Batch, outputs: Tensor | None = None, answers: Any = None) -> None:
        """Take in logits (examples, classes)."""
        assert outputs is not None, "these scores are of outputs"
        check_finite(outputs)
        labels = batch.tensor("label")
        self._loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        self._probabilities.append(outputs.softmax(-1).float().cpu().numpy())
        self._labels.append(labels.cpu().numpy())

    def compute(self) -> dict[str, Any]:
        """The scores so far."""
        probabilities, labels = np.concatenate(self._probabilities), np.concatenate(self._labels)
        guesses = probabilities.argmax(1)
        every = list(range(len(self.classes)))
        _, recall, each, support = precision_recall_fscore_support(labels, guesses, labels=every, zero_division=0)
        present = support > 0
        scores: dict[str, Any] = {
            "accuracy": float((guesses == labels).mean()),
            "f1_macro": float(each[present | (np.bincount(guesses, minlength=len(every)) > 0)].mean()),
            "balanced_accuracy": float(recall[present].mean()),
            "loss": self._loss / len(labels),
            "ece": calibration_error(probabilities.max(1), guesses == labels),
        }
        if (auroc := _auroc(labels, probabilities)) is not None:
            scores["auroc"] = auroc
        if len(self.classes) <= MAX_CLASSES_SHOWN:
            scores["f1"] = {name: float(value) for name, value in zip(self.classes, each, strict=True)}
            scores["confusion_matrix"] = confusion_matrix(labels, guesses, labels=every).tolist()
        return scores


class LabelScores:
    """Several labels an example, each yes or no at 0.5."""

    primary = "f1_micro"
    of_answers: frozenset[str] = frozenset()

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        self._probabilities: list[Array] = []
        self._labels: list[Array] = []
        self._loss = 0.0

    def answers_needed(self, encoded: Encoded) -> int:
        """None."""
        return 0

    def update(self, batch: Batch, outputs: Tensor | None = None, answers: Any = None) -> None:
        """Take in logits (examples, labels)."""
        assert outputs is not None, "these scores are of outputs"
        check_finite(outputs)
        wanted = batch.ragged("label").values.view_as(outputs)
        self._loss += float(F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none").mean(1).sum())
        self._probabilities.append(outputs.sigmoid().float().cpu().numpy())
        self._labels.append(wanted.cpu().numpy() > 0.5)

    def compute(self) -> dict[str, Any]:
        """The scores so far; accuracy counts an example only when all its labels are right."""
        probabilities, labels = np.concatenate(self._probabilities), np.concatenate(self._labels)
        guesses = probabilities > 0.5
        both, said_or_meant = (guesses & labels).sum(0), guesses.sum(0) + labels.sum(0)
        each = 2 * both / np.maximum(said_or_meant, 1)  # 0 for a label that is neither said nor meant
        scores: dict[str, Any] = {
            "f1_micro": float(2 * both.sum() / max(said_or_meant.sum(), 1)),
            "f1_macro": float(np.mean(each)),
            "accuracy": float((guesses == labels).all(1).mean()),
            "loss": self._loss / len(labels),
        }
        mixed = [c for c in range(labels.shape[1]) if 0 < labels[:, c].sum() < len(labels)]
        if mixed:
            scores["auroc"] = float(np.mean([roc_auc_score(labels[:, c], probabilities[:, c]) for c in mixed]))
        if len(self.classes) <= MAX_CLASSES_SHOWN:
            scores["f1"] = {name: float(value) for name, value in zip(self.classes, each, strict=True)}
        return scores


class NumberScores:
    """A number an example: error, explained variance, correlations."""

    primary = "rmse"
    of_answers: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._guesses: list[Array] = []
        self._labels: list[Array] = []

    def answers_needed(self, encoded: Encoded) -> int:
        """None."""
        return 0

    def update(self, batch: Batch, outputs: Tensor | None = None, answers: Any = None) -> None:
        """Take in predictions (examples, 1)."""
        assert outputs is not None, "these scores are of outputs"
        check_finite(outputs)
        self._guesses.append(outputs.squeeze(-1).float().cpu().numpy())
        self._labels.append(batch.tensor("label").float().cpu().numpy())

    def compute(self) -> dict[str, Any]:
        """The scores so far; a correlation is left out where either side is constant."""
        guesses = np.concatenate(self._guesses).astype(np.float64)
        labels = np.concatenate(self._labels).astype(np.float64)
        squared = float(((guesses - labels) ** 2).mean())
        scores = {"rmse": squared**0.5, "mae": float(np.abs(guesses - labels).mean()), "loss": squared}
        if np.ptp(labels) > 0:
            scores["r2"] = 1 - squared / float(labels.var())
        if np.ptp(labels) > 0 and np.ptp(guesses) > 0:
            scores["pearson"] = float(np.corrcoef(guesses, labels)[0, 1])
            scores["spearman"] = float(np.corrcoef(_ranks(guesses), _ranks(labels))[0, 1])
        return scores


def check_finite(outputs: Tensor) -> None:
    """Refuse to score what is no number.

    Raises:
        NumericError: the model answers NaN or infinity.
    """
    if not bool(outputs.isfinite().all()):
        raise NumericError("the model answers NaN or infinity", hint="a lower learning_rate, or precision=fp32")


def calibration_error(confidence: Array, right: Array) -> float:
    """Mean gap between confidence and accuracy, weighted by bin size (ECE)."""  # both (examples,)
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights=right, minlength=CALIBRATION_BINS)
    gap -= np.bincount(bins, weights=confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gap).sum() / len(confidence))


def _auroc(labels: Array, probabilities: Array) -> float | None:
    """Of the second class where there are two, else one against the rest averaged over the classes that occur."""
    if len(np.unique(labels)) < 2:
        return None
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    return float(np.mean([roc_auc_score(labels == c, probabilities[:, c]) for c in np.unique(labels)]))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
