"""From `data:` to encoded splits: drawn splits, notes, and the cache of encoded examples."""

from __future__ import annotations

import csv
import gzip
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from tunesmith.errors import DataError, RecipeError
from tunesmith.models.load import processor_hash
from tunesmith.recipe import Data
from tunesmith.tasks import BoundTask
from tunesmith.tasks.text_classification import TextClassification
from tunesmith.testing import tiny_tokenizer
from tunesmith.training import dataset
from tunesmith.training.dataset import Examples

Rows = list[tuple[str, str]]
SHARED = Path(__file__).parents[4] / "shared" / "data"


def _reviews(count: int, start: int = 0) -> Rows:
    """Return distinct texts; one in four has the minority class."""
    return [
        (f"the film {n} was {'bad' if n % 4 == 0 else 'great'}", "neg" if n % 4 == 0 else "pos")
        for n in range(start, start + count)
    ]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """`written(rows, "train.csv")`: write a CSV of texts and labels."""

    def write(rows: Rows, name: str = "train.csv") -> str:
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        return str(tmp_path / name)

    return write


def _read(path: str, *, seed: int = 0, task: dict[str, Any] | None = None, **data: Any) -> Examples:
    given = {"train": path, "validation": None, "max_length": 16} | data
    return dataset.read(TextClassification(**task or {}), Data(**given), seed)


def _texts(read: Examples) -> dict[str, list[str]]:
    return {name: [str(row.values["text"]) for row in split.rows()] for name, split in read.splits.items()}


def test_what_is_the_same_of_several_files_is_said_once(tmp_path: Path) -> None:
    files = []
    for number, name in enumerate(("train", "dev", "test")):
        rows = _reviews(20, start=20 * number)
        files.append(tmp_path / f"{name}.tsv")
        files[-1].write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    train, dev, test = map(str, files)
    (note,) = _read(train, validation=dev, test=test).notes
    assert note.startswith(f"{train}, {dev}, {test}: no header; assuming data.columns.text=0 and ")
    files[2].write_text("".join(f"{label}\t{text}\n" for text, label in _reviews(20, start=40)))
    assert [note.partition(": ")[0] for note in _read(train, validation=dev, test=test).notes] == [
        f"{train}, {dev}", test,
    ]  # fmt: skip


def test_splits_are_drawn_from_train_in_proportion(written: Any) -> None:
    read = _read(written(_reviews(80)), validation=0.1, test=0.2)
    assert read.rows == {"train": 56, "validation": 8, "test": 16} and read.notes == []
    texts = _texts(read)
    assert {name: sum("bad" in text for text in part) for name, part in texts.items()} == {
        "train": 14,
        "validation": 2,
        "test": 4,
    }
    order = [text for text, _ in _reviews(80)]
    assert sorted((text for part in texts.values() for text in part), key=order.index) == order
    assert all(part == sorted(part, key=order.index) for part in texts.values()), "each in file order"
    assert _texts(read) == texts, "they can be read again"


def test_the_draw_depends_on_the_seed_and_test_comes_first(written: Any) -> None:
    path = written(_reviews(80))
    one, again, other = (_texts(_read(path, seed=seed, validation=0.1, test=0.2)) for seed in (0, 0, 1))
    assert one == again and one != other
    alone = _texts(_read(path, test=0.2))
    assert alone["test"] == one["test"], "a validation split takes nothing from test"


def test_files_and_fractions_go_together(written: Any) -> None:
    test = written(_reviews(8, 100), "test.csv")
    read = _read(written(_reviews(40)), validation=0.1, test=test)
    assert read.rows == {"train": 36, "validation": 4, "test": 8}
    assert _texts(read)["test"] == [text for text, _ in _reviews(8, 100)]
    assert read.fingerprints()["train"] == read.fingerprints()["validation"] != read.fingerprints()["test"]


