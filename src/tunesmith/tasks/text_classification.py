"""Text classification of texts or pairs of texts: one class, several labels, or a number (regression).

Losses: cross-entropy, binary cross-entropy per label, squared error. Texts beyond the maximum length are truncated, or
read in windows whose logits are averaged (`windows`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from tunesmith.data.batches import Batch
from tunesmith.data.columns import Column
from tunesmith.data.encoded import Encoded, Fields
from tunesmith.data.formats import Row
from tunesmith.data.labels import Label, LabelKind, class_name, class_weights, fit_labels, read_label
from tunesmith.data.preview import Preview
from tunesmith.data.text.texts import (
    encode_texts,
    inspect_texts,
    mean_of_windows,
    model_inputs,
    preview_tokens,
    text_notes,
    token_costs,
)
from tunesmith.errors import shorten
from tunesmith.recipe import Data
from tunesmith.tasks import Answer, Baseline, BoundTask, Inspection, Metrics, Task, _samples
from tunesmith.tasks._labels import LabelObjective, head_config, mistake, render

COLUMNS = (
    Column(
        "text",
        "text",
        (
            "sentence", "sentence1", "text1", "review", "content", "premise", "question", "document", "body",
            "comment", "tweet", "message", "title", "input", "clause", "文本", "内容", "评论",
        ),
    ),
    Column("text_pair", "text", ("sentence2", "text2", "hypothesis", "passage"), required=False),
    Column(
        "label",
        "label",
        (
            "labels", "class", "category", "target", "sentiment", "score", "rating", "stars", "type", "y",
            "标签", "类别",
        ),
        target=True,
    ),
)  # fmt: skip


def _spelled_as_labels(classes: Any) -> Any:
    """Return class names as labels are spelled; a recipe may give numbers."""
    if not isinstance(classes, list):
        return classes
    return [class_name(one) if isinstance(one, str | int | float) else one for one in classes]


class TextClassification(Task):
    """Assigns a class to a text or a pair of texts."""

    labels: LabelKind = Field(
        "auto", description="one class per text, several labels, or a number; auto: inferred from the data"
    )
    classes: Annotated[list[str] | None, BeforeValidator(_spelled_as_labels)] = Field(
        None, description="class names in the order of the outputs; default: from the training labels"
    )
    windows: int | None = Field(
        None, ge=2, description="maximum windows of a long text, whose logits are averaged; null: texts are truncated"
    )

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    data_keys: ClassVar[frozenset[str]] = frozenset({"max_length", "class_weights", "augment"})

    @property
    def columns(self) -> Sequence[Column]:
        """Text, optional second text, label."""
        return COLUMNS

    @model_validator(mode="after")
    def _sane(self) -> Self:
        if self.classes is not None and self.labels == "regression":
            raise ValueError("classes: regression has no classes; leave the key out")
        twice = [name for name, count in Counter(self.classes).items() if count > 1]
        if twice or self.classes == []:
            what = f"classes: {shorten(twice[0])} is given twice" if twice else "classes: the list is empty"
            raise ValueError(f"{what}; give each class once, or leave the key out")
        return self

    def parse_target(self, row: Row) -> Label:
        """Return a class name, a tuple of class names, or a number."""
        return read_label(row, self.labels, self.classes)

    def fit(self, targets: Sequence[Label], data: Data) -> tuple[Self, Data]:
        """Fit the kind of labels, the classes and their weights."""
        kind, classes, counts = fit_labels(targets, self.labels, self.classes, str(data.train))
        weights = class_weights(data.class_weights, kind, classes, counts)
        fitted = self.model_copy(update={"labels": kind, "classes": classes})
        return fitted, data.model_copy(update={"class_weights": weights})

    def strata(self, targets: Sequence[Label]) -> list[int] | None:
        """Return class indices; each combination of labels is a class, and regression has none."""
        if self.labels == "regression":
            return None
        codes: dict[Label, int] = {}
        return [codes.setdefault(target, len(codes)) for target in targets]

    def sample_row(self, number: int) -> dict[str, object]:
        """Return a short review, negative or positive."""
        return {"text": _samples.review(number), "label": ("negative", "positive")[number % 2]}

    def head_config(self) -> dict[str, Any]:
        """Return head size, class names and transformers' `problem_type`."""
        return head_config(self.labels, self.classes)

    def bind(self, processor: Any, config: Any, data: Data, label_smoothing: float = 0.0) -> BoundTask:
        """Return the bound task with its objective."""
        weights = data.class_weights if isinstance(data.class_weights, dict) else {}
        objective = LabelObjective(self.labels, self.classes, weights, label_smoothing)
        return BoundTextClassification(self, processor, config, data, label_smoothing, objective=objective)

    def render(self, answer: Answer, row: Row) -> str:
        """Return the label and its score."""
        return render(answer)

    def mistake(self, answer: Answer, target: Label) -> tuple[str, str, float] | None:
        """Return a wrong label, or the error of a number."""
        return mistake(answer, target)


