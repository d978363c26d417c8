"""Metrics of classification and regression, accumulated batch by batch from logits.

Only probabilities (float32, examples x classes) and sums of losses are kept.
Calibration: expected calibration error over 15 bins of equal width (Guo et al. 2017).
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


class ClassificationMetrics:
    """Single-label classification: accuracy, F1, AUROC, calibration error, confusion matrix."""

    primary = "accuracy"
    of_answers: frozenset[str] = frozenset()

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        self._probabilities: list[Array] = []
        self._labels: list[Array] = []
        self._loss = 0.0

    def answers_needed(self, encoded: Encoded) -> int:
        """Return 0: only outputs are evaluated."""
        return 0

    def update(self, batch: Batch, outputs: Tensor | None = None, answers: Any = None) -> None:
        """Add a batch."""  # logits (examples, classes)
        assert outputs is not None, "evaluates outputs"
        check_finite(outputs)
        labels = batch.tensor("label")
        self._loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        self._probabilities.append(outputs.softmax(-1).float().cpu().numpy())
        self._labels.append(labels.cpu().numpy())

    def compute(self) -> dict[str, Any]:
        """Return the metrics of all batches so far."""
        probabilities, labels = np.concatenate(self._probabilities), np.concatenate(self._labels)
        predictions = probabilities.argmax(1)
        class_ids = list(range(len(self.classes)))
        _, recall, f1, support = precision_recall_fscore_support(labels, predictions, labels=class_ids, zero_division=0)
        present = support > 0
        scores: dict[str, Any] = {
            "accuracy": float((predictions == labels).mean()),
            "f1_macro": float(f1[present | (np.bincount(predictions, minlength=len(class_ids)) > 0)].mean()),
            "balanced_accuracy": float(recall[present].mean()),
            "loss": self._loss / len(labels),
            "ece": calibration_error(probabilities.max(1), predictions == labels),
        }
        if (auroc := _auroc(labels, probabilities)) is not None:
            scores["auroc"] = auroc
        if len(self.classes) <= MAX_CLASSES_SHOWN:
            scores["f1"] = {name: float(value) for name, value in zip(self.classes, f1, strict=True)}
            scores["confusion_matrix"] = confusion_matrix(labels, predictions, labels=class_ids).tolist()
        return scores


class MultiLabelMetrics:
    """Multi-label classification at a threshold of 0.5: F1, accuracy, AUROC."""

    primary = "f1_micro"
    of_answers: frozenset[str] = frozenset()

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        self._probabilities: list[Array] = []
        self._labels: list[Array] = []
        self._loss = 0.0

    def answers_needed(self, encoded: Encoded) -> int:
        """Return 0: only outputs are evaluated."""
        return 0

    def update(self, batch: Batch, outputs: Tensor | None = None, answers: Any = None) -> None:
        """Add a batch."""  # logits (examples, labels)
        assert outputs is not None, "evaluates outputs"
        check_finite(outputs)
        labels = batch.ragged("label").values.view_as(outputs)
        self._loss += float(F.binary_cross_entropy_with_logits(outputs, labels, reduction="none").mean(1).sum())
        self._probabilities.append(outputs.sigmoid().float().cpu().numpy())
        self._labels.append(labels.cpu().numpy() > 0.5)

    def compute(self) -> dict[str, Any]:
        """Return the metrics of all batches so far; accuracy is that of whole label sets."""
        probabilities, labels = np.concatenate(self._probabilities), np.concatenate(self._labels)
        predictions = probabilities > 0.5
        true_positives, positives = (predictions & labels).sum(0), predictions.sum(0) + labels.sum(0)
        f1 = 2 * true_positives / np.maximum(positives, 1)  # 0 for a label that is neither predicted nor true
        scores: dict[str, Any] = {
            "f1_micro": float(2 * true_positives.sum() / max(positives.sum(), 1)),
            "f1_macro": float(np.mean(f1)),
            "accuracy": float((predictions == labels).all(1).mean()),
            "loss": self._loss / len(labels),
        }
        mixed = [c for c in range(labels.shape[1]) if 0 < labels[:, c].sum() < len(labels)]
        if mixed:
            scores["auroc"] = float(np.mean([roc_auc_score(labels[:, c], probabilities[:, c]) for c in mixed]))
        if len(self.classes) <= MAX_CLASSES_SHOWN:
            scores["f1"] = {name: float(value) for name, value in zip(self.classes, f1, strict=True)}
        return scores


class RegressionMetrics:
    """Regression: errors, coefficient of determination, correlations."""

    primary = "rmse"
    of_answers: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._predictions: list[Array] = []
        self._labels: list[Array] = []

    def answers_needed(self, encoded: Encoded) -> int:
        """Return 0: only outputs are evaluated."""
        return 0

    def update(self, batch: Batch, outputs: Tensor | None = None, answers: Any = None) -> None:
        """Add a batch."""  # predictions (examples, 1)
        assert outputs is not None, "evaluates outputs"
        check_finite(outputs)
        self._predictions.append(outputs.squeeze(-1).float().cpu().numpy())
        self._labels.append(batch.tensor("label").float().cpu().numpy())

    def compute(self) -> dict[str, Any]:
        """Return the metrics of all batches so far; correlations are left out if either side is constant."""
        predictions = np.concatenate(self._predictions).astype(np.float64)
        labels = np.concatenate(self._labels).astype(np.float64)
        squared = float(((predictions - labels) ** 2).mean())
        scores = {"rmse": squared**0.5, "mae": float(np.abs(predictions - labels).mean()), "loss": squared}
        if np.ptp(labels) > 0:
            scores["r2"] = 1 - squared / float(labels.var())
        if np.ptp(labels) > 0 and np.ptp(predictions) > 0:
            scores["pearson"] = float(np.corrcoef(predictions, labels)[0, 1])
            scores["spearman"] = float(np.corrcoef(_ranks(predictions), _ranks(labels))[0, 1])
        return scores


def check_finite(outputs: Tensor) -> None:
    """Check that outputs are finite.

    Raises:
        NumericError: they have NaN or infinite values.
    """
    if not bool(outputs.isfinite().all()):
        raise NumericError(
            "the model outputs NaN or infinite values", hint="lower train.learning_rate, or set train.precision=fp32"
        )


def calibration_error(confidence: Array, correct: Array) -> float:  # each (examples,)
    """Return the expected calibration error: the mean gap of confidence and accuracy, weighted by bin size."""
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights=correct, minlength=CALIBRATION_BINS)
    gap -= np.bincount(bins, weights=confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gap).sum() / len(confidence))


def _auroc(labels: Array, probabilities: Array) -> float | None:
    """Return the AUROC of the second of two classes, or the mean of one against the rest over the classes present."""
    if len(np.unique(labels)) < 2:
        return None
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    return float(np.mean([roc_auc_score(labels == c, probabilities[:, c]) for c in np.unique(labels)]))


def _ranks(values: Array) -> Array:
    """Return ranks from 1; ties get their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