def test_a_fraction_is_of_the_rows_that_can_be_used(written: Any) -> None:
    rows = _reviews(40)
    rows[5:5] = [("", "pos"), ("a text", ""), *[(f"so {n}", "meh") for n in range(8)]]
    read = _read(written(rows), validation=0.1, on_bad_row="skip", task={"classes": ["neg", "pos"]})
    assert read.rows == {"train": 36, "validation": 4}
    assert not [text for part in _texts(read).values() for text in part if text.startswith(("so", "a text"))]
    assert read.notes == ["train: skipped 8 rows (unusable label), 1 row (empty text), 1 row (empty label)"]


def test_a_row_without_a_label_is_left_out(written: Any) -> None:
    read = _read(written([*_reviews(8), ("who knows", "-100")]))
    assert read.rows == {"train": 8} and read.task.classes == ["neg", "pos"]
    assert "train: skipped 1 row (label -100)" in read.notes
    assert "who knows" not in _texts(read)["train"]


def test_a_limit_is_of_each_file(written: Any) -> None:
    test = written(_reviews(30, 100), "test.csv")
    read = _read(written(_reviews(80)), validation=0.25, test=test, limit=12)
    assert read.rows == {"train": 9, "validation": 3, "test": 12}


def test_the_task_is_fitted_to_train_alone(written: Any) -> None:
    read = _read(written(_reviews(40)), test=written([("so", "pos")], "test.csv"), class_weights="balanced")
    assert read.task.classes == ["neg", "pos"] and read.task.labels == "single"  # type: ignore[attr-defined]
    assert read.data.class_weights == {"neg": 2.0, "pos": pytest.approx(40 / 60)}


def test_a_folder_gives_its_splits_and_the_recipe_goes_before(written: Any, tmp_path: Path) -> None:
    for name, start in (("train.csv", 0), ("valid.csv", 100), ("test.csv", 200), ("other.csv", 300)):
        written(_reviews(8, start), name)
    read = _read(str(tmp_path))
    assert {name: split.table.path.name for name, split in read.splits.items()} == {
        "train": "train.csv", "validation": "valid.csv", "test": "test.csv"
    }  # fmt: skip
    assert read.data.train == str(tmp_path / "train.csv")
    read = _read(str(tmp_path), test=str(tmp_path / "other.csv"), validation=0.25)
    assert (
        read.splits["test"].table.path.name == "other.csv" and read.splits["validation"].table.path.name == "valid.csv"
    )


def test_no_training_data_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data.train: missing; data.train=reviews.csv, or a folder"):
        dataset.read(TextClassification(), Data(), 0)


def test_rows_of_other_splits_that_stand_in_train_are_counted(written: Any) -> None:
    rows = _reviews(40)
    test = written([(text.upper() + " ", label) for text, label in rows[:3]] + _reviews(5, 100), "test.csv")
    valid = written([rows[7], rows[8], *_reviews(2, 200)], "valid.csv")
    notes = _read(written(rows), validation=valid, test=test).notes
    assert [re.findall(r"^\d+ of \d+ \w+ rows|data\.\w+=[\d.]+", note) for note in notes] == [
        ["3 of 8 test rows", "data.test=0.1"],
        ["2 of 4 validation rows", "data.validation=0.1"],
    ]


def test_repeated_rows_stay_on_one_side_of_what_is_drawn(written: Any) -> None:
    read = _read(written(_reviews(40) * 2), validation=0.25, test=0.25)
    (note,) = read.notes
    assert note.startswith("40 of 80 train rows ")
    assert read.rows == {"train": 40, "validation": 20, "test": 20}
    train, validation, test = (set(part) for part in (_texts(read)[name] for name in ("train", "validation", "test")))
    assert len(train) + len(validation) + len(test) == len(train | validation | test) == 40
    assert sum("bad" in text for text in validation) == sum("bad" in text for text in test) in (2, 3)


