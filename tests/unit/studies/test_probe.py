"""The linear probe equals scikit-learn on the base model's mean hidden states, for every kind of label."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoModelForMaskedLM

import tunesmith
from tunesmith.console import Console
from tunesmith.studies import probe
from tunesmith.testing import sample_row, tiny_tokenizer

MOODS: dict[str, Callable[[int], Any]] = {
    "one": lambda n: ("neg", "pos", "odd")[2 if n % 7 == 0 else n % 2],
    "several": lambda n: ["film", *(["pos"] if n % 2 else []), *(["odd"] if n % 3 == 0 else [])],
    "only one": lambda n: ["pos"] if n % 2 else [],
    "number": lambda n: (n % 2) + n / 100,
}


@pytest.fixture
def probed(recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`probed("one")`: return the scores on the test rows, and the rows of both splits; on a CPU without bf16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    def run(kind: str, **keys: Any) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
        rows = {"train": range(60), "test": range(60, 90)}
        found = {
            split: [sample_row("text-classification", n) | {"label": MOODS[kind](n)} for n in numbers]
            for split, numbers in rows.items()
        }
        for split, lines in found.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
        data = {"train": str(tmp_path / "train.jsonl"), "validation": None, "test": str(tmp_path / "test.jsonl")}
        task = {"name": "text-classification", **({"labels": "regression"} if kind == "number" else {})}
        recipe = recipe_of("train.max_steps=1", "train.epochs=null", data=data, task=task, **keys)
        tunesmith.train(recipe, console=Console(level=-1))
        return tunesmith.evaluate(tmp_path / "run", base=True)["metrics"], found

    return run


def _features(base: Path, rows: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """Return the mean of the last hidden states of each text, computed one at a time."""
    model, tokenizer = AutoModel.from_pretrained(base, add_pooling_layer=False).eval(), tiny_tokenizer()
    with torch.no_grad():
        means = [
            model(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state[0].float().mean(0) for row in rows
        ]
    return torch.stack(means).numpy()


def _by_hand(base: Path, rows: dict[str, list[dict[str, Any]]]) -> tuple[Any, Any]:
    train, test = (_features(base, rows[split]) for split in ("train", "test"))
    scale = StandardScaler().fit(train)
    return scale.transform(train), scale.transform(test)


def test_one_class_a_text(probed: Any, tiny_bert: Path) -> None:
    scores, rows = probed("one")
    train, test = _by_hand(tiny_bert, rows)
    fitted = LogisticRegression(max_iter=2000, C=0.1).fit(train, [row["label"] for row in rows["train"]])
    labels = [row["label"] for row in rows["test"]]
    assert scores["accuracy"] == pytest.approx(fitted.score(test, labels))
    chance = fitted.predict_proba(test)[range(len(labels)), [list(fitted.classes_).index(label) for label in labels]]
    assert scores["loss"] == pytest.approx(-np.log(chance).mean(), rel=1e-3)


def test_several_labels_a_text(probed: Any, tiny_bert: Path) -> None:
    scores, rows = probed("several")
    train, test = _by_hand(tiny_bert, rows)
    right = np.ones(len(test), dtype=bool)
    for name in ("pos", "odd"):
        fitted = LogisticRegression(max_iter=2000, C=0.1).fit(train, [name in row["label"] for row in rows["train"]])
        right &= fitted.predict(test) == [name in row["label"] for row in rows["test"]]
    assert scores["f1"]["film"] == 1.0, "of a label that is always there, its frequency"
    assert scores["accuracy"] == pytest.approx(right.mean())


def test_a_single_label_that_is_there_or_not(probed: Any, tiny_bert: Path) -> None:
    scores, rows = probed("only one")
    train, test = _by_hand(tiny_bert, rows)
    fitted = LogisticRegression(max_iter=2000, C=0.1).fit(train, [bool(row["label"]) for row in rows["train"]])
    assert scores["accuracy"] == pytest.approx(fitted.score(test, [bool(row["label"]) for row in rows["test"]]))
    assert set(scores["f1"]) == {"pos"} and scores["accuracy"] > 0.6, "what the words say is in the features"


def test_a_number_a_text(probed: Any, tiny_bert: Path) -> None:
    scores, rows = probed("number")
    train, test = _by_hand(tiny_bert, rows)
    fitted = Ridge(alpha=1.0).fit(train, [row["label"] for row in rows["train"]])
    off = fitted.predict(test) - [row["label"] for row in rows["test"]]
    assert scores["rmse"] == pytest.approx(np.sqrt((off**2).mean()), rel=1e-3)


def test_a_base_in_bf16_is_probed_too(probed: Any, tiny_bert: Path, tmp_path: Path) -> None:
    base = AutoModelForMaskedLM.from_pretrained(tiny_bert).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rounded, rows = probed("number", model=str(tmp_path / "base"))
    train, test = _by_hand(tiny_bert, rows)
    fitted = Ridge(alpha=1.0).fit(train, [row["label"] for row in rows["train"]])
    off = fitted.predict(test) - [row["label"] for row in rows["test"]]
    assert rounded["rmse"] == pytest.approx(np.sqrt((off**2).mean()), rel=0.05)


def test_a_tag_a_word(recipe_of: Any, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return the hidden state of each word; every word of the tiny model is a single token."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    rows = [sample_row("token-classification", n) for n in range(60)]
    for split, some in (("train", rows[:40]), ("test", rows[40:])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    data = {"train": str(tmp_path / "train.jsonl"), "validation": None, "test": str(tmp_path / "test.jsonl")}
    recipe = recipe_of("train.max_steps=1", "train.epochs=null", data=data, task="token-classification")
    tunesmith.train(recipe, console=Console(level=-1))
    scores = tunesmith.evaluate(tmp_path / "run", base=True)["metrics"]
    model, tokenizer = AutoModel.from_pretrained(tiny_bert, add_pooling_layer=False).eval(), tiny_tokenizer()
    states, tags = [], []
    for row in rows:
        with torch.no_grad():
            coded = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
            states.append(model(**coded).last_hidden_state[0, 1:-1].numpy())
        tags.append(row["label"])
    known, asked = np.concatenate(states[:40]), np.concatenate(states[40:])
    scale = StandardScaler().fit(known)
    fitted = LogisticRegression(max_iter=2000, C=0.1).fit(scale.transform(known), sum(tags[:40], []))
    assert scores["accuracy"] == pytest.approx(fitted.score(scale.transform(asked), sum(tags[40:], [])))
    assert set(scores["entities"]) == {"BLAME", "PRAISE"}


@pytest.mark.parametrize("most", (1, 3))
def test_of_many_rows_some_are_drawn_which_may_lack_a_class(
    most: int, probed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "MAX_ROWS", most)
    scores, rows = probed("one")
    drawn = {MOODS["one"](int(number)) for number in np.random.default_rng(0).permutation(60)[:most]}
    said = {
        name for name, column in zip(scores["f1"], np.array(scores["confusion_matrix"]).T, strict=True) if column.any()
    }
    assert len(drawn) < 3 and (said <= drawn if most > 1 else len(said) == 1)
    if most == 1:  # constant features: the prediction is the majority class of train
        labels = [row["label"] for row in rows["train"]]
        assert said == {max(set(labels), key=labels.count)}
