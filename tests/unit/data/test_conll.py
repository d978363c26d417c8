"""CoNLL files: recognized by content, read by sentence, each error with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.formats import Table, conll, find_splits, read_table
from tunesmith.errors import DataError, RecipeError
from tunesmith.tasks.token_classification import TokenClassification

PLAIN = "He\tO\nlives\tO\n\nin\tO\nNew\tB-LOC\nYork\tI-LOC\n"
SENTENCES = [(["He", "lives"], ["O", "O"]), (["in", "New", "York"], ["O", "B-LOC", "I-LOC"])]


def _read(path: Path, text: str | bytes, **given: Any) -> Table:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(path, TokenClassification().columns, **given)


def _sentences(table: Table) -> list[tuple[Any, Any]]:
    return [(row.values["tokens"], row.values["label"]) for row in table]


LAYOUTS: dict[str, str | bytes] = {
    "tabs": PLAIN,
    "blanks": PLAIN.replace("\t", " "),
    "many blanks": PLAIN.replace("\t", "   "),
    "trailing blanks": PLAIN.replace("\t", " ").replace("\n", " \n"),
    "CRLF": PLAIN.replace("\n", "\r\n"),
    "blank lines of a tab": PLAIN.replace("\n\n", "\n\t\n"),
    "BOM": PLAIN.encode("utf-8-sig"),
    "UTF-16": PLAIN.encode("utf-16"),
    "documents": f"-DOCSTART-\tO\n\n{PLAIN}",
    "documents of four columns": "-DOCSTART- -X- -X- O\n\n" + PLAIN.replace("\t", " X Y "),
    "comments": f"# id = 1\n# text = He lives\n{PLAIN.replace('in', '# text = in New York' + chr(10) + 'in', 1)}",
    "blanks behind tabs": PLAIN.replace("\n", " \n"),
    "a tab more": PLAIN.replace("O\n", "O\t\n").replace("LOC\n", "LOC\t\n"),
    "old Mac line ends": PLAIN.replace("\n", "\r"),
    "a line of names": "Word\tNER\n" + PLAIN,
    "three columns": PLAIN.replace("\t", "\tNN\t"),
    "many blank lines": PLAIN.replace("\n\n", "\n\n\n\n"),
    "no last line end": PLAIN.strip(),
}


@pytest.mark.parametrize("text", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(text: str | bytes, tmp_path: Path) -> None:
    table = _read(tmp_path / "any.name", text)
    assert table.format == "conll" and _sentences(table) == SENTENCES
    assert [table.columns["tokens"], table.columns["label"]] == [0, 1 if "columns" not in str(table.note) else -1] or (
        "columns" in str(table.note) or "X" in str(text) or "NN" in str(text)
    )


def test_a_mark_or_a_blank_of_chinese_width_is_a_word_and_names_are_none(tmp_path: Path) -> None:
    table = _read(tmp_path / "a", "word\ttag\n#Apple\tORG\nis\tO\n\n#1\tO\nhere\tO\n\nParis\tLOC\n!\tO\n")
    assert [words for words, _ in _sentences(table)] == [["#Apple", "is"], ["#1", "here"], ["Paris", "!"]]
    table = _read(tmp_path / "a", "\u3000 O\nAnn B-PER\n\nis O\n")
    assert [words for words, _ in _sentences(table)] == [["\u3000", "Ann"], ["is"]]


def test_tags_before_words_and_numbered_words(tmp_path: Path) -> None:
    table = _read(tmp_path / "a", "O\tHe\nO\tlives\n\nO\tin\nB-LOC\tNew\nI-LOC\tYork\n")
    assert _sentences(table) == SENTENCES and "words from column 1 and tags from column 0" in str(table.note)
    table = _read(tmp_path / "a", "1\tHe\tO\n2\tlives\tO\n\n1\tin\tO\n2\tNew\tB-LOC\n3\tYork\tI-LOC\n")
    assert _sentences(table) == SENTENCES and "words from column 1 and tags from column 2" in str(table.note)


def test_types_without_prefixes_and_a_mark_as_a_word(tmp_path: Path) -> None:
    table = _read(tmp_path / "a", "# O\nAnn PER\nis O\nhere O\n\n# O\nParis LOC\n")
    assert _sentences(table) == [(["#", "Ann", "is", "here"], ["O", "PER", "O", "O"]), (["#", "Paris"], ["O", "LOC"])]


@pytest.mark.parametrize(
    "text", ("text,label\na b,O\nc d,B-X\n", "good\tO\nbad film\tX\n", "We took the I-95\n", "a O, b\n")
)
def test_what_is_none(text: str, tmp_path: Path) -> None:
    assert not conll.looks_tagged(text)


def test_a_row_stands_where_its_first_word_does(tmp_path: Path) -> None:
    table = _read(tmp_path / "a.conll", f"# id\n{PLAIN}")
    rows = list(table)
    assert [row.place.rpartition(":")[2] for row in rows] == ["2", "5"]
    assert rows[1].place_of(2) == f"{tmp_path / 'a.conll'}:7"


def test_columns_can_be_chosen_by_number(tmp_path: Path) -> None:
    text = "He\tO\tPRP\nlives\tO\tVB\n\nin\tO\tO\nYork\tB-LOC\tO\n"
    table = _read(tmp_path / "a.conll", text, named={"label": 1})
    assert [label for _, label in _sentences(table)] == [["O", "O"], ["O", "B-LOC"]] and table.note is None
    with pytest.raises(DataError, match="data.columns.label: no column '3'; .*0 to 2"):
        _read(tmp_path / "a.conll", text, named={"label": 3})
    with pytest.raises(RecipeError, match="data.columns.lable: .*no such column; .*'label'"):
        _read(tmp_path / "a.conll", text, named={"lable": 1})


def test_more_columns_are_said(tmp_path: Path) -> None:
    table = _read(tmp_path / "a.conll", PLAIN.replace("\t", "\tNN\tB-NP\t"))
    assert table.note and table.note.endswith("4 columns: words from column 0 and tags from column 3, counted from 0")


FILLER = "a\tO\nb\tO\nc\tO\nd\tO\n\n" * 5
BAD = {
    "a tag without a word": ("x\tO\n\tO\n", 2, "a tag without a word"),
    "a word without a tag": ("x\tO\ny\t\n", 2, "a word without a tag: 'y"),
    "a line of one column": ("x\tO\ny\n", 2, "1 column, but the other lines have 2: 'y'"),
    "three columns": ("x\tO\ny\tNN\tO\n", 2, "3 columns, but the other lines have 2"),
    "blanks among tabs": ("x\tO\nNew B-LOC\n", 2, "separate it like the other lines"),
    "a comment inside": ("x\tO\n# note\ny\tO\n", 2, "a comment inside a sentence: '# note'"),
    "Latin-1": (b"x\tO\ncaf\xe9\tO\n", 2, "byte 0xe9 is not UTF-8"),
    "NUL": ("x\tO\n\0\tO\n", 2, "NUL byte"),
}


@pytest.mark.parametrize(("text", "line", "said"), BAD.values(), ids=BAD)
def test_a_bad_line_costs_its_sentence(text: str | bytes, line: int, said: str, tmp_path: Path) -> None:
    text = (text if isinstance(text, bytes) else text.encode()) + b"\n" + FILLER.encode()
    with pytest.raises(DataError) as stopped:
        list(_read(tmp_path / "a.conll", text))
    assert f"a.conll:{line}: " in str(stopped.value) and said in str(stopped.value)
    table = _read(tmp_path / "a.conll", text, on_bad_row="skip")
    assert len(list(table)) == 5 and table.skipped.total() == 1


def test_tabs_among_blanks(tmp_path: Path) -> None:
    """Such files are not ambiguous."""
    assert _sentences(_read(tmp_path / "a", FILLER.replace("\t", " ") + "x\tO\ny O\n"))[-1] == (["x", "y"], ["O", "O"])


def test_a_sentence_without_end_is_refused(tmp_path: Path) -> None:
    endless = "a\tO\n" * (conll.MAX_WORDS * 2)
    with pytest.raises(DataError, match="a.conll:1: .*5,000 words .*blank line"):
        list(_read(tmp_path / "a.conll", endless))
    table = _read(tmp_path / "a.conll", f"{endless}\n{PLAIN}", on_bad_row="skip")
    assert _sentences(table) == SENTENCES and table.skipped == {"sentence too long": 1}


def test_a_digit_behind_each_character_is_said(tmp_path: Path) -> None:
    marked = "我0\tO\n在0\tO\n北0\tB-LOC\n京1\tI-LOC\n\n好0\tO\n"
    note = _read(tmp_path / "a.conll", marked).note or ""
    assert "each character is followed by a digit" in note and r"sed -E 's/^(.)[0-9]/\1/'" in note
    assert "digit" not in (_read(tmp_path / "b.conll", marked.replace("0", "").replace("1", "")).note or "")


def test_the_splits_of_a_folder(tmp_path: Path) -> None:
    for name in ("train.conll", "devel.tsv", "test.bio"):
        (tmp_path / name).write_text(PLAIN)
    assert {split: path.name for split, path in find_splits(tmp_path).items()} == {
        "train": "train.conll",
        "validation": "devel.tsv",
        "test": "test.bio",
    }
