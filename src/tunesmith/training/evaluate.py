"""Scores and answers of a model over encoded examples, in memory that does not grow with their number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith.data.batches import Batch, collate, cut
from tunesmith.data.encoded import Encoded
from tunesmith.errors import RecipeError, ResourceError
from tunesmith.tasks import Task, TextMetrics, WritingTask
from tunesmith.training.feature_cache import LIMITS, standing_in
from tunesmith.training.machine import Machine, is_out_of_memory

CHUNK_EXAMPLES = 512
ENOUGH = 2**25
"""Numbers held at once to score a guess, and how many random ones show which scores there are."""

T = TypeVar("T")
Asked = Iterator[tuple[NDArray[np.int64], T, Batch]]
"""(indices, what the model gave, batch)."""

Show = Callable[[int], None]
"""Is told, batch by batch, how many examples have been asked."""


def unseen(done: int) -> None:
    """For who does not watch."""


WRITTEN = "generated_text"
"""What a text is called among answers, as in transformers' pipelines."""


def outputs(
    model: nn.Module, task: Task, encoded: Encoded, machine: Machine, rows: NDArray[np.int64] | None = None
) -> Asked[Tensor]:
    """What `Task.forward` gives for all examples or `rows`, sorted by length in chunks so that little is padded."""
    return _asked(partial(task.forward, model), model, task, encoded, machine, rows)


def texts(
    model: nn.Module, task: WritingTask, encoded: Encoded, machine: Machine, rows: NDArray[np.int64] | None = None
) -> Asked[list[str]]:
    """What the model writes for all examples or `rows`, in the same order."""
    return _asked(partial(task.written, model), model, task, encoded, machine, rows)


def _asked(
    ask: Callable[[Batch], T],
    model: nn.Module,
    task: Task,
    encoded: Encoded,
    machine: Machine,
    rows: NDArray[np.int64] | None,
) -> Asked[T]:
    limits = LIMITS.get(machine.device.type, LIMITS["cpu"])
    lengths, rows = encoded.lengths, np.arange(len(encoded)) if rows is None else rows
    model.eval()
    for start in range(0, len(rows), CHUNK_EXAMPLES):
        chunk = rows[start : start + CHUNK_EXAMPLES]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        for first, last in cut(lengths[chunk], limits):
            yield from _ask(ask, model, task, encoded, machine, chunk[first:last])


