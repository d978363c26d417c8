"""Metrics against scikit-learn or by hand, on random input and on degenerate input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as reference
from torch import Tensor

from tunesmith.data.batches import Batch, Ragged
from tunesmith.errors import NumericError
from tunesmith.metrics import MEANINGS
from tunesmith.metrics.classification import (
    CALIBRATION_BINS,
    MAX_CLASSES_SHOWN,
    ClassificationMetrics,
    MultiLabelMetrics,
    RegressionMetrics,
    calibration_error,
)

SEEDS = range(4)


def _one(labels: Sequence[int] | Tensor) -> Batch:
    labels = torch.as_tensor(labels)
    return Batch({"label": labels}, len(labels))


def _several(labels: Tensor) -> Batch:
    offsets = torch.arange(len(labels) + 1) * labels.shape[1]
    return Batch({"label": Ragged(labels.flatten().float(), offsets)}, len(labels))


def _classes(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


def _scores(outputs: Tensor, labels: Sequence[int] | Tensor) -> dict[str, Any]:
    scores = ClassificationMetrics(_classes(outputs.shape[1]))
    scores.update(_one(labels), outputs)
    return scores.compute()


def _label_scores(outputs: Tensor, labels: Tensor) -> dict[str, Any]:
    scores = MultiLabelMetrics(_classes(outputs.shape[1]))
    scores.update(_several(labels), outputs)
    return scores.compute()


def _number_scores(predictions: Sequence[float] | Tensor, labels: Sequence[float] | Tensor) -> dict[str, Any]:
    scores = RegressionMetrics()
    scores.update(_one(torch.as_tensor(labels).float()), torch.as_tensor(predictions)[:, None].float())
    return scores.compute()


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    plain = {name: value for name, value in scores.items() if isinstance(value, float)}
    return plain | {f"f1 {name}": value for name, value in scores.get("f1", {}).items()}


@pytest.mark.parametrize("classes", (2, 3, 7))
@pytest.mark.parametrize("seed", SEEDS)
def test_one_class_an_example_as_scikit_learn_scores_it(seed: int, classes: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (90,), generator=drawn)
    outputs = torch.randn(90, classes, generator=drawn) + 1.5 * F.one_hot(labels, classes)
    predictions, probabilities = outputs.argmax(1), outputs.double().softmax(1)
    scores = _scores(outputs, labels)
    second = probabilities[:, 1] if classes == 2 else probabilities
    assert _numbers(scores) == pytest.approx(
        {
            "accuracy": reference.accuracy_score(labels, predictions),
            "f1_macro": reference.f1_score(labels, predictions, average="macro"),
            "balanced_accuracy": reference.balanced_accuracy_score(labels, predictions),
            "loss": reference.log_loss(labels, probabilities, labels=range(classes)),
            "auroc": reference.roc_auc_score(labels, second, multi_class="ovr"),
            "ece": _ece_by_hand(outputs.softmax(1).max(1).values, predictions == labels),
        }
        | {f"f1 class {n}": one for n, one in enumerate(reference.f1_score(labels, predictions, average=None))},
        abs=1e-6,
    )
    assert scores["confusion_matrix"] == reference.confusion_matrix(labels, predictions).tolist()


@pytest.mark.parametrize("labels_count", (1, 2, 5))
@pytest.mark.parametrize("seed", SEEDS)
def test_several_labels_an_example_as_scikit_learn_scores_them(seed: int, labels_count: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    labels = torch.rand(60, labels_count, generator=drawn) < 0.4
    outputs = torch.randn(60, labels_count, generator=drawn) + labels
    predictions = outputs > 0
    each = [float(reference.f1_score(labels[:, n], predictions[:, n], zero_division=0.0)) for n in range(labels_count)]
    areas = [reference.roc_auc_score(labels[:, n], outputs[:, n]) for n in range(labels_count)]
    assert _numbers(_label_scores(outputs, labels)) == pytest.approx(
        {
            "accuracy": float((labels == predictions).all(1).float().mean()),
            "f1_micro": reference.f1_score(labels.flatten(), predictions.flatten()),
            "f1_macro": np.mean(each),
            "loss": float(F.binary_cross_entropy_with_logits(outputs, labels.float())),
            "auroc": np.mean(areas),
        }
        | {f"f1 class {n}": one for n, one in enumerate(each)},
        abs=1e-6,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_as_scikit_learn_and_numpy_score_them(seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    labels = (4 * torch.rand(50, generator=drawn)).round(decimals=1)  # with ties
    predictions = (labels + torch.randn(50, generator=drawn)).round(decimals=1)
    by_rank = [
        torch.tensor([((one < side).sum() + (one <= side).sum() + 1) / 2 for side in one])
        for one in (labels, predictions)
    ]
    squared = reference.mean_squared_error(labels, predictions)
    assert _number_scores(predictions, labels) == pytest.approx(
        {
            "rmse": squared**0.5,
            "mae": reference.mean_absolute_error(labels, predictions),
            "loss": squared,
            "r2": reference.r2_score(labels, predictions),
            "pearson": np.corrcoef(labels, predictions)[0, 1],
            "spearman": np.corrcoef(*by_rank)[0, 1],
        },
        abs=1e-5,
    )


def _ece_by_hand(confidence: Tensor, right: Tensor) -> float:
    total = 0.0
    for number in range(CALIBRATION_BINS):
        low, high = number / CALIBRATION_BINS, (number + 1) / CALIBRATION_BINS
        inside = (confidence >= low) & ((confidence < high) | (number == CALIBRATION_BINS - 1))
        if inside.any():
            gap = right[inside].double().mean() - confidence[inside].double().mean()
            total += float(inside.double().mean() * gap.abs())
    return total


def test_calibration_error_of_four_answers() -> None:
    confidence, right = np.array([0.9, 0.92, 0.6, 1.0]), np.array([True, False, True, True])
    # bins: 0.9 and 0.92 together, |1 - 1.82| / 4; 0.6 alone, 0.4 / 4; 1.0 alone, 0
    assert calibration_error(confidence, right) == pytest.approx((0.82 + 0.4) / 4)


def test_calibration_error_of_answers_that_know_themselves_is_nothing() -> None:
    confidence = np.repeat([0.55, 0.75], 20)
    right = np.concatenate([np.arange(20) < 11, np.arange(20) < 15])
    assert calibration_error(confidence, right) == pytest.approx(0, abs=1e-12)


def _drawn(kind: str) -> tuple[Any, Tensor, Batch]:
    drawn = torch.Generator().manual_seed(5)
    outputs = torch.randn(50, 1 if kind == "numbers" else 3, generator=drawn)
    if kind == "one":
        return lambda: ClassificationMetrics(_classes(3)), outputs, _one(torch.randint(3, (50,), generator=drawn))
    if kind == "several":
        return lambda: MultiLabelMetrics(_classes(3)), outputs, _several(torch.rand(50, 3, generator=drawn) < 0.5)
    return RegressionMetrics, outputs, _one(torch.randn(50, generator=drawn))


@pytest.mark.parametrize("kind", ("one", "several", "numbers"))
@pytest.mark.parametrize("chunks", ([1] * 50, [49, 1], [7, 13, 30]), ids=("singly", "all but one", "unequal"))
def test_chunks_of_any_size_give_the_same_scores(kind: str, chunks: list[int]) -> None:
    build, outputs, batch = _drawn(kind)
    whole, streamed = build(), build()
    whole.update(batch, outputs)
    labels = batch.ragged("label").values.view(50, -1) if kind == "several" else batch.tensor("label")
    for part, wanted in zip(outputs.split(chunks), labels.split(chunks), strict=True):
        streamed.update(_several(wanted) if kind == "several" else _one(wanted), part)
    first, second = whole.compute(), streamed.compute()
    assert _numbers(second) == pytest.approx(_numbers(first), rel=1e-6)
    assert first.keys() == second.keys() and first.get("confusion_matrix") == second.get("confusion_matrix")


def test_more_can_come_after_a_score() -> None:
    build, outputs, batch = _drawn("one")
    scores = build()
    scores.update(batch, outputs)
    first = scores.compute()
    scores.update(batch, outputs)
    assert _numbers(scores.compute()) == pytest.approx(_numbers(first), rel=1e-6)


def test_a_class_that_the_split_lacks_counts_only_where_it_is_predicted() -> None:
    labels = [0, 0, 1, 1]
    unpredicted = _scores(torch.tensor([[2.0, 0, -9], [2, 0, -9], [0, 2, -9], [2, 0, -9]]), labels)
    assert unpredicted["f1"] == pytest.approx({"class 0": 0.8, "class 1": 2 / 3, "class 2": 0})
    assert unpredicted["f1_macro"] == pytest.approx((0.8 + 2 / 3) / 2), "as scikit-learn: over the classes present"
    assert unpredicted["balanced_accuracy"] == 0.75 and unpredicted["auroc"] == pytest.approx(0.75)
    assert unpredicted["confusion_matrix"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    predicted = _scores(torch.tensor([[2.0, 0, -9], [2, 0, -9], [0, 2, -9], [-9, 0, 2]]), labels)
    assert predicted["f1_macro"] == pytest.approx((1 + 2 / 3 + 0) / 3), "as scikit-learn: a predicted class counts"
    assert predicted["balanced_accuracy"] == 0.75, "a class without rows has no recall"


def test_a_split_of_one_class_has_no_auroc() -> None:
    scores = _scores(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [1, 1])
    assert "auroc" not in scores and scores["accuracy"] == scores["balanced_accuracy"] == 0.5


@pytest.mark.parametrize("right", (True, False))
def test_the_bounds_of_one_class_an_example(right: bool) -> None:
    labels = torch.tensor([0, 1, 2] * 5)
    outputs = 60.0 * F.one_hot(labels if right else (labels + 1) % 3, 3)
    scores = _scores(outputs, labels)
    assert scores["accuracy"] == scores["f1_macro"] == scores["balanced_accuracy"] == float(right)
    assert scores["auroc"] == pytest.approx(1.0 if right else 0.25) and scores["ece"] == pytest.approx(1 - float(right))
    assert scores["loss"] == pytest.approx(0 if right else 60)


def test_one_answer_to_everything() -> None:
    scores = _scores(torch.zeros(10, 4), torch.arange(10) % 4)
    assert scores["auroc"] == 0.5 and scores["loss"] == pytest.approx(math.log(4))
    assert scores["accuracy"] == 0.3 and scores["balanced_accuracy"] == 0.25
    assert scores["ece"] == pytest.approx(0.3 - 0.25)


def test_a_label_neither_true_nor_predicted_scores_zero() -> None:
    labels = torch.tensor([[1, 0, 0], [1, 1, 0]])
    scores = _label_scores(torch.tensor([[3.0, -3, -3], [3, 3, -3]]), labels)
    assert scores["f1"] == {"class 0": 1.0, "class 1": 1.0, "class 2": 0.0}
    assert scores["f1_micro"] == scores["accuracy"] == scores["auroc"] == 1.0 and scores["f1_macro"] == pytest.approx(
        2 / 3
    )


def test_f1_is_zero_without_true_or_predicted_labels() -> None:
    scores = _label_scores(torch.full((3, 2), -5.0), torch.zeros(3, 2))
    assert scores["f1_micro"] == scores["f1_macro"] == 0.0 and scores["accuracy"] == 1.0 and "auroc" not in scores


@pytest.mark.parametrize("value", (0.1, 1e-6, 123456.7))
def test_equal_numbers_have_no_correlation_and_no_variance_to_explain(value: float) -> None:
    assert set(_number_scores([0.1, 0.2, 0.4], [value] * 3)) == {"rmse", "mae", "loss"}
    assert set(_number_scores([value] * 3, [0.1, 0.2, 0.4])) == {"rmse", "mae", "loss", "r2"}
    assert set(_number_scores([value], [value])) == {"rmse", "mae", "loss"}


def test_the_bounds_of_numbers() -> None:
    up = [1.0, 2.0, 3.0, 4.0]
    assert _number_scores(up, up) == pytest.approx(
        {"rmse": 0, "mae": 0, "loss": 0, "r2": 1, "pearson": 1, "spearman": 1}
    )
    down = _number_scores(up[::-1], up)
    assert (down["pearson"], down["spearman"]) == pytest.approx((-1, -1)) and down["r2"] == pytest.approx(-3)
    assert _number_scores([2.5] * 4, up)["r2"] == pytest.approx(0)


def test_many_classes_are_scored_without_a_table_of_each() -> None:
    count = MAX_CLASSES_SHOWN + 1
    outputs = 5.0 * torch.eye(count)
    assert {"f1", "confusion_matrix"}.isdisjoint(_scores(outputs, torch.arange(count)))
    assert "f1" not in _label_scores(outputs - 2, torch.eye(count))
    assert len(_scores(outputs[1:, 1:], torch.arange(count - 1))["confusion_matrix"]) == MAX_CLASSES_SHOWN


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("kind", ("one", "several", "numbers"))
def test_what_is_no_number_is_not_scored(kind: str, bad: float) -> None:
    build, outputs, batch = _drawn(kind)
    outputs[3, 0] = bad
    with pytest.raises(NumericError, match="NaN") as caught:
        build().update(batch, outputs)
    assert caught.value.exit_code == 5


def test_every_score_that_is_shown_is_explained() -> None:
    drawn = torch.Generator().manual_seed(0)
    several = _label_scores(torch.randn(20, 3, generator=drawn), torch.rand(20, 3, generator=drawn) > 0.5)
    every = [_scores(torch.randn(20, 2, generator=drawn), [0, 1] * 10), several, _number_scores([1, 2, 3], [1, 3, 2])]
    others = {"perplexity", "f1", "precision", "recall"}  # of hidden words, of entities
    others |= {"exact_match", "rouge_l", "chrf", "bleu"}  # of texts
    covered = {name for scores in every for name, value in scores.items() if isinstance(value, float)}
    assert covered | others == MEANINGS.keys()