@dataclass(frozen=True, eq=False, kw_only=True)
class BoundTextClassification(BoundTask):
    """Text classification bound to a tokenizer and a model config."""

    objective: LabelObjective

    def encode(self, rows: Sequence[Row]) -> list[Fields]:
        """Return the fields of the texts (`encode_texts`) with label and weight."""
        texts = encode_texts(rows, self.processor, self.data, self.task.windows)
        labels = [self.objective.fields(self.task.parse_target(row)) if "label" in row.values else {} for row in rows]
        return [text | label for text, label in zip(texts, labels, strict=True)]

    def costs(self, encoded: Encoded) -> NDArray[np.int64]:
        """Return the number of tokens in all windows."""
        return token_costs(encoded)

    def notes(self, encoded: Encoded) -> list[str]:
        """Return notes on truncated texts and on unknown tokens above 5 %."""
        return text_notes(encoded, self.processor, self.task.windows)

    def model_inputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Return padded texts, or their windows."""
        return [model_inputs(batch, self.config.pad_token_id or 0)]

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sum of the example weights."""
        return self.objective.normalizers(batch)

    def loss(self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor]) -> Tensor:
        """Return this batch's share of the weighted mean over the step."""
        return self.objective.loss(self.outputs(model, batch), batch, normalizers)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return fp32 logits, averaged over the windows of each text."""  # (examples, classes)
        (inputs,) = self.model_inputs(batch)
        return mean_of_windows(model(**inputs).logits.float(), batch)

    def metrics(self) -> Metrics:
        """Return the metrics for this kind of labels."""
        return self.objective.metrics()

    def baseline(self, train: Encoded) -> Baseline:
        """Return the prior of the training labels as a predictor."""
        return self.objective.baseline(train)

    def predict(self, model: nn.Module, batch: Batch, outputs: Tensor | None = None) -> list[Answer]:
        """Return label, score and class probabilities."""
        return self.objective.answers(self.outputs(model, batch) if outputs is None else outputs)

    def preview(self, fields: Fields) -> Preview:
        """Return the tokens of each window, and the label."""
        target = self.objective.shown(fields) if "label" in fields else None
        return preview_tokens(fields, self.processor, target=target)

    def inspect(self, rows: Sequence[Row]) -> Inspection:
        """Return the number of tokens of each text, and the limit of all windows."""
        texts = [[str(row.values[name]) for name in ("text", "text_pair") if name in row.values] for row in rows]
        sizes, unknown = inspect_texts(texts, self.processor)
        specials: int = self.processor.num_special_tokens_to_add(pair=False)  # per window; sizes count them per text
        assert self.data.max_length is not None, "data check sets max_length"
        limit = specials + (self.task.windows or 1) * (self.data.max_length - specials)
        return Inspection(sizes, unknown, limit, "data.max_length or task.windows")