def test_a_class_of_one_text_given_often_stays_in_train(written: Any) -> None:
    read = _read(written([*_reviews(40), *[("so so", "odd")] * 5]), validation=0.2)
    assert "so so" not in _texts(read)["validation"] and read.rows["validation"] == 9
    (note,) = read.notes[1:]
    assert note.startswith("1 class ") and note.endswith(": 'odd'")


def test_a_pair_repeats_only_if_both_texts_do(tmp_path: Path) -> None:
    lines = [f"so warm,film {n},{'pos' if n % 2 else 'neg'}" for n in range(20)]
    (tmp_path / "a.csv").write_text("\n".join(["text,text_pair,label", *lines, "So warm,film 3,pos", ""]))
    (note,) = _read(str(tmp_path / "a.csv")).notes
    assert note.startswith("1 of 21 train rows ")


def test_notes_name_what_was_skipped_in_each_split(written: Any) -> None:
    valid = written([*_reviews(4, 100), ("", "pos"), ("so", "mixed"), ("so so", "other")], "valid.csv")
    read = _read(written([*_reviews(8), ("so", "")]), validation=valid, on_bad_row="skip")
    assert sorted(read.notes) == [
        "train: skipped 1 row (empty label)",
        "validation: skipped 2 rows (unusable label), 1 row (empty text)",
    ]
    assert read.rows == {"train": 8, "validation": 4}


def _bound(read: Examples, processor: Any = None) -> BoundTask:
    """Bind the task to a tokenizer and a config with its head."""
    return read.task.bind(processor or tiny_tokenizer(), BertConfig(**read.task.head_config()), read.data)


def _folders(read: Examples, cache: Path, processor: Any = None) -> dict[str, str]:
    """Encode the splits; return the cache key of each."""
    bound = _bound(read, processor)
    encoded = dataset.encode_splits(read, bound, processor_hash(bound.processor), cache)
    assert {name: len(part) for name, part in encoded.items()} == read.rows
    return {name: part.key for name, part in encoded.items()}


def test_the_same_data_is_encoded_once(written: Any, tmp_path: Path) -> None:
    path, cache = written(_reviews(40)), tmp_path / "cache"
    folders = _folders(_read(path, validation=0.1), cache)
    assert folders["train"] != folders["validation"]
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    os.utime(path)
    assert _folders(_read(path, validation=0.1), cache) == folders
    (tmp_path / "elsewhere").mkdir()
    moved = Path(path).rename(tmp_path / "elsewhere" / "moved.csv")
    assert _folders(_read(str(moved), validation=0.1), cache) == folders, "the name of the file does not count"
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before, "nothing was written"


def test_encoded_rows_are_those_of_the_split(written: Any, tmp_path: Path) -> None:
    read = _read(written(_reviews(40)), validation=0.25)
    encoded = dataset.encode_splits(read, _bound(read), "tiny", tmp_path / "cache")
    for name, split in read.splits.items():
        labels = [read.task.classes.index(str(row.values["label"])) for row in split.rows()]  # type: ignore[attr-defined]
        assert encoded[name].column("label").tolist() == labels


def _change_a_label(path: str) -> str:
    content = Path(path).read_text().replace("great,pos", "great,neg", 1)
    Path(path).write_text(content)
    return path


def _swap_columns(path: str) -> str:
    rows = list(csv.reader(Path(path).read_text().splitlines()))
    with Path(path).open("w", newline="") as file:
        csv.writer(file).writerows(reversed(row) for row in rows)
    return path


