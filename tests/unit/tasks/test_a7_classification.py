"""Bad inputs 69-80, 99-100 and 140: each is read, read with a note, or refused with file and row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from messages import has_parts

from tunesmith.data.encoded import Encoded
from tunesmith.data.formats import Row
from tunesmith.recipe import Data
from tunesmith.tasks import BoundTask
from tunesmith.tasks.text_classification import TextClassification
from tunesmith.testing import tiny_model, tiny_tokenizer
from tunesmith.training import dataset
from tunesmith.training.dataset import Examples

Rows = Iterable[tuple[object, object]]
Refuse = Callable[..., str]
GOOD, BAD = "the film was great", "the film was bad"


def _reviews(count: int) -> list[tuple[object, object]]:
    """Return distinct texts of two alternating classes."""
    return [(f"{(GOOD, BAD)[n % 2]} {'very ' * (n // 2)}.", ("pos", "neg")[n % 2]) for n in range(count)]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """`written(rows, "train")`: write the rows to a JSONL file; a row's number is its line."""

    def write(rows: Rows, name: str = "train") -> str:
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
        return str(tmp_path / f"{name}.jsonl")

    return write


@pytest.fixture
def refuse(command: Any, tiny_bert: Path, written: Any, tmp_path: Path) -> Refuse:
    """Return the one-line error of `tunesmith train` for these rows (exit code 3)."""

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
    return dataset.read(task, Data(**{"train": path, "validation": None, "max_length": 64} | data), seed=0)


def _bind(read: Examples) -> BoundTask:
    return read.task.bind(tiny_tokenizer(), tiny_model("bert", read.task.auto_class).config, read.data)


def _encode(read: Examples, folder: Path) -> dict[str, Encoded]:
    return dataset.encode_splits(read, _bind(read), "tiny", folder)


def test_a7_69_one_class_only(refuse: Refuse) -> None:
    said = refuse([(text, "pos") for text, _ in _reviews(20)])
    assert has_parts(said, "train.jsonl: label: ", "20", "'pos'") and "; " in said


def test_a7_70_a_class_of_one_row_stays_in_train_and_that_is_said(written: Any) -> None:
    read = _read(written([*_reviews(40), ("the plot was very poor", "odd")]), validation=0.2)
    labels = [row.values["label"] for row in read.splits["train"].rows()]
    assert labels.count("odd") == 1 and read.rows == {"train": 33, "validation": 8}
    (note,) = read.notes
    assert has_parts(note, "1 class ", "train", "'odd'")


def test_a7_71_ten_thousand_classes_are_identifiers(refuse: Refuse) -> None:
    said = refuse((f"{GOOD} {n}", f"id-{n}") for n in range(10_000))
    assert has_parts(said, "train.jsonl: label: 10000 ", "10000 rows", "; ", "data.columns.label")


def test_a7_71_texts_and_labels_in_each_others_column_are_told(refuse: Refuse, written: Any) -> None:
    said = refuse((label, f"{text} {n}") for n, (text, label) in enumerate(_reviews(30)))
    what, _, fix = said.partition("; ")
    assert re.findall(r"\d+", what) == ["30", "30", "2"] and what.startswith("train.jsonl: label: ")
    assert fix == "data.columns.text=label data.columns.label=text"
    numbers = written((text, n / 7) for n, (text, _) in enumerate(_reviews(30)[:4] * 8))
    assert _read(numbers).task.labels == "regression"  # type: ignore[attr-defined]


@pytest.mark.parametrize("split", ("validation", "test"), ids=("a7_72", "a7_73"))
def test_a7_72_and_73_a_label_that_train_lacks_is_refused_before_a_model_is_sought(
    split: str, refuse: Refuse, written: Any
) -> None:
    other = written([(f"{GOOD} this", "pos"), (f"{BAD} this", "nge")], split)
    said = refuse(_reviews(20), f"data.{split}={other}", "model=./none")
    assert has_parts(said, f"{split}.jsonl:2: label: 'nge' ", "2 classes", "; ", "'neg'")


