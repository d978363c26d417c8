"""Folders as data: files are found by name and content, and assigned to splits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from messages import has_parts

from tunesmith.data.formats.folders import data_files, find_splits, holds_text, no_train_error
from tunesmith.errors import DataError
from tunesmith.recipe import Data
from tunesmith.tasks.fill_mask import FillMask
from tunesmith.tasks.text_classification import TextClassification
from tunesmith.training import dataset

TABLE = "text,label\nso warm,pos\nvery dull,neg\nso fine,pos\nso bad,neg\n"
TAGGED = "He\tO\nlives\tO\n\nin\tO\nNew\tB-LOC\nYork\tI-LOC\n"
PROSE = "Of all the films, this one is long.\nIt has a plot\n\nAnd then, at last, it ends.\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def _fill(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    (
        ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"),
        ("weiboNER_2nd_conll.train", "weiboNER_2nd_conll.dev", "weiboNER_2nd_conll.test"),
        ("imdb-train.csv", "imdb-val.csv", "imdb-test.csv"),
    ),
)
def test_splits_are_told_by_a_word_in_their_names(train: str, validation: str, test: str, folder: Path) -> None:
    _fill(folder, dict.fromkeys((train, validation, test), TAGGED) | {"SOURCE.txt": "from the test bench of dev"})
    found = find_splits(folder)
    assert {split: path.name for split, path in found.items()} == {
        "train": train, "validation": validation, "test": test
    }  # fmt: skip


@pytest.mark.parametrize(
    "names",
    (
        ("a_train.csv", "b_train.csv"),
        ("ab_test.csv", "cd.csv"),
        ("train_and_test.csv", "other.csv"),
        ("trains.csv", "latest.csv"),
        ("a_train.csv", "b.csv"),
        ("a_train.csv",),
    ),
)
def test_what_is_not_clear_is_no_split(names: tuple[str, ...], folder: Path) -> None:
    _fill(folder, dict.fromkeys(names, TABLE))
    assert find_splits(folder) == {}


def test_a_file_named_as_a_split_goes_before_one_with_the_word_in_its_name(folder: Path) -> None:
    _fill(folder, dict.fromkeys(("train.csv", "my_test.csv"), TABLE))
    assert list(find_splits(folder)) == ["train"]


def test_other_endings_are_told_by_what_is_in_them(folder: Path) -> None:
    _fill(folder, {
        "a.annotated": TAGGED, "b.data": TABLE, "c.rows": '{"text": "a"}\n', "d.csv": "?", "e.parquet": "?",
        "f.log": "It began.\nIt went on, and on.\nIt ended.\n", "g.bin": b"\0\1", "h.png": b"\x89PNG\r\n",
        "README": TABLE, ".hidden.csv": TABLE,
    })  # fmt: skip
    assert [path.name for path in data_files(folder)] == ["a.annotated", "b.data", "c.rows", "d.csv", "e.parquet"]


def test_one_file_alone_is_train(folder: Path) -> None:
    _fill(folder, {"reviews.csv": TABLE, "SOURCE.txt": "from here", "licence": "free"})
    found = dataset.read(TextClassification(), Data(train=str(folder), validation=None), 0)
    assert found.rows == {"train": 4} and found.data.train == str(folder / "reviews.csv")


@pytest.mark.parametrize(
    ("files", "parts"),
    (
        ((), ("; ", "train.csv", "data.train")),
        (("photo.png",), ("photo.png; ", "CSV, JSONL, Parquet")),
        (
            ("a.csv", "b.csv", "photo.png", "readme.md"),
            ("only a.csv, b.csv; ", "train.csv", "validation", "test", "data.train={}/a.csv"),
        ),
        (("train.de", "train.en"), ("train.de, train.en; ", "task=translation")),
        (
            tuple(f"{n}.tsv" for n in range(9)),
            ("only 0.tsv, 1.tsv, 2.tsv, 3.tsv, 4.tsv, 5.tsv ...; ", "train.tsv"),
        ),
    ),
)
def test_a_folder_without_train_is_told_what_it_holds(
    files: tuple[str, ...], parts: tuple[str, ...], folder: Path
) -> None:
    contents = {"png": b"\x89PNG", "en": b"A film.\nA plot.\n", "de": b"Ein Film.\nEin Plan.\n"}
    _fill(folder, {name: contents.get(name.rpartition(".")[2], TABLE) for name in files})
    with pytest.raises(DataError) as caught:
        dataset.read(TextClassification(), Data(train=str(folder)), 0)
    assert has_parts(str(caught.value), f"{folder}: ", "no train file", *(part.format(folder) for part in parts))
    assert str(no_train_error(folder)) == str(caught.value)


def test_texts_are_told_from_tables(folder: Path) -> None:
    _fill(folder, {"a.txt": PROSE, "b.txt": "name\tage\nAnn\t5\nBob\t6\n", "c.csv": "a name\nAnn\n", "d": PROSE})
    assert [holds_text(folder / name) for name in "a.txt b.txt c.csv d none".split()] == [
        True, False, False, True, False
    ]  # fmt: skip
    assert not holds_text(folder)
    _fill(folder / "texts", {"a.txt": PROSE, "b.md": PROSE, "readme.md": "about"})
    assert holds_text(folder / "texts")


def test_what_tells_about_a_folder_of_texts_is_no_text_of_it(folder: Path) -> None:
    _fill(folder, {"a.txt": PROSE, "LICENSE.txt": "free", "README.md": "about"})
    _fill(folder / "more", {"readme.md": "a story of that name"})
    rows = dataset.read(FillMask(), Data(train=str(folder), validation=None), 0).splits["train"].rows()
    assert [row.place.removeprefix(f"{folder}/") for row in rows] == ["a.txt:1", "more/readme.md:1"]
    (folder / "a.txt").unlink()
    (folder / "more" / "readme.md").unlink()
    _fill(folder, {"reviews.csv": TABLE})
    found = dataset.read(FillMask(), Data(train=str(folder), validation=None), 0)
    assert found.data.train == str(folder / "reviews.csv")