CHANGES: dict[str, tuple[Callable[[str], Any] | None, dict[str, Any]]] = {
    "a label": (_change_a_label, {}),
    "the order of columns": (_swap_columns, {}),
    "max_length": (None, {"max_length": 8}),
    "windows": (None, {"task": {"windows": 2}}),
    "classes": (None, {"task": {"classes": ["pos", "neg"]}}),
    "kind": (None, {"task": {"labels": "multi"}}),
    "seed of the draw": (None, {"seed": 1}),
    "size of the draw": (None, {"validation": 0.5}),
    "limit": (None, {"limit": 20}),
    "class weights": (None, {"class_weights": "balanced"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_examples_changes_the_folder(change: str, written: Any, tmp_path: Path) -> None:
    edit, given = CHANGES[change]
    path = written(_reviews(40))
    before = _folders(_read(path, validation=0.25), tmp_path / "cache")
    if edit is not None:
        edit(path)
    after = _folders(_read(path, **{"validation": 0.25} | given), tmp_path / "cache")
    assert not set(before.values()) & set(after.values())


def test_another_column_changes_the_folder(tmp_path: Path) -> None:
    rows = "".join(f"film {n},so warm {n},{('pos', 'neg')[n % 2]}\n" for n in range(20))
    (tmp_path / "a.csv").write_text(f"title,text,label\n{rows}")
    given: list[dict[str, Any]] = [{}, {"columns": {"text": "title"}}, {"columns": {"text": 1}}]
    folders = [_folders(_read(str(tmp_path / "a.csv"), **one), tmp_path / "cache")["train"] for one in given]
    assert folders[0] == folders[2] != folders[1], "a column named by its number is the same column"


def test_another_tokenizer_changes_the_folder(written: Any, tmp_path: Path) -> None:
    read = _read(written(_reviews(40)))
    changed = tiny_tokenizer()
    changed.add_tokens(["film"])
    longer = tiny_tokenizer()
    longer.model_max_length = 32
    folders = {
        _folders(read, tmp_path / "cache", processor)["train"] for processor in (None, changed, tiny_tokenizer())
    }
    assert len(folders) == 2


def test_a_file_that_changes_after_it_was_read_is_not_encoded(written: Any, tmp_path: Path) -> None:
    path = written(_reviews(40))
    read = _read(path, validation=0.25)
    _change_a_label(path)
    with pytest.raises(DataError, match=r"train.csv: .*has changed .*; "):
        dataset.encode_splits(read, _bound(read), "tiny", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_f13_a_run_does_not_go_on_with_other_data(command: Any, tiny_bert: Path, written: Any, tmp_path: Path) -> None:
    path = written(_reviews(24))
    given = (
        "task=text-classification",
        f"model={tiny_bert}",
        f"data.train={path}",
        "data.validation=0.25",
        "device=cpu",
    )
    code, _, err = command("train", *given, "train.max_steps=1", f"output={tmp_path / 'run'}")
    assert code == 0, err
    _change_a_label(path)
    code, _, err = command("train", "--resume", str(tmp_path / "run"))
    assert code == 6 and "data_sha256.train was '" in err
    assert f"…': {path} has changed" in err
    assert "data_sha256.validation was '" in err and "--override data_sha256.train" in err
    code, _, err = command("evaluate", str(tmp_path / "run"), "--split", "validation")
    assert code == 3 and re.search("train.csv: .*changed since training; ", err)


def test_what_is_left_out_of_another_file_is_said(command: Any, tiny_bert: Path, written: Any, tmp_path: Path) -> None:
    given = ("task=text-classification", f"model={tiny_bert}", f"data.train={written(_reviews(24))}", "device=cpu")
    run = str(tmp_path / "run")
    code, _, err = command("train", *given, "train.max_steps=1", "data.on_bad_row=skip", f"output={run}")
    assert code == 0, err
    other = written([*_reviews(8, 100), ("", "pos"), ("so so", "other")], "other.csv")
    for _ in range(2):  # encoded, then read from the cache
        code, out, err = command("evaluate", run, "--data", other)
        assert code == 0 and "(8 examples)" in out
        assert err == f"warning: {other}: skipped 1 row (empty text), 1 row (unusable label)\n"


def test_a_row_is_encoded_the_same_whatever_its_neighbours(tmp_path: Path) -> None:
    lines = [f"so warm,{'film' * (n % 3 == 0)},{'pos' if n % 2 else 'neg'}" for n in range(12)]
    (tmp_path / "a.csv").write_text("\n".join(["text,text_pair,label", *lines, ""]))
    read = _read(str(tmp_path / "a.csv"))
    encoded = dataset.encode_splits(read, _bound(read), "tiny", tmp_path / "cache")["train"]
    alone = [_bound(read).encode([row])[0] for row in read.splits["train"].rows()]
    assert [encoded.take([n])["input_ids"][0].tolist() for n in range(12)] == [one["input_ids"] for one in alone]
    assert len({tuple(one["input_ids"]) for one in alone}) == 2


needs = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")


@needs
@pytest.mark.parametrize(
    ("given", "rows", "classes", "first", "notes"),
    (
        ({"train": "sst2"}, {"train": 6920, "validation": 872, "test": 1821}, 2, "a stirring , funny and", 3),
        ({"train": "symptom2disease/Symptom2Disease.csv"}, {"train": 1200}, 24, "I have been experiencing", 1),
        ({"train": "hotel_zh/ChnSentiCorp_htl_all.csv", "on_bad_row": "skip"}, {"train": 7765}, 2, "距离川沙公路", 1),
        ({"train": "cuad/clauses.jsonl.gz"}, {"train": 10976}, 41, "CO-BRANDING AND", 1),
        (
            {"train": "medquad/medquad_qa.jsonl.gz", "columns": {"text": "question", "label": "qtype"}},
            {"train": 16407}, 16, "What is (are) Adult", 1,
        ),
        (
            {"train": "credit_german/germancredit.csv", "columns": {"text": "purpose", "label": "creditability"}},
            {"train": 1000}, 2, "radio/television", 1,
        ),
    ),
    ids=("sst2", "symptom2disease", "hotel_zh", "cuad", "medquad", "credit_german"),
)  # fmt: skip
def test_real_tables_are_read_as_they_are(
    given: dict[str, Any], rows: dict[str, int], classes: int, first: str, notes: int
) -> None:
    read = _read(str(SHARED / given["train"]), **{key: value for key, value in given.items() if key != "train"})
    assert read.rows == rows and len(read.task.classes) == classes and len(read.notes) == notes  # type: ignore[attr-defined]
    assert next(iter(read.splits["train"].rows())).values["text"].startswith(first)  # type: ignore[attr-defined]


OTHERS = {
    "hotel_zh/ChnSentiCorp_htl_all.csv": ":6376: review: empty; fill it in or remove the row, or set data.on_bad_row=",
    "wnut17/wnut17train.conll": ":1: the file has one word and tag per line ('B-",
    "ncbi_disease/train.tsv": ":1: the file has one word and tag per line ('B-Disease, I-Disease, O')",
    "weibo_ner_zh/weiboNER_2nd_conll.train": ":1: the file has one word and tag per line ('B-",
    "alpaca_en/alpaca_0_3252.json": ":1: no column for label among: instruction, input, output; ",
    "huatuo_zh/llama_data.json": ":1: no column for label among: instruction, input, output; ",
    "tatoeba_en_zh/cmn.txt.gz": ":1: no header, and the values do not show which column is text and label: Hi.",
    "multi30k_en_de/train.en.gz": ":1: no header, and the values do not show which column is text and label: Two",
    "pneumoniamnist/pneumoniamnist_merged.npz": ": unsupported format: the content is a zip, Excel or Word file; ",
    "hymenoptera": ": no train file in this folder; name the file train.csv, or set data.train to a file",
}


@needs
@pytest.mark.parametrize("name", OTHERS)
def test_real_data_of_other_kinds_is_refused(name: str) -> None:
    with pytest.raises(DataError) as caught:
        _read(str(SHARED / name))
    assert str(caught.value).removeprefix(f"{SHARED}/{name}").startswith(OTHERS[name])


def test_a_compressed_file_counts_as_the_bytes_it_is(written: Any, tmp_path: Path) -> None:
    plain = written(_reviews(8))
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    one, two = _read(plain), _read(str(tmp_path / "train.csv.gz"))
    assert _texts(one) == _texts(two) and one.fingerprints() != two.fingerprints()
