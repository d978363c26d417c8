"""What labels make of the task: head, loss, weights, windows, answers; against torch and transformers."""

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
from tunesmith.tasks.text_classification import TextClassification
from tunesmith.testing import tiny_model, tiny_tokenizer
from tunesmith.training import evaluate, examples

TEXTS = ("the film was great", "bad", "a very very dull plot . not so", "lovely acting and a fine story !")
WORDS = "great lovely warm fine superb bad dull poor cold awful film plot story acting".split()
TOKENIZER = tiny_tokenizer()
NO_BATCH = Batch({}, 0, 0)


def _fit(given: Sequence[Any], data: Data | None = None, /, **fields: Any) -> tuple[TextClassification, Data]:
    task = TextClassification(**fields)
    targets = [task.target(Row(f"made-up:{number}", {"label": label})) for number, label in enumerate(given)]
    return task.fit(targets, data or Data(max_length=32), "made-up")


def _rows(texts: Sequence[Any], labels: Sequence[Any] = ()) -> list[Row]:
    rows = [
        {"text": text} if isinstance(text, str) else dict(zip(("text", "text_pair"), text, strict=True))
        for text in texts
    ]
    rows = [row | ({"label": labels[number]} if len(labels) else {}) for number, row in enumerate(rows)]
    return [Row(f"made-up:{number}", values) for number, values in enumerate(rows)]


def _encode(task: TextClassification, rows: list[Row], data: Data, folder: Path) -> Encoded:
    return encode(rows, lambda part: task.encode(part, TOKENIZER, data), folder / "encoded")


def _all(encoded: Encoded) -> Batch:
    return collate(encoded, np.arange(len(encoded)))


@pytest.fixture
def fitted(tmp_path: Path) -> Callable[..., tuple[TextClassification, PreTrainedModel, Encoded]]:
    """`fitted(labels, ...)`: task, tiny BERT with its head, and the four texts encoded with these labels in turn."""

    def build(given: Sequence[Any], data: Data | None = None, /, **fields: Any) -> Any:
        task, data = _fit(given, data, **fields)
        encoded = _encode(task, _rows([TEXTS[n % 4] for n in range(len(given))], given), data, tmp_path)
        return task, tiny_model("bert", task.model_class, **task.head_config()), encoded

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
    model = tiny_model("bert", task.model_class, **task.head_config())
    outputs = model(torch.tensor([[2, 5, 3]])).logits
    assert outputs.shape == (1, len(classes or [0])) and model.config.problem_type == problem
    if classes:
        assert [model.config.id2label[n] for n in range(len(classes))] == classes
        assert model.config.label2id == {name: number for number, name in enumerate(classes)}


def test_classes_can_be_named_in_their_order(tmp_path: Path) -> None:
    task, data = _fit([2, 0, 1], classes=["2", "1", "0"])
    assert task.head_config()["id2label"] == {0: "2", 1: "1", 2: "0"}
    labels = _encode(task, _rows(TEXTS[:3], [2, 0, 1]), data, tmp_path).column("label")
    assert labels.tolist() == [0, 2, 1]


def test_in_a_recipe_classes_may_be_numbers() -> None:
    recipe = recipes.load(None, ("task={name: text-classification, classes: [2, 1.0, true, ' a ']}", "model=tiny"))
    assert recipe.dump()["task"]["classes"] == ["2", "1", "True", "a"]


