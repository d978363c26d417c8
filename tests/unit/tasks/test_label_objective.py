"""`LabelObjective`: fields, loss, baseline and predictions of one class, several, or a number; against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.batches import Batch, collate
from tunesmith.data.encoded import Encoded, encode_in_memory
from tunesmith.data.labels import Label
from tunesmith.errors import RecipeError
from tunesmith.tasks import _labels
from tunesmith.tasks._labels import LabelObjective

CLASSES = ["a", "b", "c"]
KINDS: dict[str, tuple[LabelObjective, list[Label]]] = {
    "single": (LabelObjective("single", CLASSES, {"b": 3.0}), ["a", "b", "b", "c"]),
    "multi": (LabelObjective("multi", CLASSES), [("a",), (), ("a", "c"), ("b",)]),
    "regression": (LabelObjective("regression", None), [0.5, -1.0, 2.25, 0.0]),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def _encoded(kind: str) -> Encoded:
    objective, labels = KINDS[kind]
    return encode_in_memory(labels, lambda part: [objective.fields(label) for label in part])


def _logits(kind: str, rows: int = 4) -> Tensor:
    width = 1 if kind == "regression" else 3
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def _all(kind: str) -> Batch:
    return collate(_encoded(kind), np.arange(4))


def test_a_label_becomes_an_index_with_its_weight_flags_or_a_number() -> None:
    assert KINDS["single"][0].fields("b") == {"label": 1, "weight": 3.0}
    assert KINDS["single"][0].fields("c") == {"label": 2, "weight": 1.0}
    assert KINDS["multi"][0].fields(("a", "c")) == {"label": [1.0, 0.0, 1.0]}
    assert KINDS["regression"][0].fields(0.5) == {"label": 0.5}


@each_kind
def test_a_target_is_shown_as_it_was_written(kind: str) -> None:
    objective, labels = KINDS[kind]
    said = [objective.shown(objective.fields(label)) for label in labels]
    assert said == {
        "single": ["a", "b", "b", "c"],
        "multi": ["a", "none", "a, c", "b"],
        "regression": ["0.5", "-1", "2.25", "0"],
    }[kind]  # fmt: skip


@each_kind
def test_the_loss_is_that_of_torch(kind: str) -> None:
    objective, logits, batch = KINDS[kind][0], _logits(kind), _all(kind)
    theirs = {
        "single": lambda: F.cross_entropy(logits, torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 3.0, 1.0])),
        "multi": lambda: F.binary_cross_entropy_with_logits(
            logits, torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]])
        ),
        "regression": lambda: F.mse_loss(logits[:, 0], torch.tensor([0.5, -1.0, 2.25, 0.0])),
    }[kind]()
    torch.testing.assert_close(objective.loss(logits, batch, objective.normalizers(batch)), theirs)


@each_kind
def test_micro_batches_add_up(kind: str) -> None:
    objective, logits, encoded = KINDS[kind][0], _logits(kind), _encoded(kind)
    whole, parts = _all(kind), [np.array([1]), np.array([0, 3]), np.array([2])]
    total = {"weight": sum(objective.normalizers(collate(encoded, part))["weight"] for part in parts)}
    assert total["weight"] == objective.normalizers(whole)["weight"] == (8.0 if kind == "single" else 4.0)
    shares = [objective.loss(logits[part], collate(encoded, part), total) for part in parts]  # type: ignore[arg-type]
    torch.testing.assert_close(sum(shares), objective.loss(logits, whole, objective.normalizers(whole)))


@pytest.mark.parametrize("kind", ("single", "multi"))
def test_smoothing_moves_targets_towards_undecided(kind: str) -> None:
    labels = KINDS[kind][1]
    objective = LabelObjective(KINDS[kind][0].kind, CLASSES, label_smoothing=0.2)
    logits = _logits(kind)
    batch = collate(encode_in_memory(labels, lambda part: [objective.fields(label) for label in part]), np.arange(4))
    theirs = (
        F.cross_entropy(logits, torch.tensor([0, 1, 1, 2]), label_smoothing=0.2)
        if kind == "single"
        else F.binary_cross_entropy_with_logits(
            logits, torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.1], [0.9, 0.1, 0.9], [0.1, 0.9, 0.1]])
        )
    )
    torch.testing.assert_close(objective.loss(logits, batch, objective.normalizers(batch)), theirs)


def test_smoothing_of_numbers_is_refused_by_its_key() -> None:
    with pytest.raises(RecipeError, match=r"^train\.label_smoothing: ") as caught:
        LabelObjective("regression", None, label_smoothing=0.1)
    assert caught.value.exit_code == 2


@each_kind
def test_the_baseline_is_the_prior_of_the_training_labels(kind: str) -> None:
    objective, batch = KINDS[kind][0], collate(_encoded(kind), np.array([3, 0]))
    prior = {
        "single": torch.tensor([0.25, 0.5, 0.25]).log(),
        "multi": torch.logit(torch.tensor([0.5, 0.25, 0.25])),
        "regression": torch.tensor([0.4375]),
    }[kind]
    torch.testing.assert_close(objective.baseline(_encoded(kind))(batch), prior.expand(2, -1))


def test_a_class_that_train_lacks_has_a_finite_prior() -> None:
    objective = LabelObjective("single", CLASSES)
    encoded = encode_in_memory(["a", "b"], lambda part: [objective.fields(label) for label in part])
    assert bool(objective.prior(encoded).isfinite().all()) and float(objective.prior(encoded)[2]) < -20
    several = LabelObjective("multi", CLASSES)
    encoded = encode_in_memory([("a",), ("a",)], lambda part: [several.fields(label) for label in part])
    assert bool(several.prior(encoded).isfinite().all())


@each_kind
def test_answers_and_metrics_are_of_the_same_logits(kind: str) -> None:
    objective, logits, batch = KINDS[kind][0], _logits(kind), _all(kind)
    answers, metrics = objective.answers(logits), objective.metrics()
    metrics.update(batch, logits)
    scores = metrics.compute()
    assert metrics.primary in scores and metrics.answers_needed(_encoded(kind)) == 0
    targets: Any = KINDS[kind][1]
    if kind == "regression":
        errors = [abs(answer["value"] - target) for answer, target in zip(answers, targets, strict=True)]
        assert scores["mae"] == pytest.approx(float(np.mean(errors)))
        return
    key = "label" if kind == "single" else "labels"
    wanted = targets if kind == "single" else [list(target) for target in targets]
    right = [answer[key] == target for answer, target in zip(answers, wanted, strict=True)]
    assert scores["accuracy"] == pytest.approx(float(np.mean(right)))
    assert [_labels.mistake(answer, target) is None for answer, target in zip(answers, targets, strict=True)] == right


def test_head_config_is_that_of_transformers() -> None:
    assert _labels.head_config("regression", None) == {"num_labels": 1, "problem_type": "regression"}
    for kind, problem in (("single", "single_label_classification"), ("multi", "multi_label_classification")):
        assert _labels.head_config(kind, CLASSES) == {  # type: ignore[arg-type]
            "num_labels": 3,
            "id2label": {0: "a", 1: "b", 2: "c"},
            "label2id": {"a": 0, "b": 1, "c": 2},
            "problem_type": problem,
        }


SEVERAL = {"a": 0.9, "b": 0.25, "c": 0.6}
RENDERED: dict[str, tuple[dict[str, Any], Label, str, tuple[str, str, float] | None]] = {
    "one class, right": ({"label": "a", "score": 0.75, "probabilities": {}}, "a", "a  0.750", None),
    "one class, wrong": ({"label": "a", "score": 0.75, "probabilities": {}}, "b", "a  0.750", ("b", "a", 0.75)),
    "several, right": ({"labels": ["a", "c"], "probabilities": SEVERAL}, ("a", "c"), "a, c", None),
    "several, one too many": ({"labels": ["a", "c"], "probabilities": SEVERAL}, ("a",), "a, c", ("a", "a, c", 0.6)),
    "several, one missing": ({"labels": ["a"], "probabilities": SEVERAL}, ("a", "b"), "a", ("a, b", "a", 0.75)),
    "a number": ({"value": 2.5}, 3.0, "2.5", ("3", "2.5", 0.5)),
    "zero": ({"value": 0.0}, 0.0, "0", ("0", "0", 0.0)),
}
"""Prediction, target, prediction on one line, and error."""


@pytest.mark.parametrize("case", RENDERED)
def test_an_answer_on_one_line_and_as_a_mistake(case: str) -> None:
    answer, target, line, wrong = RENDERED[case]
    assert _labels.render(answer) == line
    assert _labels.mistake(answer, target) == (wrong if wrong is None else pytest.approx(wrong))
