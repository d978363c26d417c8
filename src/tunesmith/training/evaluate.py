"""Evaluation: scores and answers of a model over encoded examples, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith.data.batches import Batch, collate, cut
from tunesmith.data.encoded import Encoded
from tunesmith.errors import RecipeError, ResourceError
from tunesmith.tasks import Answer, Baseline, BoundTask, Metrics
from tunesmith.training.feature_cache import LIMITS, cached_features
from tunesmith.training.machine import Machine, is_out_of_memory

CHUNK_EXAMPLES = 512
FIRST_EXAMPLES = 16
"""Examples in the first batch of a baseline; the batch size then grows up to `CHUNK_EXAMPLES`."""

MAX_NUMBERS = 2**25
"""Maximum outputs of a baseline held at once, and random outputs drawn by `random_scores`."""

T = TypeVar("T")
Indices = NDArray[np.int64]
Batched = Iterator[tuple[Indices, T, Batch]]
"""(indices, outputs or answers, batch)."""

Show = Callable[[int], None]
"""Progress callback, called after each batch with the number of examples done."""


def no_progress(done: int) -> None:
    """Ignore the progress."""


def outputs(
    model: nn.Module, task: BoundTask, encoded: Encoded, machine: Machine, rows: Indices | None = None
) -> Batched[Tensor]:
    """Yield `BoundTask.outputs` for all examples or `rows`, sorted by cost within chunks to reduce padding."""

    def forward(indices: Indices, batch: Batch) -> Tensor:
        with cached_features(model, encoded, indices):
            return task.outputs(model, batch)

    return _batched(forward, model, task, encoded, machine, rows)


def _predictions(
    model: nn.Module, task: BoundTask, encoded: Encoded, machine: Machine, rows: Indices | None = None
) -> Batched[list[Answer]]:
    """Yield `BoundTask.predict` for all examples or `rows`, in the order of `outputs`."""
    return _batched(lambda _, batch: task.predict(model, batch), model, task, encoded, machine, rows)


def _batched(
    forward: Callable[[Indices, Batch], T],
    model: nn.Module,
    task: BoundTask,
    encoded: Encoded,
    machine: Machine,
    rows: Indices | None,
) -> Batched[T]:
    limits = LIMITS.get(machine.device.type, LIMITS["cpu"])
    costs, rows = encoded.costs, np.arange(len(encoded)) if rows is None else rows
    model.eval()
    for start in range(0, len(rows), CHUNK_EXAMPLES):
        chunk = rows[start : start + CHUNK_EXAMPLES]
        chunk = chunk[np.argsort(costs[chunk], kind="stable")]
        for first, last in cut(costs[chunk], limits):
            yield from _forward(forward, model, task, encoded, machine, chunk[first:last])


def _forward(
    forward: Callable[[Indices, Batch], T],
    model: nn.Module,
    task: BoundTask,
    encoded: Encoded,
    machine: Machine,
    rows: Indices,
) -> Batched[T]:
    """Yield one batch, or its two halves if it does not fit in memory.

    Raises:
        ResourceError: one example does not fit.
    """
    output, batch = None, _draw_batch(task, encoded, rows).to(machine.device)
    try:
        with torch.inference_mode(), machine.autocast():
            output = forward(rows, batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(rows) == 1:
            hint = "lower data.max_length, choose a smaller model, or set device=cpu"
            raise ResourceError("one example at a time does not fit in memory", hint=hint) from error
    if output is not None:
        yield rows, output, batch
        return
    for half in np.array_split(rows, 2):
        yield from _forward(forward, model, task, encoded, machine, half)


def _with_progress(batches: Batched[T], show: Show, done: int = 0) -> Batched[T]:
    for one in batches:
        yield one
        done += len(one[0])
        show(done)


def _draw_batch(task: BoundTask, encoded: Encoded, rows: Indices) -> Batch:
    return task.transform(collate(encoded, rows), rows)


def scores(
    model: nn.Module,
    task: BoundTask,
    encoded: Encoded,
    machine: Machine,
    *,
    answers: bool = False,
    show: Show = no_progress,
) -> dict[str, Any]:
    """Return the task's scores; with `answers`, also those computed from answers (generated texts, boxes)."""
    metrics = task.metrics()
    for _, output, batch in _with_progress(outputs(model, task, encoded, machine), show):
        metrics.update(batch, output)
    if answers:
        _score_answers(metrics, model, task, encoded, machine, show)
    return metrics.compute()


