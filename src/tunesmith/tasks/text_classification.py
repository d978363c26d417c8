"""Text classification: one class of two or many, several labels at once, or a number (regression); texts or pairs.

Losses: cross-entropy, binary cross-entropy per label, squared error. Texts longer than the model reads are cut and
counted, or read in windows whose logits are averaged per document (`windows`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from tunesmith.data.batches import Batch
from tunesmith.data.encoded import Encoded
from tunesmith.data.formats import Row
from tunesmith.data.labels import Label, LabelKind, class_name, class_weights, fit_labels, label_fields, read_label
from tunesmith.data.texts import encode_texts, mean_of_windows, model_inputs, text_notes
from tunesmith.errors import RecipeError, shorten
from tunesmith.metrics.classification import ClassificationMetrics, MultiLabelMetrics, RegressionMetrics
from tunesmith.recipe import Data
from tunesmith.tasks import Metrics, Task


def _spelled_as_labels(classes: Any) -> Any:
    """Numbers may be given bare, and are spelled as the labels of rows are."""
    if not isinstance(classes, list):
        return classes
    return [class_name(one) if isinstance(one, str | int | float) else one for one in classes]


class TextClassification(Task):
    """Says which class a text (or a pair of texts) belongs to."""

    labels: LabelKind = Field("auto", description="one class a text, several, or a number; auto: from the data")
    classes: Annotated[list[str] | None, BeforeValidator(_spelled_as_labels)] = Field(
        None, description="their names in the order of the outputs; default: from train"
    )
    windows: int | None = Field(
        None, ge=2, description="read longer texts in up to this many windows, averaged; null: cut them"
    )

    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": (
            "text", "sentence", "sentence1", "text1", "review", "content", "premise", "question", "document", "body",
            "comment", "tweet", "message", "title", "input", "clause", "文本", "内容", "评论",
        ),
        "text_pair": ("text_pair", "sentence2", "text2", "hypothesis", "passage"),
        "label": (
            "label", "labels", "class", "category", "target", "sentiment", "score", "rating", "stars", "type", "y",
            "标签", "类别",
        ),
    }  # fmt: skip
    required: ClassVar[frozenset[str]] = frozenset({"text", "label"})

    @model_validator(mode="after")
    def _sane(self) -> Self:
        if self.classes is not None and self.labels == "regression":
            raise ValueError("a regression has no classes; leave classes out")
        twice = [name for name, count in Counter(self.classes).items() if count > 1]
        if twice or self.classes == []:
            what = f"classes: {shorten(twice[0])} is given twice" if twice else "classes: there is none in the list"
            raise ValueError(f"{what}; give each class once, or leave the key out")
        return self

    def target(self, row: Row) -> Label:
        """A class name, a tuple of them, or a number."""
        return read_label(row, self.labels, self.classes)

    def fit(self, targets: Sequence[Label], data: Data, where: str) -> tuple[Self, Data]:
        """Kind, classes and class weights from the training targets."""
        kind, classes, counts = fit_labels(targets, self.labels, self.classes, where)
        weights = class_weights(data.class_weights, kind, classes, counts)
        fitted = self.model_copy(update={"labels": kind, "classes": classes})
        return fitted, data.model_copy(update={"class_weights": weights})

    def strata(self, targets: Sequence[Label]) -> list[int] | None:
        """Classes as codes; combinations of labels count as classes, numbers have none."""
        if self.labels == "regression":
            return None
        codes: dict[Label, int] = {}
        return [codes.setdefault(target, len(codes)) for target in targets]

    def head_config(self) -> dict[str, Any]:
        """Head size, class names and transformers' name for the kind of problem."""
        if self.labels == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        assert self.classes is not None, "fit comes first"
        kind = "multi_label_classification" if self.labels == "multi" else "single_label_classification"
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {name: index for index, name in enumerate(self.classes)},
            "problem_type": kind,
        }

    def encode(self, rows: Sequence[Row], processor: Any, data: Data) -> list[dict[str, Any]]:
        """The fields of the texts (`encode_texts`), label and weight."""
        texts = encode_texts(rows, processor, data, self.windows)
        weights = data.class_weights if isinstance(data.class_weights, dict) else {}
        labels = [
            label_fields(self.target(row), self.classes, weights) if "label" in row.values else {} for row in rows
        ]
        return [text | label for text, label in zip(texts, labels, strict=True)]

    def tokens_read(self, processor: Any, max_length: int) -> int | None:
        """As many as its windows hold; each has its own special tokens, of which a text has one set."""
        specials: int = processor.num_special_tokens_to_add(pair=False)
        return specials + (self.windows or 1) * (max_length - specials)

    def notes(self, encoded: Encoded, processor: Any) -> list[str]:
        """Texts cut, and unknown tokens above 5 %."""
        return text_notes(encoded, processor, self.windows)

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """The sum of the examples' weights, else their number."""
        if "weight" in batch:
            return {"weight": batch.scalar("weight").sum()}
        return {"weight": torch.tensor(float(batch.size))}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits in fp32, averaged over a document's windows."""  # (examples, classes)
        config: Any = model.config
        logits: Tensor = model(**model_inputs(batch, config.pad_token_id or 0)).logits.float()
        return mean_of_windows(logits, batch)

    def loss(
        self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor], label_smoothing: float = 0.0
    ) -> Tensor:
        """This batch's share of the weighted mean over the step."""
        logits = self.forward(model, batch)
        return self._sum_of_losses(logits, batch, label_smoothing) / normalizers["weight"]

    def _sum_of_losses(self, logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
        if self.labels == "regression":
            if label_smoothing:
                what = "train.label_smoothing: a regression has no classes to spread a target over"
                raise RecipeError(what, hint="leave the key out")
            return F.mse_loss(logits.squeeze(-1), batch.scalar("label").float(), reduction="sum")
        if self.labels == "multi":
            wanted = batch.ragged("label").values.view_as(logits)
            wanted = wanted * (1 - label_smoothing) + label_smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1).sum()
        losses = F.cross_entropy(logits, batch.scalar("label"), reduction="none", label_smoothing=label_smoothing)
        return (losses * batch.scalar("weight")).sum()

    def metrics(self) -> Metrics:
        """Scores of the kind of problem this is."""
        if self.labels == "regression":
            return RegressionMetrics()
        assert self.classes is not None, "fit comes first"
        return MultiLabelMetrics(self.classes) if self.labels == "multi" else ClassificationMetrics(self.classes)

    def metric(self) -> str:
        """Accuracy; micro F1 for several labels; error for numbers."""
        return {"multi": "f1_micro", "regression": "rmse"}.get(self.labels, "accuracy")

    def prior(self, encoded: Encoded) -> Tensor:
        """Log frequency of each class, log odds of each label, or the mean."""  # (classes,)
        labels = torch.from_numpy(np.array(encoded.column("label")))
        if self.labels == "regression":
            return labels.mean()[None]
        assert self.classes is not None, "fit comes first"
        if self.labels == "multi":
            return torch.logit(labels.view(-1, len(self.classes)).mean(0), eps=1e-6)
        return (torch.bincount(labels.long(), minlength=len(self.classes)) / len(labels)).clamp_min(1e-9).log()

    def answers(self, outputs: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Label, score and the probability of every class."""
        if self.labels == "regression":
            return [{"value": value} for value in outputs.squeeze(-1).tolist()]
        assert self.classes is not None, "fit comes first"
        if self.labels == "multi":
            rows = [dict(zip(self.classes, row, strict=True)) for row in outputs.sigmoid().tolist()]
            return [{"labels": [name for name in row if row[name] > 0.5], "probabilities": row} for row in rows]
        rows = [dict(zip(self.classes, row, strict=True)) for row in outputs.softmax(-1).tolist()]
        return [
            {"label": (best := max(row, key=row.__getitem__)), "score": row[best], "probabilities": row} for row in rows
        ]
