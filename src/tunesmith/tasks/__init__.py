"""What an example is, what the loss is, how it is scored: one file per task, its fields are its recipe keys."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from tunesmith.data.batches import Batch
from tunesmith.data.encoded import Encoded
from tunesmith.data.formats import Row
from tunesmith.recipe import Data
from tunesmith.registry import Plugin

LOW_IS_GOOD = frozenset({"loss", "perplexity", "rmse", "mae", "ece"})
"""Metrics of which less is better; of all others more is."""


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
    """Role of a column -> the names it usually has; the role's own name comes first."""

    required: ClassVar[frozenset[str]]
    """The roles that training data must have."""

    @abstractmethod
    def target(self, row: Row) -> Any:
        """The row's target, hashable, as `fit` wants it.

        Raises:
            DataError: the target cannot be read.
        """

    @abstractmethod
    def fit(self, targets: Sequence[Any], data: Data, where: str) -> tuple[Self, Data]:
        """The task and the data keys with what the training targets determine filled in (classes, weights).

        Raises:
            DataError: there is nothing to learn from these rows.
        """

    @abstractmethod
    def strata(self, targets: Sequence[Any]) -> list[int] | None:
        """The class of each target for a stratified split; None where there are no classes."""

    @abstractmethod
    def head_config(self) -> dict[str, Any]:
        """What the model's config must say for this task (num_labels, id2label ...)."""

    @abstractmethod
    def encode(self, rows: Sequence[Row], processor: Any, data: Data) -> list[dict[str, Any]]:
        """Each row as fields: a list of numbers for what varies in length (the first such field is the length that
        counts), a number for what does not.
        """

    @abstractmethod
    def notes(self, encoded: Encoded, processor: Any) -> list[str]:
        """What the user should know about encoded data: how much was cut away, how much is unknown."""

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
    def metric(self) -> str:
        """What `best` is chosen by unless the recipe says."""

    @abstractmethod
    def prior(self, encoded: Encoded) -> Tensor:
        """The output that a guess which has seen only the training targets gives to every example."""

    @abstractmethod
    def answers(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Outputs as what `predict` prints, one per example."""
