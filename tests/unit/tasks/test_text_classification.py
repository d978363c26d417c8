"""Text classification: head, loss, weights, windows, predictions; against torch and transformers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith import recipe as recipes
from tunesmith.data.batches import Batch, collate
from tunesmith.data.encoded import Encoded, encode
from tunesmith.data.formats import Row
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe import Data
from tunesmith.tasks import BoundTask
from tunesmith.tasks.text_classification import TextClassification
from tunesmith.testing import tiny_model, tiny_tokenizer
from tunesmith.training import dataset, evaluate

TEXTS = ("the film was great", "bad", "a very very dull plot . not so", "lovely acting and a fine story !")
WORDS = "great lovely warm fine superb bad dull poor cold awful film plot story acting".split()
TOKENIZER = tiny_tokenizer()
CONFIG = tiny_model("bert", "AutoModelForSequenceClassification").config


def _fit(given: Sequence[Any], data: Data | None = None, /, **fields: Any) -> tuple[TextClassification, Data]:
    task = TextClassification(**fields)
    targets = [task.parse_target(Row(f"made-up:{number}", {"label": label})) for number, label in enumerate(given)]
    return task.fit(targets, data or Data(train="made-up", max_length=32))


def _bound(given: Sequence[Any], data: Data | None = None, /, smoothing: float = 0.0, **fields: Any) -> BoundTask:
    task, data = _fit(given, data, **fields)
    return task.bind(TOKENIZER, CONFIG, data, smoothing)


def _predict(bound: BoundTask, outputs: list[list[float]]) -> list[dict[str, Any]]:
    return bound.predict(torch.nn.Identity(), Batch({}, len(outputs)), torch.tensor(outputs))


def _rows(texts: Sequence[Any], labels: Sequence[Any] = ()) -> list[Row]:
    rows = [
        {"text": text} if isinstance(text, str) else dict(zip(("text", "text_pair"), text, strict=True))
        for text in texts
    ]
    rows = [row | ({"label": labels[number]} if len(labels) else {}) for number, row in enumerate(rows)]
    return [Row(f"made-up:{number}", values) for number, values in enumerate(rows)]


def _encode(bound: BoundTask, rows: list[Row], folder: Path) -> Encoded:
    return encode(bound.chunks(rows), bound.encode, folder / "encoded", bound.costs)


def _model(bound: BoundTask) -> PreTrainedModel:
    return tiny_model("bert", bound.task.auto_class, **bound.task.head_config())


def _all(encoded: Encoded) -> Batch:
    return collate(encoded, np.arange(len(encoded)))


@pytest.fixture
def fitted(tmp_path: Path) -> Callable[..., tuple[BoundTask, PreTrainedModel, Encoded]]:
    """`fitted(labels, ...)`: return the bound task, a tiny BERT with its head, and four encoded texts."""

    def build(given: Sequence[Any], data: Data | None = None, /, **fields: Any) -> Any:
        bound = _bound(given, data, **fields)
        encoded = _encode(bound, _rows([TEXTS[n % 4] for n in range(len(given))], given), tmp_path)
        return bound, _model(bound), encoded

    return build


HEADS: dict[str, tuple[list[Any], str, list[str] | None]] = {
    "two words": (["pos", "neg", "pos"], "single_label_classification", ["neg", "pos"]),
    "whole numbers": ([0, 2, 10, 1], "single_label_classification", ["0", "1", "2", "10"]),
    "lists": ([["a"], ["b", "a"], []], "multi_label_classification", ["a", "b"]),
    "eleven fractions": ([n / 4 for n in range(11)], "regression", None),
}


@pytest.mark.parametrize(("labels", "problem", "classes"), HEADS.values(), ids=HEADS)
def test_the_data_make_the_head(labels: list[Any], problem: str, classes: list[str] | None) -> None:
    task, _ = _fit(labels)
    model = tiny_model("bert", task.auto_class, **task.head_config())
    outputs = model(torch.tensor([[2, 5, 3]])).logits
    assert outputs.shape == (1, len(classes or [0])) and model.config.problem_type == problem
    if classes:
        assert [model.config.id2label[n] for n in range(len(classes))] == classes
        assert model.config.label2id == {name: number for number, name in enumerate(classes)}


def test_classes_can_be_named_in_their_order(tmp_path: Path) -> None:
    bound = _bound([2, 0, 1], classes=["2", "1", "0"])
    assert bound.task.head_config()["id2label"] == {0: "2", 1: "1", 2: "0"}
    labels = _encode(bound, _rows(TEXTS[:3], [2, 0, 1]), tmp_path).column("label")
    assert labels.tolist() == [0, 2, 1]


def test_in_a_recipe_classes_may_be_numbers() -> None:
    recipe = recipes.load(None, ("task={name: text-classification, classes: [2, 1.0, true, ' a ']}", "model=tiny"))
    assert recipe.dump()["task"]["classes"] == ["2", "1", "True", "a"]


@pytest.mark.parametrize(
    ("keys", "said"),
    (
        ("classes: [a, b, a]", "classes: 'a'"),
        ("classes: [1, 1.0]", "classes: '1'"),
        ("classes: []", "task.*: classes: "),
        ("classes: [a, b], labels: regression", "task.*: .*regression.*classes"),
    ),
)
def test_classes_that_cannot_be_meant_are_refused(keys: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipes.load(None, (f"task={{name: text-classification, {keys}}}", "model=tiny"))


def test_the_first_rows_of_a_sorted_file_are_refused_with_the_reason(tmp_path: Path) -> None:
    with (path := tmp_path / "sorted.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"text {number}", number // 50] for number in range(100))
    data = Data(train=str(path), validation=0.1, limit=40)
    with pytest.raises(DataError, match=r"sorted\.csv: label: .* 40 rows .*'0'"):
        dataset.read(TextClassification(), data, seed=0)
    assert dataset.read(TextClassification(), data.model_copy(update={"limit": None}), seed=0).rows["train"] == 90


def test_a_validation_label_that_train_lacks_is_refused_by_its_line(tmp_path: Path) -> None:
    for name, labels in (("train", "abab"), ("valid", "abc")):
        rows = [json.dumps({"text": TEXTS[number], "label": label}) for number, label in enumerate(labels)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    data = Data(train=str(tmp_path / "train.jsonl"), validation=str(tmp_path / "valid.jsonl"))
    with pytest.raises(DataError, match=r"valid\.jsonl:3: label: 'c' "):
        dataset.read(TextClassification(), data, seed=0)


LOSSES = {
    "two": ["pos", "neg", "neg", "pos"],
    "many": ["a", "b", "c", "d"],
    "several": [["a"], ["b", "c"], [], ["a", "b", "c"]],
    "number": [0.25, -1.5, 3.75, 0.0],
}


@pytest.mark.parametrize("labels", LOSSES.values(), ids=LOSSES)
def test_the_loss_is_that_of_transformers(labels: list[Any], fitted: Any) -> None:
    bound, model, encoded = fitted(labels, labels="regression" if isinstance(labels[0], float) else "auto")
    batch = _all(encoded)
    ours = bound.loss(model, batch, bound.normalizers(batch))
    inputs = TOKENIZER(list(TEXTS), padding=True, return_tensors="pt")
    label = batch.fields["label"]
    wanted = label if isinstance(label, Tensor) else label.values.view(4, -1)
    theirs = model(**inputs, labels=wanted).loss
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("labels", LOSSES.values(), ids=LOSSES)
def test_micro_batches_add_up_to_the_loss(labels: list[Any], fitted: Any) -> None:
    bound, model, encoded = fitted(labels, labels="regression" if isinstance(labels[0], float) else "auto")
    batch = _all(encoded)
    whole = bound.loss(model, batch, bound.normalizers(batch))
    parts = [collate(encoded, np.array(rows)) for rows in ([0], [1, 2], [3])]
    weight = sum(float(bound.normalizers(part)["weight"]) for part in parts)
    normalizers = {"weight": torch.tensor(weight)}
    torch.testing.assert_close(sum(bound.loss(model, part, normalizers) for part in parts), whole)


LABELS = ["a", "a", "b", "a", "c", "a", "b", "a"]
WEIGHTS = {
    "given": ({"a": 0.5, "b": 3.0}, [0.5, 3.0, 1.0]),
    "balanced": ("balanced", [8 / (3 * 5), 8 / (3 * 2), 8 / (3 * 1)]),
}


@pytest.mark.parametrize(("given", "weights"), WEIGHTS.values(), ids=WEIGHTS)
def test_class_weights_are_those_of_torch(given: Any, weights: list[float], fitted: Any) -> None:
    bound, model, encoded = fitted(LABELS, Data(max_length=32, class_weights=given))
    batch = _all(encoded)
    logits, wanted = bound.outputs(model, batch), batch.tensor("label")
    ours = bound.loss(model, batch, bound.normalizers(batch))
    theirs = F.cross_entropy(logits, wanted, weight=torch.tensor(weights))
    torch.testing.assert_close(ours, theirs)
    gradients = [
        torch.autograd.grad(loss, list(model.classifier.parameters()), retain_graph=True) for loss in (ours, theirs)
    ]
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("smoothing", (0.1, 0.5))
def test_label_smoothing_is_that_of_torch(smoothing: float, fitted: Any) -> None:
    bound, model, encoded = fitted(LOSSES["many"], smoothing=smoothing)
    batch = _all(encoded)
    ours = bound.loss(model, batch, bound.normalizers(batch))
    theirs = F.cross_entropy(bound.outputs(model, batch), batch.tensor("label"), label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)


def test_label_smoothing_of_several_labels_goes_half_way_to_undecided(fitted: Any) -> None:
    bound, model, encoded = fitted(LOSSES["several"], smoothing=0.1)
    batch = _all(encoded)
    wanted = torch.tensor([[0.95, 0.05, 0.05], [0.05, 0.95, 0.95], [0.05] * 3, [0.95] * 3])
    theirs = F.binary_cross_entropy_with_logits(bound.outputs(model, batch), wanted)
    torch.testing.assert_close(bound.loss(model, batch, bound.normalizers(batch)), theirs)


def test_label_smoothing_of_numbers_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"train\.label_smoothing: "):
        _bound(LOSSES["number"], labels="regression", smoothing=0.1)


LONG = [
    " ".join(WORDS[(start + step) % len(WORDS)] for step in range(length))
    for start, length in enumerate((3, 14, 15, 40))
]
"""Texts of 5, 16, 17 and 42 tokens, special tokens included."""


def test_a_document_answers_with_the_mean_of_its_windows(tmp_path: Path) -> None:
    bound = _bound("abc", Data(max_length=16), windows=3)
    model = _model(bound)
    encoded = _encode(bound, _rows(LONG, "abca"), tmp_path)
    batch = _all(encoded)
    means = []
    for text in LONG:
        inside = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        windows = [[2, *inside[start : start + 14], 3] for start in range(0, len(inside), 14)]
        means.append(torch.cat([model(torch.tensor([window])).logits for window in windows]).mean(0))
    by_hand = torch.stack(means)
    torch.testing.assert_close(bound.outputs(model, batch), by_hand, atol=1e-5, rtol=1e-5)
    loss = bound.loss(model, batch, bound.normalizers(batch))
    torch.testing.assert_close(loss, F.cross_entropy(by_hand, torch.tensor([0, 1, 2, 0])))


def test_pairs_are_read_as_the_model_was_made_to(tmp_path: Path) -> None:
    bound = _bound("ab")
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    model = _model(bound)
    batch = _all(_encode(bound, _rows(pairs), tmp_path))
    inputs = TOKENIZER(list(TEXTS), list(TEXTS[::-1]), padding=True, return_tensors="pt")
    torch.testing.assert_close(bound.outputs(model, batch), model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_what_is_cut_is_counted_in_windows_of_the_task(tmp_path: Path) -> None:
    bound = _bound("ab", Data(max_length=16), windows=2)
    encoded = _encode(bound, _rows(LONG, "abab"), tmp_path)
    (note,) = bound.notes(encoded)
    assert note.startswith("1 of 4 texts ") and "task.windows" in note
    assert encoded.costs.tolist() == [5, 16, 16 + 3, 2 * 16], "tokens of all windows"


def test_one_class_is_answered_with_every_probability() -> None:
    (answer,) = _predict(_bound("abc"), [[0.0, 2.0, 1.0]])
    assert list(answer) == ["label", "score", "probabilities"] and list(answer["probabilities"]) == ["a", "b", "c"]
    wanted = torch.tensor([0.0, 2.0, 1.0]).softmax(0).tolist()
    assert list(answer["probabilities"].values()) == pytest.approx(wanted) and sum(wanted) == pytest.approx(1)
    assert answer["label"] == "b" and answer["score"] == answer["probabilities"]["b"]


def test_several_labels_are_answered_above_a_half() -> None:
    first, none = _predict(_bound([["a"], ["b"], ["c"]]), [[1.0, 0.0, 0.1], [-1.0, -2.0, -3.0]])
    assert first["labels"] == ["a", "c"] and none["labels"] == []
    assert first["probabilities"] == pytest.approx({"a": 0.7310586, "b": 0.5, "c": 0.5249792})


def test_numbers_are_answered_as_they_are() -> None:
    answers = _predict(_bound([n / 4 for n in range(11)]), [[0.5], [-2.0]])
    assert answers == [{"value": 0.5}, {"value": -2.0}] and json.dumps(answers)


@pytest.mark.parametrize(
    ("labels", "prior", "metric"),
    (
        (["a", "b", "b", "b"], torch.tensor([0.25, 0.75]).log(), "accuracy"),
        ([["a"], ["b"], ["a", "b"], ["a"]], torch.logit(torch.tensor([0.75, 0.5])), "f1_micro"),
        ([0.5, 1.0, 1.5, 4.0], torch.tensor([1.75]), "rmse"),
    ),
    ids=("one", "several", "number"),
)
def test_the_baseline_is_fitted_on_the_training_labels(labels: Any, prior: Tensor, metric: str, fitted: Any) -> None:
    bound, _, encoded = fitted(labels, labels="regression" if isinstance(labels[0], float) else "auto")
    batch = collate(encoded, np.array([2, 0]))
    torch.testing.assert_close(bound.baseline(encoded)(batch), torch.stack([prior, prior]))
    assert metric == bound.metrics().primary and metric in evaluate.baseline(bound, encoded, encoded)


def test_an_answer_is_rendered_on_one_line_and_a_wrong_one_is_told() -> None:
    task, _ = _fit("abc")
    right, wrong = _predict(_bound("abc"), [[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    assert task.render(right, Row("a:1", {})) == f"b  {right['score']:.3f}"
    assert task.mistake(right, "b") is None
    assert task.mistake(wrong, "c") == ("c", "a", wrong["score"])


def test_a_preview_has_the_tokens_of_each_window_and_the_label(tmp_path: Path) -> None:
    bound = _bound("ab", Data(max_length=16), windows=2)
    short, long = (bound.preview(fields) for fields in bound.encode(_rows([LONG[0], LONG[3]], "ab")))
    assert (short.target, short.cut, long.target, long.cut) == ("a", False, "b", True)
    assert [token.text for window in short.windows for token in window] == ["[CLS]", *LONG[0].split(), "[SEP]"]
    assert [token.special for token in short.windows[0]] == [True, False, False, False, True]
    assert [len(window) for window in long.windows] == [16, 16]
    assert bound.preview(bound.encode(_rows([LONG[0]]))[0]).target is None


def test_an_input_is_a_row_without_its_label() -> None:
    (row,) = _rows([("a", "b")], ["c"])
    assert _bound("cd").as_prompt(row) == Row(row.place, {"text": "a", "text_pair": "b"})


def test_inspection_counts_tokens_and_the_limit_of_all_windows() -> None:
    found = _bound("ab", Data(max_length=16), windows=2).inspect(_rows([LONG[0], "zq zq", ("bad", "great")], "aba"))
    assert found is not None and found.sizes == [5, 4, 5] and found.unknown == [0, 2, 0]
    assert found.limit == 2 + 2 * 14 and found.faults == []


def test_splits_keep_the_shares_of_classes_and_of_combinations() -> None:
    task, _ = _fit("abab")
    assert task.strata(["b", "a", "b"]) == [0, 1, 0]
    several, _ = _fit([["a"], ["b"]])
    assert several.strata([("a",), ("a", "b"), ("a",), ()]) == [0, 1, 0, 2]
    assert TextClassification(labels="regression").strata([1.0, 2.0]) is None
