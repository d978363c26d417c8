"""Bad inputs 69-80, 99-100 and 140: each is taken and works, is taken with a note, or is refused by file and row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.encoded import Encoded
from tunesmith.recipe import Data
from tunesmith.tasks.text_classification import TextClassification
from tunesmith.testing import tiny_tokenizer
from tunesmith.training import examples
from tunesmith.training.examples import Examples

Rows = Iterable[tuple[object, object]]
Refuse = Callable[..., str]
GOOD, BAD = "the film was great", "the film was bad"


def _reviews(count: int) -> list[tuple[object, object]]:
    """Texts that all differ, two classes in turn."""
    return [(f"{(GOOD, BAD)[n % 2]} {'very ' * (n // 2)}.", ("pos", "neg")[n % 2]) for n in range(count)]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """`written(rows, "train")`: the rows in a file, one JSON object a line, so that a row's number is its line."""

    def write(rows: Rows, name: str = "train") -> str:
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
        return str(tmp_path / f"{name}.jsonl")

    return write


@pytest.fixture
def refuse(command: Any, tiny_bert: Path, written: Any, tmp_path: Path) -> Refuse:
    """What `tunesmith train` says when it stops at these rows: one line, with exit code 3."""

    def said(rows: Rows, *words: str) -> str:
        given = ("task=text-classification", f"model={tiny_bert}", f"data.train={written(rows)}", "device=cpu")
        code, out, err = command("train", *given, f"output={tmp_path / 'run'}", *words)
        line = err.splitlines()[-1].removeprefix("error: ")
        assert code == 3 and out == "" and "error: " not in line, err
        assert len(line.replace(str(tmp_path), "")) < 300, "values are shortened"
        return line.replace(f"{tmp_path}/", "")

    return said


def _read(path: str, *, labels: str = "auto", **data: Any) -> Examples:
    task = TextClassification(labels=labels)  # type: ignore[arg-type]
    return examples.read(task, Data(**{"train": path, "validation": None, "max_length": 64} | data), seed=0)


def _encode(read: Examples, folder: Path) -> dict[str, Encoded]:
    return examples.encode_splits(read, tiny_tokenizer(), "tiny", folder)


def test_a7_69_one_class_only(refuse: Refuse) -> None:
    said = refuse([(text, "pos") for text, _ in _reviews(20)])
    assert said.startswith("train.jsonl: label: every one of the 20 rows is labelled 'pos'") and "shuffle it" in said


def test_a7_70_a_class_of_one_row_stays_in_train_and_that_is_said(written: Any) -> None:
    read = _read(written([*_reviews(40), ("the plot was very poor", "odd")]), validation=0.2)
    labels = [row.values["label"] for row in read.splits["train"].rows()]
    assert labels.count("odd") == 1 and read.rows == {"train": 33, "validation": 8}
    assert read.notes == ["1 class has a single row, which stays in train where no score sees it: 'odd'"]


def test_a7_71_ten_thousand_classes_are_identifiers(refuse: Refuse) -> None:
    said = refuse((f"{GOOD} {n}", f"id-{n}") for n in range(10_000))
    assert said == "train.jsonl: label: 10000 classes in 10000 rows look like identifiers; set data.columns.label"


@pytest.mark.parametrize("split", ("validation", "test"), ids=("a7_72", "a7_73"))
def test_a7_72_and_73_a_label_that_train_lacks_is_refused_before_a_model_is_sought(
    split: str, refuse: Refuse, written: Any
) -> None:
    other = written([(f"{GOOD} this", "pos"), (f"{BAD} this", "nge")], split)
    said = refuse(_reviews(20), f"data.{split}={other}", "model=./none")
    what = "label: 'nge' is none of the 2 classes that are learned; did you mean 'neg'?"
    assert said == f"{split}.jsonl:2: {what}"


def test_a7_72_such_a_row_can_be_skipped(written: Any) -> None:
    valid = written([(f"{GOOD} this", "pos"), (f"{BAD} this", "nge")], "valid")
    read = _read(written(_reviews(20)), validation=valid, on_bad_row="skip")
    assert read.rows == {"train": 20, "validation": 1}
    assert read.notes == ["validation: skipped 1 rows (unusable label)"]


def test_a7_72_a_row_outside_the_classes_of_the_recipe_is_refused(refuse: Refuse) -> None:
    said = refuse([*_reviews(20), (GOOD, "meh")], "task.classes=[neg, pos]")
    assert said.startswith("train.jsonl:21: label: 'meh' is none of the 2 classes")


def test_a7_74_joined_labels_beside_single_ones_are_refused(refuse: Refuse) -> None:
    said = refuse([*_reviews(20), ("so so", "pos;neg")])
    assert said.startswith("train.jsonl: label: 'pos;neg' joins classes that also stand alone; set task.labels=multi")


def test_a7_74_joined_labels_can_be_meant_either_way(written: Any) -> None:
    path = written([*_reviews(20), ("so so", "pos;neg")])
    assert _read(path, labels="single").task.classes == ["neg", "pos", "pos;neg"]  # type: ignore[attr-defined]
    assert _read(path, labels="multi").task.classes == ["neg", "pos"]  # type: ignore[attr-defined]


def test_a7_74_lists_beside_texts_are_several_labels_each(written: Any, tmp_path: Path) -> None:
    rows = [(GOOD, ["pos"]), (BAD, "neg"), ("so so", ["neg", "pos"]), ("not so", "pos;neg"), ("so", "1.0")]
    read = _read(written(rows))
    labels = _encode(read, tmp_path)["train"].column("label").reshape(-1, 3)
    assert read.task.labels == "multi" and read.task.classes == ["1", "neg", "pos"]  # type: ignore[attr-defined]
    assert labels.tolist() == [[0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 1, 1], [1, 0, 0]]


def test_a7_74_a_list_where_one_class_is_asked_for_is_refused(refuse: Refuse) -> None:
    said = refuse([*_reviews(20), (GOOD, ["pos", "neg"])], "task.labels=single")
    assert said.startswith("train.jsonl:21: label: '['pos', 'neg']' is a list")


def test_a7_75_a_list_written_as_text_is_refused(refuse: Refuse) -> None:
    said = refuse([*_reviews(4), (GOOD, "['pos', 'neg']")])
    assert said == "train.jsonl:5: label: '['pos', 'neg']' is a list written as text; set task.labels=multi"


def test_a7_75_a_list_written_as_text_is_read_where_several_labels_are_asked_for(written: Any) -> None:
    read = _read(written([*_reviews(4), (GOOD, "['pos', 'neg']")]), labels="multi")
    assert read.task.classes == ["neg", "pos"]  # type: ignore[attr-defined]
