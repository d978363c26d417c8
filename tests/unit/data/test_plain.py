"""Plain text: recognized by content, split into documents, refused when unusable."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.formats import Table, plain, read_table
from tunesmith.errors import DataError
from tunesmith.recipe import Data
from tunesmith.tasks.fill_mask import FillMask
from tunesmith.tasks.text_classification import TextClassification
from tunesmith.training import dataset

COLUMNS = FillMask().columns
PROSE = "It was, all in all, a fine day.\nNobody came; nothing | was said.\n"


def _table(path: Path, **how: Any) -> Table:
    return read_table(path, COLUMNS, plain_text=True, **how)


def _texts(path: Path) -> list[object]:
    return [row.values["text"] for row in _table(path)]


def test_blank_lines_divide_documents(write: Callable[..., Path]) -> None:
    path = write("\n\none\ntwo\n\n \nthree\n\n", "a.txt")
    assert [(row.place, row.values) for row in _table(path)] == [
        (f"{path}:3", {"text": "one\ntwo"}),
        (f"{path}:7", {"text": "three"}),
    ]


@pytest.mark.parametrize("text", (PROSE, PROSE + "\n\n", "\n" + PROSE), ids=("plain", "blank at its end", "at its top"))
def test_without_blank_lines_each_line_is_one(text: str, write: Callable[..., Path]) -> None:
    assert _texts(write(text, "a.csv")) == PROSE.splitlines()


def test_a_folder_holds_a_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "two.txt").write_text("two\n\nstill two\n")
    (tmp_path / "b" / "c" / "three.txt.gz").write_bytes(gzip.compress("drei, 三\n".encode()))
    (tmp_path / "b" / "one.md").write_text("# one")
    for name in ("b/page.pdf", "b/.hidden.txt"):
        (tmp_path / name).write_text("not this")
    table = _table(tmp_path / "b")
    assert [(row.place, row.values["text"]) for row in table] == [
        (f"{tmp_path}/b/c/three.txt.gz:1", "drei, 三"),
        (f"{tmp_path}/b/one.md:1", "# one"),
        (f"{tmp_path}/b/two.txt:1", "two\n\nstill two"),
    ]
    before = table.sha256
    (tmp_path / "b" / "one.md").rename(tmp_path / "b" / "1.md")
    assert _table(tmp_path / "b").sha256 != before, "its names are of it"
    (tmp_path / "b" / "two.txt").write_text("two, and more")
    with pytest.raises(DataError, match="has changed since"):
        list(table)


TABLES = {
    "a column of text": ('id,text\n1,"a, b"\n2,c\n', ["a, b", "c"]),
    "text alone": ("text\none, two\nthree\n", None),
    "jsonl": ('{"id": 1, "body": "one"}\n{"id": 2, "body": "two"}\n', ["one", "two"]),
    "tsv": ("abstract\tn\none\t1\ntwo\t2\n", ["one", "two"]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_stays_one(kind: str, write: Callable[..., Path]) -> None:
    content, texts = TABLES[kind]
    if texts is None:
        with pytest.raises(DataError, match="2 fields, but the header has 1"):
            _texts(write(content, "a.csv"))
        return
    assert _texts(write(content, "a.txt")) == texts


def test_a_table_without_a_column_of_text_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="a.csv:1: no column for text .*id, remark; "):
        _table(write("id,remark\n1,fine\n2,bad\n3,dull\n", "a.csv"))


def test_what_cannot_be_read_is_named(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(b"one\n\ncaf\xe9 two\nthree\n\nfour", "a.txt")
    with pytest.raises(DataError, match="a.txt:3: byte 0xe9 is not UTF-8"):
        _texts(path)
    table = _table(path, on_bad_row="skip")
    assert [row.values["text"] for row in table] == ["one", "four"] and table.skipped == {"not UTF-8": 1}
    (tmp_path / "docs").mkdir()
    with pytest.raises(DataError, match=r"docs: no text files \(.txt, .text, .md\)"):
        _table(tmp_path / "docs")
    (tmp_path / "docs" / "empty.txt").write_text("\n")
    (tmp_path / "docs" / "full.txt").write_text("full")
    with pytest.raises(DataError, match="empty.txt:1: text: empty; .*remove the row"):
        _texts(tmp_path / "docs")
    assert [row.values["text"] for row in _table(tmp_path / "docs", on_bad_row="skip")] == ["full"]


def test_a_document_beyond_all_measure_is_refused(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plain, "MAX_CHARS", 20)
    path = write("0123456789\n" * 3 + "\nshort\n", "a.txt")
    with pytest.raises(DataError, match="a.txt:1: .*20 characters .*document; .*blank lines"):
        _texts(path)
    assert [row.values["text"] for row in _table(path, on_bad_row="skip")] == ["short"]
    (tmp_path / "docs").mkdir()
    path.rename(tmp_path / "docs" / "a.txt")
    with pytest.raises(DataError, match="docs/a.txt:1: .*20 characters"):
        _texts(tmp_path / "docs")


def test_a_folder_of_splits_is_still_that(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(PROSE)
    (tmp_path / "test.txt").write_text("Something else, at last.\n")
    (tmp_path / "notes.txt").write_text("not this")
    found = dataset.read(FillMask(), Data(train=str(tmp_path), validation=None), seed=0)
    assert found.rows == {"train": 2, "test": 1}
    with pytest.raises(DataError, match="no train file"):
        dataset.read(TextClassification(), Data(train=str(tmp_path.parent)), seed=0)


def test_documents_are_held_out_whole(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"text {number}\n\nof it\n")
    found = dataset.read(FillMask(), Data(train=str(tmp_path), validation=0.2), seed=0)
    assert found.rows == {"train": 8, "validation": 2} and found.notes == []