def test_a7_72_such_a_row_can_be_skipped(written: Any) -> None:
    valid = written([(f"{GOOD} this", "pos"), (f"{BAD} this", "nge")], "valid")
    read = _read(written(_reviews(20)), validation=valid, on_bad_row="skip")
    assert read.rows == {"train": 20, "validation": 1}
    assert read.notes == ["validation: skipped 1 row (unusable label)"]


def test_a7_72_a_row_outside_the_classes_of_the_recipe_is_refused(refuse: Refuse) -> None:
    said = refuse([*_reviews(20), (GOOD, "meh")], "task.classes=[neg, pos]")
    assert has_parts(said, "train.jsonl:21: label: 'meh' ", "2 classes")


def test_a7_74_joined_labels_beside_single_ones_are_refused(refuse: Refuse) -> None:
    said = refuse([*_reviews(20), ("so so", "pos;neg")])
    assert has_parts(said, "train.jsonl: label: 'pos;neg' ", "; ", "task.labels=multi", "task.labels=single")


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
    assert has_parts(said, "train.jsonl:21: label: '['pos', 'neg']' ", "; ", "task.labels=multi")


def test_a7_75_a_list_written_as_text_is_refused(refuse: Refuse) -> None:
    said = refuse([*_reviews(4), (GOOD, "['pos', 'neg']")])
    assert has_parts(said, "train.jsonl:5: label: '['pos', 'neg']' ", "; ", "task.labels=multi")


def test_a7_75_a_list_written_as_text_is_read_where_several_labels_are_asked_for(written: Any) -> None:
    read = _read(written([*_reviews(4), (GOOD, "['pos', 'neg']")]), labels="multi")
    assert read.task.classes == ["neg", "pos"]  # type: ignore[attr-defined]


def test_a7_76_one_text_for_all_rows_is_refused(refuse: Refuse) -> None:
    said = refuse([(GOOD, label) for _, label in _reviews(20)])
    assert has_parts(said, "train.jsonl: text: ", "20 rows", "; set data.columns.text=NAME ")


def test_a7_77_rows_given_twice_are_counted_and_stay_on_one_side(written: Any) -> None:
    read = _read(written(_reviews(20) * 2), validation=0.5)
    (note,) = read.notes
    assert has_parts(note, "20 of 40 train rows ")
    assert read.rows == {"train": 20, "validation": 20}
    train, validation = ({row.values["text"] for row in read.splits[name].rows()} for name in ("train", "validation"))
    assert len(train) == len(validation) == 10 and not train & validation


def test_a7_78_texts_with_two_labels_are_counted(written: Any) -> None:
    rows = [*_reviews(20), (GOOD + " .", "pos"), (GOOD.upper() + "  .", "neg"), (BAD + " .", "neg")]
    (note,) = _read(written(rows)).notes
    assert has_parts(note, "3 of 23 train rows ", "; 1 of these texts ", "labels")


