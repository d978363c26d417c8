"""Conversion between all formats keeps the rows; no file is overwritten or left incomplete."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith import registry
from tunesmith.data.formats import read_raw, read_table
from tunesmith.data.formats.raw import RawRow
from tunesmith.data.formats.write import WRITERS
from tunesmith.errors import DataError, RecipeError
from tunesmith.inspect_data.convert import convert

TABLES = [kind for kind in WRITERS if kind != "conll"]
ROWS = [
    {"text": "plain words", "label": "a", "note": "x"},
    {"text": 'a "quoted", comma; tab\there', "label": "b", "note": "|"},
    {"text": "two\nlines", "label": "甲", "note": "emoji 🎬 and é"},
]


def _rows(path: Path) -> list[dict[Any, Any]]:
    _, rows = read_raw(path)
    return [raw.values for raw in rows() if isinstance(raw, RawRow)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(TABLES, 2)))
def test_a_round_trip_changes_nothing(first: str, second: str, source: Path, tmp_path: Path) -> None:
    one, two, back = tmp_path / f"one.{first}", tmp_path / f"two.{second}.gz", tmp_path / "back.jsonl"
    two = two if second != "parquet" else tmp_path / "two.parquet"
    assert convert(source, one)["rows"] == convert(one, two)["rows"] == convert(two, back)["rows"] == 3
    assert _rows(one) == _rows(two) == ROWS and back.read_bytes().count(b"\n") == 3 and _rows(back) == ROWS


def test_kinds_of_values_are_kept_where_the_format_has_them(tmp_path: Path) -> None:
    rows = [
        {"n": 1, "f": 0.5, "b": True, "l": ["x", "y"], "o": {"k": 1}},
        {"n": None, "f": 2, "b": False, "l": [], "o": None},
    ]
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    convert(source, tmp_path / "rows.parquet")
    convert(tmp_path / "rows.parquet", tmp_path / "back.json")
    assert _rows(tmp_path / "back.json") == rows
    convert(source, tmp_path / "rows.csv")
    assert _rows(tmp_path / "rows.csv")[0] == {"n": "1", "f": "0.5", "b": "True", "l": '["x", "y"]', "o": '{"k": 1}'}


@pytest.mark.parametrize("table", ("csv", "tsv"))
def test_lists_and_conversations_come_back_from_a_table(table: str, tmp_path: Path) -> None:
    rows = [
        {
            "tokens": ["EU", "[1]"], "tags": ["B-ORG", "O"], "said": "[sic]", "n": "[1]" if n else "one", "note": None,
            "messages": [{"role": "user", "content": f'"{n}",\n'}, {"role": "assistant", "content": "[1]"}],
        }
        for n in range(3)
    ]  # fmt: skip
    source, there, back = tmp_path / "rows.jsonl", tmp_path / f"rows.{table}", tmp_path / "back.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    convert(source, there)
    convert(there, back)
    assert _rows(back) == [row | {"note": ""} for row in rows]
    for task, role in (("token-classification", "tokens"), ("text-generation", "messages")):
        read = read_table(there, registry.get("task", task)().columns)  # type: ignore[attr-defined]
        assert [row.values[role] for row in read] == [row[role] for row in rows]


def test_texts_become_rows(tmp_path: Path) -> None:
    folder = tmp_path / "letters"
    folder.mkdir()
    for name, text in (("a.txt", "Dear Ann\n\nyours, Bob\n"), ("b.txt", "No, no.\n"), ("c.jpg", "")):
        (folder / name).write_text(text)
    assert convert(folder, tmp_path / "folder.jsonl")["rows"] == 2
    assert _rows(tmp_path / "folder.jsonl") == [{"text": "Dear Ann\n\nyours, Bob"}, {"text": "No, no."}]
    assert convert(folder / "a.txt", tmp_path / "blank.jsonl")["columns"] == ["text"]
    assert _rows(tmp_path / "blank.jsonl") == [{"text": "Dear Ann"}, {"text": "yours, Bob"}]
    (folder / "b.txt").write_bytes(b"No, \xff no.\n")
    with pytest.raises(DataError, match=rf"^{folder / 'b.txt'}:1: byte 0xff is not UTF-8"):
        convert(folder, tmp_path / "bad.jsonl")
    (folder / "c.csv").write_text("text\na\n")
    with pytest.raises(DataError, match="a folder, not a file; "):
        convert(folder, tmp_path / "more.jsonl")


def test_a_column_that_only_late_rows_have_is_there(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"a": "x"} | ({"b": 1.5} if n > 2000 else {})) + "\n" for n in range(2100)))
    convert(source, tmp_path / "rows.parquet")
    found = _rows(tmp_path / "rows.parquet")
    assert found[0] == {"a": "x", "b": None} and found[-1] == {"a": "x", "b": 1.5}


def test_without_a_header_columns_are_numbered(tmp_path: Path) -> None:
    source = tmp_path / "rows.tsv"
    source.write_text("a rather long and moving film\t1\nanother film, and a dull one\t0\n" * 3)
    assert convert(source, tmp_path / "rows.jsonl")["columns"] == ["column_0", "column_1"]
    assert convert(source, tmp_path / "other.jsonl", header=True)["rows"] == 5


def test_a_bad_row_stops_it_or_is_counted(tmp_path: Path) -> None:
    source, output = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    source.write_text("text,label\nfine,1\nshort\ndull,0\n")
    with pytest.raises(DataError, match=r"rows.csv:3: 1 field, .* or set --skip-bad-rows"):
        convert(source, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv"]
    assert convert(source, output, skip=True)["skipped"] == {"wrong number of fields": 1}
    assert len(_rows(output)) == 2


def test_what_parquet_cannot_hold_is_said(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"a": 1}\n{"a": "x"}\n')
    with pytest.raises(DataError, match=rf"^{source}: Parquet .*single type"):
        convert(source, tmp_path / "rows.parquet")
    assert not (tmp_path / "rows.parquet").exists()


def test_words_with_tags_there_and_back(tmp_path: Path) -> None:
    source = tmp_path / "train.conll"
    source.write_text("-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\nPeter NNP B-PER\nspoke VBD O\n")
    assert convert(source, tmp_path / "train.jsonl")["columns"] == ["tokens", "column_1", "tags"]
    assert _rows(tmp_path / "train.jsonl")[1] == {
        "tokens": ["Peter", "spoke"], "column_1": ["NNP", "VBD"], "tags": ["B-PER", "O"],
    }  # fmt: skip
    convert(tmp_path / "train.jsonl", tmp_path / "back.conll")
    assert (tmp_path / "back.conll").read_text() == source.read_text().partition("O\n\n")[2].replace(" ", "\t") + "\n"


def test_a_word_that_looks_like_a_comment_comes_back(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [{"tokens": ["#", "#Ann", "x"], "tags": ["ORG", "PER", "O"]}, {"tokens": ["y"], "tags": ["O"]}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert(source, tmp_path / "rows.conll")
    convert(tmp_path / "rows.conll", tmp_path / "back.jsonl")
    assert _rows(tmp_path / "back.jsonl") == rows


def test_a_name_above_two_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label,label\na,x,y\n")
    with pytest.raises(DataError, match=r"rows.csv:1: two columns have the name 'label'"):
        convert(tmp_path / "rows.csv", tmp_path / "rows.jsonl")


def test_spans_and_tags_are_made_from_each_other(tmp_path: Path) -> None:
    rows = [
        {"text": "Ann lives in New York.", "spans": [[0, 3, "PER"], {"start": 13, "end": 21, "label": "LOC"}], "id": 7},
        {"text": "nobody in 北京", "spans": [{"start": 10, "end": 12, "label": "LOC"}], "id": 8},
    ]
    source, conll, back = tmp_path / "rows.jsonl", tmp_path / "rows.conll", tmp_path / "back.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert convert(source, conll)["left_out"] == ["id"]
    assert conll.read_text().startswith("Ann\tB-PER\nlives\tO\nin\tO\nNew\tB-LOC\nYork\tI-LOC\n.\tO\n\nnobody\tO\n")
    assert convert(conll, back, spans=True)["columns"] == ["text", "spans"]
    first = [{"start": 0, "end": 3, "label": "PER"}, {"start": 13, "end": 21, "label": "LOC"}]
    assert _rows(back) == [
        {"text": "Ann lives in New York .", "spans": first},
        {key: rows[1][key] for key in ("text", "spans")},
    ]
    kept = convert(source, tmp_path / "kept.jsonl", spans=True)
    assert kept["columns"] == ["text", "spans", "id"] and _rows(tmp_path / "kept.jsonl")[1] == rows[1]
    with pytest.raises(RecipeError, match="CoNLL cannot represent spans"):
        convert(source, tmp_path / "more.conll", spans=True)


@pytest.mark.parametrize("skip", (True, False))
def test_a_row_whose_spans_fit_no_words_is_a_bad_one(skip: bool, tmp_path: Path) -> None:
    source, output = tmp_path / "rows.jsonl", tmp_path / "rows.conll"
    source.write_text('{"text": "a b", "spans": [[0, 1, "X"]]}\n{"text": "ab", "spans": [[0, 1, "X"]]}\n')
    if skip:
        assert (
            convert(source, output, skip=True)["skipped"] == {"unusable tags": 1}
            and output.read_text() == "a\tB-X\nb\tO\n\n"
        )
        return
    with pytest.raises(DataError, match=rf"^{source}:2: spans: .* or set --skip-bad-rows"):
        convert(source, output)


@pytest.mark.parametrize(
    ("row", "said"),
    (
        ({"text": "a"}, "^{}:1: no column for label .*; .*tags"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "^{}:1: tags: 1 tag for 2 words; .*--skip-bad-rows"),
        ({"tokens": ["a\tb"], "tags": ["O"]}, "^{}:1: .*a tab or a line end"),
        ({"tokens": ["-DOCSTART-"], "tags": ["O"]}, "^{}:1: .*document separator; .*jsonl"),
        ({"tokens": ["New York"], "tags": ["O"]}, "^{}:1: .*space.*; .*split the word.*jsonl"),
        ({"text": "New York", "spans": [[0, 5, "X"]]}, "^{}:1: spans: .* splits the word 'York'"),
    ),
)
def test_what_conll_cannot_hold(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=said.format(source)):
        convert(source, tmp_path / "rows.conll")


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there.csv").write_text("mine")
    with pytest.raises(RecipeError, match="not overwritten"):
        convert(source, tmp_path / "there.csv")
    assert (tmp_path / "there.csv").read_text() == "mine"


def test_the_command(command: Any, source: Path, tmp_path: Path) -> None:
    code, out, err = command("data", "convert", str(source), str(tmp_path / "out.data"), "--to", "tsv", "--json")
    assert code == 0 and json.loads(out)["rows"] == 3 and "wrote 3 rows as tsv" in err
    assert command("data", "convert", str(source), str(tmp_path / "out.csv.gz"))[0] == 0
    assert gzip.decompress((tmp_path / "out.csv.gz").read_bytes()).startswith(b"text,label,note\n")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    (
        (("source.jsonl", "out.xlsx"), 2, "no known output format"),
        (("source.jsonl", "out.csv", "--to", "jsnl"), 2, "did you mean 'jsonl'?"),
        (("source.jsonl", "none/out.csv"), 2, "the folder does not exist"),
        (("none.jsonl", "out.csv"), 3, "no such file"),
        (("source.jsonl", "source.jsonl"), 2, "not overwritten"),
    ),
)
def test_what_cannot_be_converted(
    words: tuple[str, ...], code: int, said: str, command: Any, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    found, out, err = command("data", "convert", *words)
    assert found == code and out == "" and err.count("\n") == 1 and said in err
