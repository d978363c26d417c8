"""Tables: every format gives the same rows, with or without header and compression; writing round-trips."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import tempfile
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import has_parts

from tunesmith import registry
from tunesmith.data.formats import Row, Table, find_splits, read_lines, read_table
from tunesmith.errors import DataError
from tunesmith.tasks.text_classification import TextClassification

COLUMNS = TextClassification().columns
ROWS = [
    ("the film was great, so great", "pos"),
    ("the plot was very bad", "neg"),
    ("the acting was fine", "pos"),
    ("it was dull all over", "neg"),
]
DELIMITERS = {"csv": ",", "tsv": "\t", "csv with ;": ";", "csv with |": "|"}


def _table(rows: Iterable[tuple[str, str]], kind: str, header: bool = True, quoting: Any = csv.QUOTE_MINIMAL) -> bytes:
    rows = list(rows)
    if kind.startswith("json"):
        objects = [{"text": text, "label": label} for text, label in rows]
        lines = [json.dumps(row, ensure_ascii=len(rows) % 2 == 0) for row in objects]
        return ("\n".join([*lines, ""]) if kind == "jsonl" else f"[{', '.join(lines)}]").encode()
    out = io.StringIO()
    writer = csv.writer(out, delimiter=DELIMITERS[kind], quoting=quoting)
    writer.writerows([("text", "label"), *rows] if header else rows)
    return out.getvalue().encode()


def _read(path: Path, **options: Any) -> Table:
    return read_table(path, COLUMNS, **options)


def _values(table: Table) -> list[tuple[object, object]]:
    return [(row.values["text"], row.values["label"]) for row in table]


@pytest.mark.parametrize("compressed", (False, True), ids=("plain", "gz"))
@pytest.mark.parametrize("header", (True, False), ids=("header", "no header"))
@pytest.mark.parametrize("kind", (*DELIMITERS, "jsonl", "json"))
def test_each_format_gives_the_same_rows(kind: str, header: bool, compressed: bool, tmp_path: Path) -> None:
    content = _table(ROWS, kind, header)
    (tmp_path / "rows.txt").write_bytes(gzip.compress(content) if compressed else content)
    table = _read(tmp_path / "rows.txt")
    assert table.format == kind.split()[0]
    assert _values(table) == ROWS == _values(table), "it can be read again"
    named = header or kind.startswith("json")
    assert (table.note is None) == named and table.columns == (
        {"text": "text", "label": "label"} if named else {"text": 0, "label": 1}
    )
    first = 1 if kind.startswith("json") else 1 + header
    assert [row.place for row in table] == [f"{tmp_path}/rows.txt:{first + n}" for n in range(4)]


def test_parquet_gives_its_rows(tmp_path: Path) -> None:
    columns = {
        "review": [text for text, _ in ROWS],
        "stars": pa.array([Decimal("1.5"), Decimal("2.0"), None, Decimal("4.5")]),
        "sentence2": ["a", None, "", "b"],
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet", row_group_size=2)
    table = _read(tmp_path / "rows.parquet", on_bad_row="skip")
    assert table.format == "parquet" and table.columns == {"text": "review", "label": "stars", "text_pair": "sentence2"}
    rows = list(table)
    assert [row.values["label"] for row in rows] == [1.5, 2.0, 4.5] and rows[2].place.endswith(":4")
    assert [row.values.get("text_pair") for row in rows] == ["a", None, "b"]
    assert table.skipped == {"empty label": 1}


@pytest.mark.parametrize("where", (8, 200, -200, -20))
def test_a_damaged_parquet_file_is_refused(where: int, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [f"so {n}" for n in range(999)], "label": ["pos"] * 999}), tmp_path / "a")
    content = bytearray((tmp_path / "a").read_bytes())
    content[where : where + 8] = b"\xff" * 8
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=r"a: damaged Parquet file \(.+\); .*again"):
        list(_read(tmp_path / "a"))


@pytest.mark.parametrize("values", ([b"so"], [{"a": 1}]), ids=("bytes", "object"))
def test_values_of_parquet_that_are_none_are_refused(values: list[Any], tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["so"], "label": values}), tmp_path / "a")
    with pytest.raises(DataError, match=r"a:1: label: '.+' .*unsupported type; .*number"):
        list(_read(tmp_path / "a"))


def test_a_limit_counts_rows_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(_table([ROWS[0], ("", "neg"), *ROWS[1:]], "csv"))
    table = _read(tmp_path / "a.csv", limit=3, on_bad_row="skip")
    assert _values(table) == ROWS[:3] and table.skipped == {"empty text": 1}


def test_a_second_text_is_absent_where_it_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("premise,hypothesis,label\nso,warm,pos\nso,,neg\n")
    assert [row.values.get("text_pair") for row in _read(tmp_path / "a.csv")] == ["warm", None]


@pytest.mark.parametrize("name", ("Review", " TEXT ", "Sentence1", "评论", '"content"', "body"))
def test_usual_names_are_found_in_any_spelling(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{name},Label\nso warm,pos\nso dull,neg\n")
    assert _values(_read(tmp_path / "a.csv")) == [("so warm", "pos"), ("so dull", "neg")]


def test_the_first_of_several_usual_names_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("title,label,text,category\nT,pos,so warm,x\n")
    assert _read(tmp_path / "a.csv").columns == {"text": "text", "label": "label"}


def test_words_with_tags_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("He\tO\nlives\tO\n\nin\tO\nNew\tB-LOC\nYork\tI-LOC\n")
    with pytest.raises(DataError, match=r"a.conll:1: .*one word and tag per line \('B-LOC, I-LOC, O'\)"):
        _read(tmp_path / "a.conll")


@pytest.mark.parametrize("header", ("", "word,tag\n", "Sentence #,Word,Tag\n"))
@pytest.mark.parametrize("task", ("token-classification", "text-classification"))
def test_a_table_of_words_with_tags_is_told_how_it_is_read(header: str, task: str, tmp_path: Path) -> None:
    first = "Sentence: 1," if header.startswith("S") else ""
    words = [f"{first}{word}" for word in ("He,O", "lives,O", "in,O", "New,B-LOC", "York,I-LOC")]
    (tmp_path / "a.csv").write_text(header + "\n".join([*words, "", *words, ""]))
    columns = registry.get("task", task)().columns  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"a.csv:1: .*one word and tag per line \('B-LOC, I-LOC, O'\).*CoNLL"):
        read_table(tmp_path / "a.csv", columns)


@pytest.mark.parametrize("change", ("longer", "same size", "gone"))
def test_a_file_that_changes_while_it_is_used_is_noticed(change: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(_table(ROWS, "csv"))
    table = _read(path)
    assert _values(table) == ROWS
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(_table(ROWS, "csv").replace(b"pos", b"neg") + b"so,pos\n" * (change == "longer"))
    with pytest.raises(DataError, match=r"a\.csv: " + ("no such file" if change == "gone" else "the file has changed")):
        list(table)
    with pytest.raises(DataError):
        _ = table.sha256


def test_the_splits_of_a_folder(tmp_path: Path) -> None:
    for name in ("TRAINING.tsv", "val.json.gz", "testing.ndjson.gz", "test.txt.md", "train"):
        (tmp_path / name).write_text("")
    found = {split: path.name for split, path in find_splits(tmp_path).items()}
    assert found == {"train": "TRAINING.tsv", "validation": "val.json.gz", "test": "testing.ndjson.gz"}


def test_a_plain_text_is_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffSo warm.\r\n\r\n  Café, é.\n".encode())
    first, blank, last = read_lines(tmp_path / "a.txt", "text")
    place = f"{tmp_path}/a.txt"
    assert (first, last) == (Row(f"{place}:1", {"text": "So warm."}), Row(f"{place}:3", {"text": "Café, é."}))
    assert isinstance(blank, DataError) and str(blank).startswith(f"{place}:2: text: empty; ")
    (tmp_path / "a.txt").write_bytes(b"so\ncaf\xe9\n")
    _, bad = read_lines(tmp_path / "a.txt", "text")
    assert has_parts(str(bad), f"{place}:2: byte 0xe9 ", "not UTF-8", "'caf?'; ", "UTF-8")


@pytest.mark.parametrize(
    ("content", "said"),
    (
        (b"", "a.txt: .*empty; "),
        (b"%PDF-1.7", "a.txt: unsupported format: .*PDF.*; "),
        (None, "a.txt: no such file; .*path"),
    ),
)
def test_a_plain_text_that_is_none_is_refused(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_lines(tmp_path / "a.txt", "text")
    assert re.match(f"{tmp_path}/{said}", str(caught.value))


WORDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12).filter(str.strip)
TABLES = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8)


@given(
    rows=TABLES, kind=st.sampled_from(tuple(DELIMITERS)), quoting=st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_what_a_csv_writer_writes_comes_back(rows: list[tuple[str, str]], kind: str, quoting: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.write_bytes(_table(rows, kind, quoting=quoting))
        assert _values(_read(path)) == [(text, label.strip()) for text, label in rows]


@given(rows=TABLES, kind=st.sampled_from(("jsonl", "json")))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_a_json_writer_writes_comes_back(rows: list[tuple[str, str]], kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.write_bytes(_table(rows, kind))
        assert _values(_read(path)) == [(text, label.strip()) for text, label in rows]


@given(content=st.one_of(st.binary(max_size=200), st.text("\t\n\r,;|\"'{}[]:\\ \0aé1OB-", max_size=60).map(str.encode)))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_content_ends_in_anything_but_rows_or_a_refusal(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        for start in (b"", b"text,label\n", b"text\tlabel\n", b'{"text": "a", "label": "b"}\n', b"["):
            path.write_bytes(start + content)
            try:
                table = _read(path, on_bad_row="skip")
                rows = list(table)
            except DataError as error:
                assert str(error).startswith(str(path)) and error.hint
            else:
                assert rows or table.skipped
                assert all(str(row.values["text"]).strip() and "label" in row.values for row in rows)
