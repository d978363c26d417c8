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


@pytest.mark.parametrize("split", ("validation", "test"), ids=("a7_72_validation", "a7_73_test"))
def test_a7_72_73_a_label_that_train_does_not_know(split: str, refuse: Refuse, written: Any) -> None:
    other = written([(f"{GOOD} this", "pos"), (f"{BAD} this", "nge")], split)
    said = refuse(_reviews(20), f"data.{split}={other}")
    assert said == f"{split}.jsonl:2: label: 'nge' is not among the 2 classes of the training data; did you mean 'neg'?"
