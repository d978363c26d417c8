"""Scores and predictions do not depend on the batch size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tunesmith.data.batches import Batch, Limits, collate
from tunesmith.data.encoded import Encoded
from tunesmith.data.formats import Row
from tunesmith.errors import ResourceError
from tunesmith.metrics.classification import ClassificationMetrics
from tunesmith.tasks.text_classification import BoundTextClassification
from tunesmith.testing import Case, case, sample_row
from tunesmith.training import evaluate
from tunesmith.training.machine import Machine

CPU = Machine(torch.device("cpu"), None)
REVIEW = partial(sample_row, "text-classification")
LABELS: dict[str, Any] = {
    "single": lambda n: ("bad", "fair", "good")[n % 3 if n % 2 else 0],
    "multi": lambda n: [name for every, name in ((2, "price"), (5, "service")) if n % every == 0],
    "regression": lambda n: math.sin(n),
}


@pytest.fixture(params=LABELS)
def trial(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    label = LABELS[request.param]
    task = {"name": "text-classification", "labels": request.param}
    return case("full", task, "bert", tmp_path, row=lambda n: REVIEW(n) | {"label": label(n)})


def _flat(scores: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def test_scores_are_those_of_all_examples_at_once(trial: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, batch = trial.bound.metrics(), collate(trial.encoded, np.arange(40))
    with torch.no_grad():
        whole.update(batch, trial.bound.outputs(trial.model.eval(), batch))
    expected = whole.compute()
    for chunk, limits in ((512, None), (7, Limits(3, 40, 0)), (40, Limits(1, 1, 0)), (1, Limits(64, 4096, 64))):
        monkeypatch.setattr(evaluate, "CHUNK_EXAMPLES", chunk)
        if limits is not None:
            monkeypatch.setitem(evaluate.LIMITS, "cpu", limits)
        found = evaluate.scores(trial.model, trial.bound, trial.encoded, CPU)
        assert found.keys() == expected.keys()
        assert _flat(found) == pytest.approx(_flat(expected), abs=1e-5), (chunk, limits)


def test_answers_come_in_the_order_of_the_examples(trial: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [collate(trial.encoded, np.array([index])) for index in range(40)]
    one_by_one = [
        one for n, batch in enumerate(batches) for one in trial.bound.predict(trial.model, batch, _outputs(trial, [n]))
    ]
    monkeypatch.setattr(evaluate, "CHUNK_EXAMPLES", 16)
    given = evaluate.answers(trial.model, trial.bound, trial.encoded, CPU)
    scores, again = evaluate.scores_and_answers(trial.model, trial.bound, trial.encoded, CPU)
    assert again == given and scores == evaluate.scores(trial.model, trial.bound, trial.encoded, CPU)
    assert len(given) == 40
    for answer, alone in zip(given, one_by_one, strict=True):
        probabilities, wanted = answer.pop("probabilities", {}), alone.pop("probabilities", {})
        assert probabilities == pytest.approx(wanted, abs=1e-5)
        assert answer.pop("score", 0.0) == pytest.approx(alone.pop("score", 0.0), abs=1e-5)
        assert answer == (alone if "value" not in alone else {"value": pytest.approx(alone["value"], abs=1e-5)})


def _outputs(trial: Case, rows: list[int]) -> Tensor:
    with torch.no_grad():
        return trial.bound.outputs(trial.model.eval(), collate(trial.encoded, np.asarray(rows)))


def test_some_rows_only(trial: Case) -> None:
    rows = np.asarray([31, 2, 2, 17])
    found = {int(i): o for at, output, _ in evaluate.outputs(trial.model, trial.bound, trial.encoded, CPU, rows)
             for i, o in zip(at, output, strict=True)}  # fmt: skip
    assert found.keys() == {31, 2, 17}
    for index, output in found.items():
        assert torch.allclose(output, _outputs(trial, [index])[0], atol=1e-5)


def test_the_baseline_knows_the_targets_of_train_alone(trial: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = trial.bound.task.labels
    labels = [LABELS[kind](n) for n in range(40)]
    found = evaluate.baseline(trial.bound, trial.encoded, trial.encoded)
    monkeypatch.setattr(evaluate, "CHUNK_EXAMPLES", 7)
    assert _flat(evaluate.baseline(trial.bound, trial.encoded, trial.encoded)) == pytest.approx(_flat(found), abs=1e-6)
    if kind == "single":
        counts = Counter(labels)
        assert found["accuracy"] == pytest.approx(max(counts.values()) / 40)
        shares = [count / 40 for count in counts.values()]
        assert found["loss"] == pytest.approx(-sum(share * math.log(share) for share in shares), abs=1e-5)
    elif kind == "regression":
        assert found["rmse"] == pytest.approx(float(np.std(labels)), abs=1e-5) and abs(found["r2"]) < 1e-5
    else:
        shares = [sum(name in given for given in labels) / 40 for name in ("price", "service")]
        entropy = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in shares]
        assert found["loss"] == pytest.approx(float(np.mean(entropy)), abs=1e-4)


def test_no_gradient_no_dropout_and_nothing_left_behind(tmp_path: Path) -> None:
    trial = case("full", "text-classification", "bert", tmp_path, config={"hidden_dropout_prob": 0.5})
    before = {name: value.clone() for name, value in trial.model.state_dict().items()}
    trial.model.train()
    first, second = (evaluate.scores(trial.model, trial.bound, trial.encoded, CPU) for _ in range(2))
    assert first == second and all(parameter.grad is None for parameter in trial.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in trial.model.state_dict().items())
    outputs = evaluate.outputs(trial.model, trial.bound, trial.encoded, CPU)
    next(outputs)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), "between two batches all is as before"


def _fits(most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    own, tried = BoundTextClassification.outputs, list[int]()

    def outputs(self: Any, model: Any, batch: Batch) -> Tensor:
        tried.append(batch.size)
        if batch.size > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, model, batch)

    monkeypatch.setattr(BoundTextClassification, "outputs", outputs)
    return tried


def test_out_of_memory_cuts_the_batch(trial: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate.scores(trial.model, trial.bound, trial.encoded, CPU)
    tried = _fits(3, monkeypatch)
    found = evaluate.scores(trial.model, trial.bound, trial.encoded, CPU)
    assert _flat(found) == pytest.approx(_flat(expected), abs=1e-5)
    assert max(tried) > 3 and sum(size for size in tried if size <= 3) == 40, "each example was scored once"


def test_one_example_that_does_not_fit_ends_with_advice(trial: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    _fits(0, monkeypatch)
    with pytest.raises(ResourceError, match=r"one example .*; .*data\.max_length") as refused:
        evaluate.scores(trial.model, trial.bound, trial.encoded, CPU)
    assert refused.value.exit_code == 4


class Repeats:
    """Generator that writes the number of its input tokens."""

    def generate(self, model: nn.Module, batch: Batch) -> list[str]:
        return [str(length) for length in batch.ragged("input_ids").lengths.tolist()]

    def stream(self, model: nn.Module, batch: Batch, say: Callable[[str], None]) -> str:
        raise NotImplementedError

    def reference_pair(self, row: Row) -> tuple[str, str]:
        raise NotImplementedError


class Repeating(BoundTextClassification):
    """Classifier that also generates texts."""

    def predict(self, model: nn.Module, batch: Batch, outputs: Tensor | None = None) -> list[dict[str, Any]]:
        assert self.generator is not None and torch.is_inference_mode_enabled()
        return [{"generated_text": text} for text in self.generator.generate(model, batch)]

    def metrics(self) -> Any:
        return _Lengths(self.task.classes)


class _Lengths(ClassificationMetrics):
    long, rows = 0, 0
    of_answers = frozenset({"long"})

    def answers_needed(self, encoded: Encoded) -> int:
        return 7

    def update(self, batch: Batch, outputs: Tensor | None = None, answers: Any = None) -> None:
        assert (outputs is None) is (answers is not None), "either, each by its own call"
        if outputs is not None:
            super().update(batch, outputs)
            return
        texts = [answer["generated_text"] for answer in answers]
        assert texts == [str(length) for length in batch.ragged("input_ids").lengths.tolist()]
        self.long, self.rows = self.long + sum(map(int, texts)), self.rows + len(texts)

    def compute(self) -> dict[str, Any]:
        return super().compute() | ({"long": self.long, "rows": self.rows} if self.rows else {})


def test_a_task_that_writes_is_scored_by_texts_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = case("full", {"name": "text-classification"}, "bert", tmp_path)
    known = {name: getattr(trial.bound, name) for name in ("task", "processor", "config", "data", "objective")}
    bound = Repeating(**known, generator=Repeats())
    plain = evaluate.scores(trial.model, trial.bound, trial.encoded, CPU)
    assert evaluate.scores(trial.model, bound, trial.encoded, CPU) == plain, "nothing is written unless asked"
    lengths = trial.encoded.lengths("input_ids").tolist()
    rows = [round(39 * n / 6) for n in range(7)]
    monkeypatch.setattr(evaluate, "CHUNK_EXAMPLES", 3)
    found = evaluate.scores(trial.model, bound, trial.encoded, CPU, answers=True)
    assert (found["long"], found["rows"]) == (sum(lengths[row] for row in rows), 7)
    scores, given = evaluate.scores_and_answers(trial.model, bound, trial.encoded, CPU)
    assert scores == found
    assert given == [{"generated_text": str(lengths[row])} if row in rows else {} for row in range(40)]
    assert evaluate.answers(trial.model, bound, trial.encoded, CPU) == [
        {"generated_text": str(length)} for length in lengths
    ]


def test_rows_are_spread_evenly() -> None:
    assert evaluate.spread(10, 4).tolist() == [0, 3, 6, 9]
    assert evaluate.spread(3, 100).tolist() == [0, 1, 2] and evaluate.spread(5, 1).tolist() == [0]