def _score_answers(
    metrics: Metrics, model: nn.Module, task: BoundTask, encoded: Encoded, machine: Machine, show: Show = no_progress
) -> dict[int, Answer]:
    """Add answers for as many evenly spaced examples as the metrics need; return them by row."""
    given: dict[int, Answer] = {}
    if count := metrics.answers_needed(encoded):
        rows = spread(len(encoded), count)
        for indices, own, batch in _with_progress(
            _predictions(model, task, encoded, machine, rows), show, len(encoded)
        ):
            metrics.update(batch, answers=own)
            given |= zip(indices.tolist(), own, strict=True)
    return given


def spread(size: int, count: int) -> Indices:
    """Return at most `count` of `size` row numbers, evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).round().astype(np.int64))


def baseline(task: BoundTask, train: Encoded, encoded: Encoded) -> dict[str, Any]:
    """Return the scores of the task's baseline, which is fitted on the training targets alone."""
    metrics, predictor = task.metrics(), task.baseline(train)
    for batch, output in _baseline_outputs(task, encoded, predictor):
        metrics.update(batch, output)
    return metrics.compute()


def random_scores(task: BoundTask, train: Encoded, encoded: Encoded) -> dict[str, Any]:
    """Return the scores of random outputs, which show before training which metrics the task has."""
    metrics, predictor = task.metrics(), task.baseline(train)
    drawn, left = torch.Generator().manual_seed(0), MAX_NUMBERS
    for batch, output in _baseline_outputs(task, encoded, predictor):
        metrics.update(batch, torch.randn(output.shape, generator=drawn))
        left -= output.numel()
        if left < 0:
            break
    return metrics.compute()


def _baseline_outputs(task: BoundTask, encoded: Encoded, predictor: Baseline) -> Iterator[tuple[Batch, Tensor]]:
    """Yield (batch, outputs) in the order of the examples, with at most `MAX_NUMBERS` outputs each."""
    start, size = 0, FIRST_EXAMPLES
    while start < len(encoded):
        batch = _draw_batch(task, encoded, np.arange(start, min(start + size, len(encoded))))
        output = predictor(batch)
        if batch.size > 1 and output.numel() > MAX_NUMBERS:  # an expanded view of the prior takes no memory
            size = batch.size // 2
            continue
        yield batch, output
        start += batch.size
        size = min(CHUNK_EXAMPLES, 2 * size)


def answers(
    model: nn.Module, task: BoundTask, encoded: Encoded, machine: Machine, show: Show = no_progress
) -> list[Answer]:
    """Return one answer for each example, in their order."""
    given: list[Answer] = [{} for _ in range(len(encoded))]
    for indices, own, _ in _with_progress(_predictions(model, task, encoded, machine), show):
        _place(given, indices, own)
    return given


def scores_and_answers(
    model: nn.Module, task: BoundTask, encoded: Encoded, machine: Machine
) -> tuple[dict[str, Any], list[Answer]]:
    """Return the task's scores and answers. Generated answers that are not scored are empty."""
    given: list[Answer] = [{} for _ in range(len(encoded))]
    metrics = task.metrics()
    for indices, output, batch in outputs(model, task, encoded, machine):
        metrics.update(batch, output)
        if task.generator is None and task.rows_are_examples:
            with torch.inference_mode():
                _place(given, indices, task.predict(model, batch, output))
    for row, answer in _score_answers(metrics, model, task, encoded, machine).items():
        given[row] = answer
    return metrics.compute(), given


def _place(given: list[Answer], indices: Indices, answers: list[Answer]) -> None:
    for index, answer in zip(indices, answers, strict=True):
        given[int(index)] = answer


def pick(scores: dict[str, Any], metric: str) -> float:
    """Return the score that `train.metric` names.

    Raises:
        RecipeError: the task has no such score.
    """
    if not isinstance(scores.get(metric), float):
        numbers = [name for name, value in scores.items() if isinstance(value, float)]
        raise RecipeError(f"train.metric: unknown metric '{metric}'", hint=f"known: {', '.join(sorted(numbers))}")
    return float(scores[metric])