TEXTS = {
    "emoji": "great 👩‍👩‍👧 👍🏽",
    "right-to-left": "פילם נהדר فيلم رائع",
    "zero-width": "gre\u200bat\u200d film\ufeff",
    "control": "great\x00\x1b[31m film",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a7_79_unusual_characters_are_taken_as_they_are(text: str, written: Any, tmp_path: Path) -> None:
    read = _read(written([*_reviews(6), (text, "pos")]))
    encoded = _encode(read, tmp_path)["train"]
    assert len(encoded) == 7 and encoded.costs[-1] > 2 and read.notes == []


def test_a7_79_half_an_emoji_is_refused(refuse: Refuse) -> None:
    assert refuse([*_reviews(4), ("great \ud83d", "pos")]).startswith("train.jsonl:5: text: ")


def test_a7_79_accents_coded_in_two_ways_are_one_class_and_one_text(written: Any) -> None:
    rows = [("tr\u00e8s bon", "\u00e9l\u00e8ve"), ("tre\u0300s bon", "e\u0301le\u0300ve"), (BAD, "pos")]
    read = _read(written(rows))
    assert read.task.classes == ["pos", "\u00e9l\u00e8ve"]  # type: ignore[attr-defined]
    (note,) = read.notes
    assert has_parts(note, "1 of 3 train rows ")


def test_a7_79_a_label_with_invisible_characters_is_the_same_label(written: Any) -> None:
    read = _read(written([*_reviews(4), ("the film was fine", "\ufeffpos\u200b")]))
    assert read.task.classes == ["neg", "pos"]  # type: ignore[attr-defined]


def test_a7_79_a_label_of_nothing_but_invisible_characters_is_refused(refuse: Refuse) -> None:
    said = refuse([*_reviews(4), (GOOD, "\u200b")])
    assert said.startswith("train.jsonl:5: label: ")


def test_a7_79_a_text_of_nothing_but_invisible_characters_is_refused(refuse: Refuse) -> None:
    said = refuse([*_reviews(20), ("\u200b\ufeff", "pos")])
    assert has_parts(said, "train.jsonl:21: text: ", "; ")


@pytest.mark.parametrize("text", ("great " * 900_000, "great" * 1_000_000), ids=("words", "one word"))
def test_a7_80_a_text_of_5_mb_is_cut_and_that_is_said(text: str, written: Any, tmp_path: Path) -> None:
    read = _read(written([*_reviews(6), (text, "pos")]))
    encoded = _encode(read, tmp_path)["train"]
    assert encoded.costs[-1] <= 64
    (note,) = _bind(read).notes(encoded)
    assert note.startswith("1 of 7 texts ") and "task.windows=N" in note


def test_a7_80_blanks_before_a_text_do_not_push_it_out(written: Any, tmp_path: Path) -> None:
    read = _read(written([*_reviews(6), (GOOD, "pos"), (" " * 5_000_000 + GOOD, "pos")]))
    encoded = _encode(read, tmp_path)["train"]
    plain, padded = (encoded.take([index])["input_ids"][0].tolist() for index in (6, 7))
    assert padded == plain and _bind(read).notes(encoded) == []


def test_a7_80_the_second_text_of_a_pair_may_be_huge_too(tmp_path: Path) -> None:
    values = {"text": GOOD, "text_pair": "great " * 900_000, "label": "pos"}
    task = TextClassification(labels="single", classes=["neg", "pos"])
    (fields,) = task.bind(tiny_tokenizer(), None, Data(max_length=64)).encode([Row("pairs.csv:2", values)])
    assert len(fields["input_ids"]) == 64 and fields["cut"] == 1


@pytest.mark.parametrize("label", ("great", "inf", "-Infinity", "nan", "1,5", True, [1, 2]))
def test_a7_99_a_target_that_is_no_finite_number_is_refused(label: object, refuse: Refuse) -> None:
    rows = [(text, n / 10) for n, (text, _) in enumerate(_reviews(20))]
    said = refuse([*rows, (GOOD, label)], "task.labels=regression")
    assert has_parts(said, "train.jsonl:21: label: '", "; ")
    assert ("task.labels=single" in said) == (label not in ("1,5", [1, 2]))


def test_a7_99_words_for_numbers_are_not_to_be_skipped_all(refuse: Refuse) -> None:
    said = refuse(_reviews(20), "task.labels=regression", "data.on_bad_row=skip")
    assert has_parts(said, "train.jsonl: ", "20 rows (unusable label)", "label: 'pos' ", "set task.labels=single ")
    assert "data.on_bad_row" not in said, "there is no use in skipping all"


def test_a7_99_one_word_among_numbers_makes_no_classes_of_them(written: Any, refuse: Refuse) -> None:
    rows: list[tuple[object, object]] = [(text, n / 10 + 0.05) for n, (text, _) in enumerate(_reviews(20))]
    assert _read(written(rows)).task.labels == "regression"  # type: ignore[attr-defined]
    said = refuse([*rows, (GOOD, "inf")])
    assert has_parts(said, "train.jsonl: label: 'inf' ", "20 ", "; ", "task.labels=regression")
    assert _read(written([*rows, (GOOD, "inf")]), labels="single").task.labels == "single"  # type: ignore[attr-defined]


@pytest.mark.parametrize("labels", ("regression", "auto"))
def test_a7_100_an_outlier_is_refused(labels: str, refuse: Refuse) -> None:
    rows = [(text, n / 10 + 0.05) for n, (text, _) in enumerate(_reviews(20))]
    said = refuse([*rows, (GOOD, 1e30)], f"task.labels={labels}")
    assert has_parts(said, "train.jsonl:21: label: '1e+30' ", "; ")


def test_a7_99_and_100_such_rows_can_be_skipped(written: Any, tmp_path: Path) -> None:
    rows: list[tuple[object, object]] = [(text, n / 10) for n, (text, _) in enumerate(_reviews(20))]
    rows[3:3] = [(GOOD, "inf"), (BAD, 1e30), (BAD, "great")]
    read = _read(written(rows), labels="regression", on_bad_row="skip", validation=0.2)
    assert read.notes == ["train: skipped 3 rows (unusable label)"]
    assert read.rows == {"train": 16, "validation": 4}
    encoded = _encode(read, tmp_path)
    labels = sorted([*encoded["train"].column("label"), *encoded["validation"].column("label")])
    assert labels == pytest.approx([n / 10 for n in range(20)])


def test_a7_140_rows_that_also_stand_in_train_are_counted(written: Any) -> None:
    twins = [(f"  {GOOD.upper()} .", "pos"), ("the film was fine", "pos"), (f"{BAD} .", "neg")]
    read = _read(written(_reviews(20)), test=written(twins, "test"))
    (note,) = read.notes
    assert note.startswith("2 of 3 test rows ") and "data.test=0.1" in note


@pytest.mark.parametrize("split", ("validation", "test"))
def test_a7_140_the_training_file_as_another_split_is_refused(split: str, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").symlink_to(tmp_path / "train.jsonl")
    for name in ("train.jsonl", "./train.jsonl", "other.jsonl"):
        said = refuse(_reviews(20), f"data.{split}={tmp_path}/{name}")
        assert has_parts(said, said.partition(": ")[0], f"data.{split} ", "; ", f"data.{split}=0.1")


@pytest.mark.parametrize("content", ("", "text,label\n", "\n\n"), ids=("nothing", "header", "blank lines"))
def test_a7_140_an_empty_validation_file_is_refused(content: str, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "valid.csv").write_text(content)
    said = refuse(_reviews(20), f"data.validation={tmp_path / 'valid.csv'}")
    assert said.startswith("valid.csv: ") and ("empty" in said or "no row" in said)


def test_a7_140_a_validation_file_of_which_nothing_is_left_is_refused(refuse: Refuse, written: Any) -> None:
    valid = written([(GOOD, "other")], "valid")
    said = refuse(_reviews(20), f"data.validation={valid}", "data.on_bad_row=skip")
    assert has_parts(said, "valid.jsonl: ", "1 row (unusable label)", "label: 'o")


@pytest.mark.parametrize("split", ("validation", "test"))
def test_a7_140_a_fraction_of_no_row_is_refused(split: str, refuse: Refuse) -> None:
    said = refuse(_reviews(20), "data.validation=null", f"data.{split}=0.02")
    assert has_parts(said, f"data.{split}: 0.02 of 20 rows ", "; ", f"data.{split}=null")


def test_a7_140_classes_of_one_row_each_leave_nothing_to_draw(refuse: Refuse) -> None:
    said = refuse([(f"{GOOD} {n}", f"class {n}") for n in range(20)], "data.test=0.2")
    assert has_parts(said, "data.test: ", "; ", "data.test=null")
