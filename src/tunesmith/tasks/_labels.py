"""The objective of classification (one class, several labels) and regression, shared by tasks of all modalities.

single       cross-entropy, weighted by class
multi        binary cross-entropy, averaged over the labels
regression   squared error
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.batches import Batch
from tunesmith.data.encoded import Encoded, Fields
from tunesmith.data.labels import Label, LabelKind, label_fields
from tunesmith.errors import RecipeError
from tunesmith.metrics.classification import ClassificationMetrics, MultiLabelMetrics, RegressionMetrics
from tunesmith.tasks import Answer, Baseline, Metrics

__all__ = ["LabelObjective", "head_config", "mistake", "render"]

THRESHOLD = 0.5
"""Probability above which a label is predicted, with several labels per example."""


def head_config(kind: LabelKind, classes: Sequence[str] | None) -> dict[str, Any]:
    """Return head size, class names and transformers' `problem_type`."""
    if kind == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    assert classes is not None, "the task is fitted first"
    return {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
        "problem_type": "multi_label_classification" if kind == "multi" else "single_label_classification",
    }


def render(answer: Answer) -> str:
    """Return the predicted labels with the score, or the number."""
    label = answer.get("label") or ", ".join(answer.get("labels", [])) or f"{answer.get('value', 0):.4g}"
    return f"{label}  {answer['score']:.3f}" if "score" in answer else label


def mistake(answer: Answer, target: Label) -> tuple[str, str, float] | None:
    """Return (true, predicted, confidence) of a wrong answer, or (true, predicted, error) of any number."""
    if "value" in answer:
        return f"{target:g}", f"{answer['value']:.4g}", abs(answer["value"] - target)  # type: ignore[operator]
    if "labels" in answer:
        assert isinstance(target, tuple), "several labels per row"
        wrong = set(answer["labels"]) ^ set(target)
        confidence = [
            p if name in answer["labels"] else 1 - p for name, p in answer["probabilities"].items() if name in wrong
        ]
        return (", ".join(target), ", ".join(answer["labels"]), max(confidence)) if wrong else None
    return (str(target), answer["label"], answer["score"]) if answer["label"] != target else None


@dataclass(frozen=True)
class LabelObjective:
    """Loss, metrics, baseline and answers of labels. Logits are (examples, classes), for regression (examples, 1)."""

    kind: LabelKind
    classes: Sequence[str] | None
    class_weights: Mapping[str, float] = field(default_factory=dict)
    label_smoothing: float = 0.0
    field: str = "label"
    """The encoded field that holds the targets."""

    def __post_init__(self) -> None:
        if self.kind == "regression" and self.label_smoothing:
            what = "train.label_smoothing: regression has no classes"
            raise RecipeError(what, hint="leave the key out")

    @property
    def names(self) -> Sequence[str]:
        """Class names in the order of the outputs."""
        assert self.classes is not None, "the task is fitted first"
        return self.classes

    def fields(self, label: Label) -> Fields:
        """Return a label as encoded fields: a number, 0 or 1 for each class, or class index and weight."""
        return label_fields(label, None if self.classes is None else list(self.classes), dict(self.class_weights))

    def shown(self, fields: Fields) -> str:
        """Return the target of encoded fields as text."""
        target = fields["label"]
        if self.kind == "regression":
            return f"{target:g}"
        if self.kind == "multi":
            return ", ".join(name for name, wanted in zip(self.names, target, strict=True) if wanted) or "none"
        return str(self.names[target])

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sum of the example weights, or the number of examples."""
        if "weight" in batch:
            return {"weight": batch.tensor("weight").sum()}
        return {"weight": torch.tensor(float(batch.size))}

    def loss(self, logits: Tensor, batch: Batch, normalizers: dict[str, Tensor]) -> Tensor:
        """Return this batch's share of the weighted mean over the step."""
        return self._sum_of_losses(logits, batch) / normalizers["weight"]

    def _sum_of_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.kind == "regression":
            return F.mse_loss(logits.squeeze(-1), batch.tensor("label").float(), reduction="sum")
        smoothing = self.label_smoothing
        if self.kind == "multi":
            targets = batch.ragged("label").values.view_as(logits)
            targets = targets * (1 - smoothing) + smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1).sum()
        losses = F.cross_entropy(logits, batch.tensor("label"), reduction="none", label_smoothing=smoothing)
        return (losses * batch.tensor("weight")).sum()

    def metrics(self) -> Metrics:
        """Return the metrics for this kind of labels."""
        if self.kind == "regression":
            return RegressionMetrics()
        return MultiLabelMetrics(list(self.names)) if self.kind == "multi" else ClassificationMetrics(list(self.names))

    def prior(self, train: Encoded) -> Tensor:
        """Return log class frequencies, log odds of each label, or the mean of the training targets."""  # (classes,)
        labels = torch.from_numpy(np.array(train.column("label")))
        if self.kind == "regression":
            return labels.mean()[None]
        if self.kind == "multi":
            return torch.logit(labels.view(-1, len(self.names)).mean(0), eps=1e-6)
        return (torch.bincount(labels.long(), minlength=len(self.names)) / len(labels)).clamp_min(1e-9).log()

    def baseline(self, train: Encoded) -> Baseline:
        """Return a predictor whose outputs are the prior for every example."""
        prior = self.prior(train)
        return lambda batch: prior.expand(batch.size, -1)

    def answers(self, outputs: Tensor) -> list[Answer]:
        """Return label, score and class probabilities, or the number."""
        if self.kind == "regression":
            return [{"value": value} for value in outputs.squeeze(-1).tolist()]
        if self.kind == "multi":
            rows = [dict(zip(self.names, row, strict=True)) for row in outputs.sigmoid().tolist()]
            return [{"labels": [name for name in row if row[name] > THRESHOLD], "probabilities": row} for row in rows]
        rows = [dict(zip(self.names, row, strict=True)) for row in outputs.softmax(-1).tolist()]
        return [
            {"label": (best := max(row, key=row.__getitem__)), "score": row[best], "probabilities": row} for row in rows
        ]