@pytest.mark.parametrize(
    ("keys", "said"),
    (
        ("classes: [a, b, a]", "classes: 'a' is given twice"),
        ("classes: [1, 1.0]", "classes: '1' is given twice"),
        ("classes: []", "classes: there is none"),
        ("classes: [a, b], labels: regression", "a regression has no classes"),
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
    with pytest.raises(DataError, match="every one of the 40 rows is labelled '0'.*sorted file.*shuffle it"):
        examples.read(TextClassification(), data, seed=0)
    assert examples.read(TextClassification(), data.model_copy(update={"limit": None}), seed=0).rows["train"] == 90


def test_a_validation_label_that_train_lacks_is_refused_by_its_line(tmp_path: Path) -> None:
    for name, labels in (("train", "abab"), ("valid", "abc")):
        rows = [json.dumps({"text": TEXTS[number], "label": label}) for number, label in enumerate(labels)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    data = Data(train=str(tmp_path / "train.jsonl"), validation=str(tmp_path / "valid.jsonl"))
    with pytest.raises(DataError, match="valid.jsonl:3: label: 'c' is none of the 2 classes that are learned"):
        examples.read(TextClassification(), data, seed=0)


LOSSES = {
    "two": ["pos", "neg", "neg", "pos"],
    "many": ["a", "b", "c", "d"],
    "several": [["a"], ["b", "c"], [], ["a", "b", "c"]],
    "number": [0.25, -1.5, 3.75, 0.0],
}


@pytest.mark.parametrize("labels", LOSSES.values(), ids=LOSSES)
def test_the_loss_is_that_of_transformers(labels: list[Any], fitted: Any) -> None:
    task, model, encoded = fitted(labels, labels="regression" if isinstance(labels[0], float) else "auto")
    batch = _all(encoded)
    ours = task.loss(model, batch, task.normalizers(batch))
    inputs = TOKENIZER(list(TEXTS), padding=True, return_tensors="pt")
    label = batch.fields["label"]
    wanted = label if isinstance(label, Tensor) else label.values.view(4, -1)
    theirs = model(**inputs, labels=wanted).loss
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("labels", LOSSES.values(), ids=LOSSES)
def test_micro_batches_add_up_to_the_loss(labels: list[Any], fitted: Any) -> None:
    task, model, encoded = fitted(labels, labels="regression" if isinstance(labels[0], float) else "auto")
    batch = _all(encoded)
    whole = task.loss(model, batch, task.normalizers(batch))
    parts = [collate(encoded, np.array(rows)) for rows in ([0], [1, 2], [3])]
    weight = sum(float(task.normalizers(part)["weight"]) for part in parts)
    normalizers = {"weight": torch.tensor(weight)}
    torch.testing.assert_close(sum(task.loss(model, part, normalizers) for part in parts), whole)


LABELS = ["a", "a", "b", "a", "c", "a", "b", "a"]
WEIGHTS = {
    "given": ({"a": 0.5, "b": 3.0}, [0.5, 3.0, 1.0]),
    "balanced": ("balanced", [8 / (3 * 5), 8 / (3 * 2), 8 / (3 * 1)]),
}


@pytest.mark.parametrize(("given", "weights"), WEIGHTS.values(), ids=WEIGHTS)
def test_class_weights_are_those_of_torch(given: Any, weights: list[float], fitted: Any) -> None:
    task, model, encoded = fitted(LABELS, Data(max_length=32, class_weights=given))
    batch = _all(encoded)
    logits, wanted = task.forward(model, batch), batch.scalar("label")
    ours = task.loss(model, batch, task.normalizers(batch))
    theirs = F.cross_entropy(logits, wanted, weight=torch.tensor(weights))
    torch.testing.assert_close(ours, theirs)
    gradients = [
        torch.autograd.grad(loss, list(model.classifier.parameters()), retain_graph=True) for loss in (ours, theirs)
    ]
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("smoothing", (0.1, 0.5))
def test_label_smoothing_is_that_of_torch(smoothing: float, fitted: Any) -> None:
    task, model, encoded = fitted(LOSSES["many"])
    batch = _all(encoded)
    ours = task.loss(model, batch, task.normalizers(batch), smoothing)
    theirs = F.cross_entropy(task.forward(model, batch), batch.scalar("label"), label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)


def test_label_smoothing_of_several_labels_goes_half_way_to_undecided(fitted: Any) -> None:
    task, model, encoded = fitted(LOSSES["several"])
    batch = _all(encoded)
    wanted = torch.tensor([[0.95, 0.05, 0.05], [0.05, 0.95, 0.95], [0.05] * 3, [0.95] * 3])
    theirs = F.binary_cross_entropy_with_logits(task.forward(model, batch), wanted)
    torch.testing.assert_close(task.loss(model, batch, task.normalizers(batch), 0.1), theirs)


def test_label_smoothing_of_numbers_is_refused(fitted: Any) -> None:
    task, model, encoded = fitted(LOSSES["number"], labels="regression")
    with pytest.raises(RecipeError, match="train.label_smoothing: a regression has no classes"):
        task.loss(model, _all(encoded), {"weight": torch.tensor(4.0)}, 0.1)


LONG = [
    " ".join(WORDS[(start + step) % len(WORDS)] for step in range(length))
    for start, length in enumerate((3, 14, 15, 40))
]
"""Of 5, 16, 17 and 42 tokens with the two special ones."""


def test_a_document_answers_with_the_mean_of_its_windows(tmp_path: Path) -> None:
    task, data = _fit("abc", Data(max_length=16), windows=3)
    model = tiny_model("bert", task.model_class, **task.head_config())
    encoded = _encode(task, _rows(LONG, "abca"), data, tmp_path)
    batch = _all(encoded)
    means = []
    for text in LONG:
        inside = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        windows = [[2, *inside[start : start + 14], 3] for start in range(0, len(inside), 14)]
        means.append(torch.cat([model(torch.tensor([window])).logits for window in windows]).mean(0))
    by_hand = torch.stack(means)
    torch.testing.assert_close(task.forward(model, batch), by_hand, atol=1e-5, rtol=1e-5)
    loss = task.loss(model, batch, task.normalizers(batch))
    torch.testing.assert_close(loss, F.cross_entropy(by_hand, torch.tensor([0, 1, 2, 0])))


def test_pairs_are_read_as_the_model_was_made_to(tmp_path: Path) -> None:
    task, data = _fit("ab")
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    model = tiny_model("bert", task.model_class, **task.head_config())
    batch = _all(_encode(task, _rows(pairs), data, tmp_path))
    inputs = TOKENIZER(list(TEXTS), list(TEXTS[::-1]), padding=True, return_tensors="pt")
    torch.testing.assert_close(task.forward(model, batch), model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_what_is_cut_is_counted_in_windows_of_the_task(tmp_path: Path) -> None:
    task, data = _fit("ab", Data(max_length=16), windows=2)
    encoded = _encode(task, _rows(LONG, "abab"), data, tmp_path)
    note = "1 of 4 texts are truncated (raise task.windows to read more)"
    assert task.notes(encoded, TOKENIZER) == [note]


def test_one_class_is_answered_with_every_probability() -> None:
    task, _ = _fit("abc")
    (answer,) = task.answers(torch.tensor([[0.0, 2.0, 1.0]]), NO_BATCH)
    assert list(answer) == ["label", "score", "probabilities"] and list(answer["probabilities"]) == ["a", "b", "c"]
    wanted = torch.tensor([0.0, 2.0, 1.0]).softmax(0).tolist()
    assert list(answer["probabilities"].values()) == pytest.approx(wanted) and sum(wanted) == pytest.approx(1)
    assert answer["label"] == "b" and answer["score"] == answer["probabilities"]["b"]


def test_several_labels_are_answered_above_a_half() -> None:
    task, _ = _fit([["a"], ["b"], ["c"]])
    first, none = task.answers(torch.tensor([[1.0, 0.0, 0.1], [-1.0, -2.0, -3.0]]), NO_BATCH)
    assert first["labels"] == ["a", "c"] and none["labels"] == []
    assert first["probabilities"] == pytest.approx({"a": 0.7310586, "b": 0.5, "c": 0.5249792})


def test_numbers_are_answered_as_they_are() -> None:
    task, _ = _fit([n / 4 for n in range(11)])
    answers = task.answers(torch.tensor([[0.5], [-2.0]]), NO_BATCH)
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
def test_the_guess_beside_a_score_knows_the_training_labels(
    labels: Any, prior: Tensor, metric: str, fitted: Any
) -> None:
    task, _, encoded = fitted(labels, labels="regression" if isinstance(labels[0], float) else "auto")
    torch.testing.assert_close(task.prior(encoded), prior)
    assert metric == task.metric() and metric in evaluate.baseline(task, encoded, encoded)


def test_splits_keep_the_shares_of_classes_and_of_combinations() -> None:
    task, _ = _fit("abab")
    assert task.strata(["b", "a", "b"]) == [0, 1, 0]
    several, _ = _fit([["a"], ["b"]])
    assert several.strata([("a",), ("a", "b"), ("a",), ()]) == [0, 1, 0, 2]
    assert TextClassification(labels="regression").strata([1.0, 2.0]) is None