def _ask(
    ask: Callable[[Batch], T],
    model: nn.Module,
    task: Task,
    encoded: Encoded,
    machine: Machine,
    rows: NDArray[np.int64],
) -> Asked[T]:
    """One batch, or two halves where it does not fit in memory.

    Raises:
        ResourceError: one example does not fit.
    """
    output, batch = None, _drawn(task, encoded, rows).to(machine.device)
    try:
        with torch.inference_mode(), machine.autocast(), standing_in(model, encoded, rows):
            output = ask(batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(rows) == 1:
            hint = "lower data.max_length, use a smaller model, or device=cpu"
            raise ResourceError("one example at a time does not fit in memory", hint=hint) from error
    if output is not None:
        yield rows, output, batch
        return
    for half in np.array_split(rows, 2):
        yield from _ask(ask, model, task, encoded, machine, half)


def _counted(asked: Asked[T], show: Show, done: int = 0) -> Asked[T]:
    for one in asked:
        yield one
        done += len(one[0])
        show(done)


def _drawn(task: Task, encoded: Encoded, rows: NDArray[np.int64]) -> Batch:
    return task.draw(collate(encoded, rows), rows)


def scores(
    model: nn.Module, task: Task, encoded: Encoded, machine: Machine, *, write: bool = False, show: Show = unseen
) -> dict[str, Any]:
    """The task's scores; with `write` those of texts too, where the task has the model write some."""
    return scored(model, task, encoded, machine, write=write, show=show)[0]


def scored(
    model: nn.Module, task: Task, encoded: Encoded, machine: Machine, *, write: bool = True, show: Show = unseen
) -> tuple[dict[str, Any], dict[int, str]]:
    """The scores, and row -> the text that was written for it; `show` counts what is read, then what is written."""
    metrics, said = task.metrics(), dict[int, str]()
    for _, output, batch in _counted(outputs(model, task, encoded, machine), show):
        metrics.update(output, batch)
    if write and isinstance(task, WritingTask) and (count := task.rows_written(encoded)):
        assert isinstance(metrics, TextMetrics), "what writes is scored by its texts"
        writing = texts(model, task, encoded, machine, spread(len(encoded), count))
        for indices, written, batch in _counted(writing, show, len(encoded)):
            metrics.update_texts(written, batch)
            said |= zip(indices.tolist(), written, strict=True)
    return metrics.compute(), said


def spread(size: int, count: int) -> NDArray[np.int64]:
    """At most `count` of `size` rows, evenly from the first to the last."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).round().astype(np.int64))


def baseline(task: Task, train: Encoded, encoded: Encoded) -> dict[str, Any]:
    """The scores of a guess that has seen only the training targets."""
    metrics, prior = task.metrics(), task.prior(train)
    for batch in _chunks(task, encoded, prior.shape[-1]):
        metrics.update(task.guess(prior, batch), batch)
    return metrics.compute()


def random_scores(task: Task, train: Encoded, encoded: Encoded) -> dict[str, Any]:
    """The scores of answers drawn at random: which scores there are, before anything is learned."""
    metrics, prior = task.metrics(), task.prior(train)
    drawn, left = torch.Generator().manual_seed(0), ENOUGH
    for batch in _chunks(task, encoded, prior.shape[-1]):
        shape = task.guess(prior, batch).shape
        metrics.update(torch.randn(shape, generator=drawn), batch)
        left -= shape.numel()
        if left < 0:
            break
    return metrics.compute()


def _chunks(task: Task, encoded: Encoded, width: int) -> Iterator[Batch]:
    """All examples in their order, as many at once as have `ENOUGH` outputs of this width at most, one at least."""
    start, size = 0, CHUNK_EXAMPLES
    while start < len(encoded):
        batch = _drawn(task, encoded, np.arange(start, min(start + size, len(encoded))))
        if batch.size > 1 and task.num_outputs(batch) * width > ENOUGH:
            size = batch.size // 2
            continue
        yield batch
        start += batch.size


def answers(
    model: nn.Module, task: Task, encoded: Encoded, machine: Machine, show: Show = unseen
) -> list[dict[str, Any]]:
    """What the model says to each example, in their order."""
    given: list[dict[str, Any]] = [{} for _ in range(len(encoded))]
    if isinstance(task, WritingTask):
        for indices, written, _ in _counted(texts(model, task, encoded, machine), show):
            _place(given, indices, [{WRITTEN: text} for text in written])
        return given
    for indices, output, batch in _counted(outputs(model, task, encoded, machine), show):
        _place(given, indices, task.answers(output, batch))
    return given


def scores_and_answers(
    model: nn.Module, task: Task, encoded: Encoded, machine: Machine
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Both; no answer for rows for which nothing is written."""
    given: list[dict[str, Any]] = [{} for _ in range(len(encoded))]
    if isinstance(task, WritingTask):
        found, said = scored(model, task, encoded, machine)
        return found, [{WRITTEN: said[row]} if row in said else {} for row in range(len(encoded))]
    metrics = task.metrics()
    for indices, output, batch in outputs(model, task, encoded, machine):
        metrics.update(output, batch)
        _place(given, indices, task.answers(output, batch))
    return metrics.compute(), given


def _place(given: list[dict[str, Any]], indices: NDArray[np.int64], said: list[dict[str, Any]]) -> None:
    for index, answer in zip(indices, said, strict=True):
        given[int(index)] = answer


def pick(scores: dict[str, Any], metric: str) -> float:
    """The score that `train.metric` names.

    Raises:
        RecipeError: there is none of that name.
    """
    if not isinstance(scores.get(metric), float):
        numbers = [name for name, value in scores.items() if isinstance(value, float)]
        raise RecipeError(f"train.metric: no '{metric}' here", hint=f"known: {', '.join(sorted(numbers))}")
    return float(scores[metric])
