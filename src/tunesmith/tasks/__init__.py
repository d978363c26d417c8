"""What an example is, what the loss is, how it is scored: one file per task, its fields are its recipe keys."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from tunesmith.data.batches import Batch
from tunesmith.data.formats import Row
from tunesmith.recipe import Data
from tunesmith.registry import Plugin


class Metrics(Protocol):
    """A score that is built up batch by batch."""

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Take in one batch; `outputs` is what `Task.forward` gave."""

    def compute(self) -> dict[str, Any]:
        """The scores so far, under the field's names."""


class Task(Plugin):
    """The contract. A task never asks which technique is at work."""

    model_class: ClassVar[str]
    """The transformers Auto class, e.g. `AutoModelForSequenceClassification`."""

    columns: ClassVar[dict[str, tuple[str, ...]]]
    """Role of a column -> the names it usually has, best first; the role's own name comes first."""

    required: ClassVar[frozenset[str]]
    """The roles that training data must have."""

    metric: ClassVar[str]
    """What `best` is chosen by unless the recipe says; `loss` and `perplexity` are better low, all else high."""

    @abstractmethod
    def stratum(self, row: Row) -> object:
        """What a stratified split keeps in proportion (hashable).

        Raises:
            DataError: the row's target cannot be read.
        """

    @abstractmethod
    def fit(self, strata: Iterable[object], data: Data) -> tuple[Self, Data]:
        """The task and the data keys with what the training rows determine filled in (classes, weights).

        Raises:
            DataError: there is nothing to learn from these rows.
        """

    @abstractmethod
    def model_config(self) -> dict[str, Any]:
        """What the model's config must say for this task (num_labels, id2label ...)."""

    @abstractmethod
    def encode(self, rows: Sequence[Row], processor: Any, data: Data) -> list[dict[str, Any]]:
        """Each row as fields: a list of numbers for what varies in length (the first such field is the length that
        counts), a number for what does not.
        """

    @abstractmethod
    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """What the loss of a whole optimizer step is divided by, from the labels alone; sums over micro-batches."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """What metrics and predictions are made from."""

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor], label_smoothing: float = 0.0
    ) -> Tensor:
        """This batch's share of the step's loss: a scalar; the shares of all micro-batches add up to it."""

    @abstractmethod
    def metrics(self) -> Metrics:
        """A fresh score."""

    @abstractmethod
    def baseline(self, strata: Iterable[object], metrics: Metrics) -> dict[str, Any]:
        """What a guess that has seen only the training labels would score."""

    @abstractmethod
    def answers(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Outputs as what `predict` prints, one per example."""
