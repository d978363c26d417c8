"""Bad inputs 17-36, CSV and TSV: each is read, read with a note, or refused with file and row."""

from __future__ import annotations

import csv
import io
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from messages import has_parts

from tunesmith.data.formats import raw, read_table
from tunesmith.tasks.text_classification import TextClassification
from tunesmith.training.dataset import Examples

Refuse = Callable[..., str]
Read = Callable[..., Examples]
SKIP = "data.on_bad_row=skip"
ROWS = [
    (f"the film was {word}, so {word}", ("pos", "neg")[n % 2]) for n, word in enumerate("great bad fine dull".split())
]


def _file(rows: Iterable[Iterable[object]], header: str = "text,label", delimiter: str = ",") -> str:
    """Return the rows as a spreadsheet writes them: quoted where needed."""
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows([header.split(","), *rows] if header else rows)
    return out.getvalue()


def _rows(read: Examples, split: str = "train") -> list[tuple[object, object]]:
    return [(row.values["text"], row.values["label"]) for row in read.splits[split].rows()]


@pytest.mark.parametrize("delimiter", ("\t", ",", ";", "|"))
@pytest.mark.parametrize("header", ("text,label", ""), ids=("header", "no header"))
def test_a7_17_the_delimiter_is_found_whatever_the_name(delimiter: str, header: str, read: Read) -> None:
    rows = [(f"{text}; or {n}", label) for n, (text, label) in enumerate(ROWS * 5)]
    found = read(_file(rows, header, delimiter), name="train.csv")
    assert _rows(found) == rows and len(found.notes) == (0 if header else 1)


@pytest.mark.parametrize("delimiter", ("\t", ";"))
def test_a7_17_long_texts_of_many_lines_do_not_hide_the_delimiter(delimiter: str, read: Read) -> None:
    rows = [(f"{text}\n\nSo, it was\n" * 30, label) for text, label in ROWS]
    assert _rows(read(_file(rows, delimiter=delimiter))) == rows


@pytest.mark.parametrize("delimiter", ("~", "^", ":", "    "))
def test_a7_17_an_unknown_delimiter_is_refused(delimiter: str, refuse: Refuse) -> None:
    said = refuse("".join(f"{delimiter.join(row)}\n" for row in [("text", "label"), *((n, "pos") for n in "abcdef")]))
    names = f"text{delimiter}label; "
    assert has_parts(said, "train.csv:1: ", "no column for text and label", names, "comma, tab, semicolon or |")


def test_a7_18_semicolons_with_decimal_commas_are_refused(refuse: Refuse) -> None:
    rows = [(f"{text} {n}", f"{n},5") for n, (text, _) in enumerate(ROWS * 5)]
    said = refuse(_file(rows, delimiter=";"))
    assert has_parts(said, "train.csv: label: '0,5' ", "19 ", "decimal comma; ", "0.5", "task.labels=single")
    said = refuse(_file(rows, delimiter=";"), "task.labels=regression")
    assert has_parts(said, "train.csv:2: label: '0,5' ", "finite number; ", "0.5", "or ")


def test_a7_18_semicolons_with_decimal_points_are_numbers(read: Read) -> None:
    rows = [(f"{text} {n}", f"{n}.5") for n, (text, _) in enumerate(ROWS * 5)]
    found = read(_file(rows, delimiter=";"))
    assert found.task.labels == "regression" and _rows(found) == rows  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("line", "parts"),
    (
        ("so warm", ("1 field,", "header has 2", "'so warm'; ", "missing field")),
        ("so warm,fine,pos", ("3 fields,", "header has 2", "'so warm | fine | pos'; ", "quote", "delimiter")),
        (f"{'so ' * 400},warm,pos", ("3 fields,", "header has 2", f"'{'so ' * 26}s…'; ", "quote", "delimiter")),
    ),
    ids=("19 short", "20 long", "20 very long"),
)
def test_a7_19_and_20_a_ragged_row_is_refused_or_skipped(
    line: str, parts: tuple[str, ...], refuse: Refuse, read: Read
) -> None:
    content = _file(ROWS) + f"{line}\nso dull,neg\n"
    assert has_parts(refuse(content), f"train.csv:6: {parts[0]}", *parts[1:], SKIP)
    found = read(content, on_bad_row="skip")
    assert _rows(found) == [*ROWS, ("so dull", "neg")]
    assert found.notes == ["train: skipped 1 row (wrong number of fields)"]


def test_a7_20_a_ragged_row_without_a_header_is_refused(refuse: Refuse) -> None:
    said = refuse(_file(ROWS * 5, header="") + "so,warm,pos\n")
    assert has_parts(said, "train.csv:21: 3 fields,", "first line has 2", "'so | warm | pos'; ", "quote")


OPEN = {
    "before whole rows": 'text,label\n"so warm,pos\nso dull,neg\nso fine,pos\n',
    "before a quoted row": 'text,label\n"so warm,pos\n"so dull",neg\nso fine,pos\n',
    "before a quotation mark in a row": 'text,label\n"so warm,pos\nso dull,neg\nso fine,pos\n5" long,neg\n',
    "text behind it": 'text,label\n"so" warm,pos\nso dull,neg\nso fine,pos\n',
}


@pytest.mark.parametrize("content", OPEN.values(), ids=OPEN.keys())
def test_a7_21_an_unclosed_quotation_mark_is_refused_and_costs_one_row(
    content: str, refuse: Refuse, read: Read
) -> None:
    said = refuse(content)
    what = ("unclosed quotation mark", "'\"so warm,pos'"), ("invalid quoting", "','")
    assert any(has_parts(said, "train.csv:2: ", *parts, "; ", "close", "double", SKIP) for parts in what)
    found = read(content, on_bad_row="skip")
    assert _rows(found)[:2] == [("so dull", "neg"), ("so fine", "pos")]
    assert found.notes == ["train: skipped 1 row (unclosed quotation mark)"]


def test_a7_21_such_a_row_does_not_take_a_long_file_into_memory(
    read: Read, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.data.formats.delimited.MAX_CHARS", 10_000)
    content = _file(ROWS) + '"so warm,pos\n' + _file(ROWS * 5000, header="").replace('"', "").replace(", so", " so")
    assert has_parts(refuse(content), "train.csv:6: unclosed quotation mark", "'\"so warm,pos'; ")
    found = read(content, on_bad_row="skip")
    assert found.rows == {"train": 20_004} and "skipped 1 row (" in found.notes[0]


def test_a7_21_in_a_tsv_without_quoting_quotation_marks_are_plain(read: Read) -> None:
    rows = [('"So warm" it was', "pos"), ('"so dull', "neg"), ("so fine", "pos"), ('5" long', "neg"), ('"', "pos")]
    plain = [(f"the film was {n}", "pos") for n in range(5000)]
    content = "".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *plain, *rows])
    assert _rows(read(content)) == plain + rows


def test_a7_21_in_a_tsv_with_quoting_an_open_one_is_refused(refuse: Refuse, read: Read) -> None:
    rows = [(f"{text}\nand\tmore", label) for text, label in ROWS]
    assert _rows(read(_file(rows, delimiter="\t"))) == rows  # each physical line has two fields, too
    rows = [(f"{text}\nand more", label) for text, label in ROWS]
    assert refuse(_file(rows, delimiter="\t") + '"so warm\tpos\n').startswith("train.csv:10: unclosed quotation mark")


@pytest.mark.parametrize("delimiter", ("\t", ",", ";"))
def test_a7_22_line_ends_inside_quotes_belong_to_the_text(delimiter: str, read: Read, refuse: Refuse) -> None:
    rows = [(f'{text}\n\n"so"{delimiter} {delimiter}', label) for text, label in ROWS]
    content = _file(rows, delimiter=delimiter)
    assert _rows(read(content)) == rows
    assert refuse(content + delimiter + "pos\n").startswith("train.csv:14: text: empty; ")


def test_a7_22_a_text_of_thousands_of_lines_is_one_text(read: Read) -> None:
    rows = [("line\n" * 5000 + text, label) for text, label in ROWS]
    assert _rows(read(_file(rows))) == rows


def test_a7_23_a_column_given_twice_is_refused(refuse: Refuse) -> None:
    said = refuse(_file([(*row, "x") for row in ROWS], "text,label,text"))
    assert has_parts(said, "train.csv:1: two columns ", "'text'; ", "rename")


def test_a7_23_columns_that_differ_in_case_are_refused_until_one_is_named(refuse: Refuse, read: Read) -> None:
    content = _file([(text, label, "other") for text, label in ROWS], "Text,label,text")
    assert has_parts(refuse(content), "train.csv:1: ", "'Text' and 'text'", "; ", "data.columns.text=NAME")
    assert _rows(read(content, columns={"text": "Text"})) == ROWS


def test_a7_23_a_column_given_twice_in_parquet_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    columns = [pa.array(["so warm", "so dull"]), pa.array(["pos", "neg"]), pa.array(["x", "y"])]
    pq.write_table(pa.Table.from_arrays(columns, ["text", "label", "text"]), tmp_path / "a.parquet")
    assert has_parts(refuse(tmp_path / "a.parquet"), "a.parquet:1: two columns ", "'text'; ", "rename")


def test_a7_24_a_missing_text_column_is_refused(refuse: Refuse) -> None:
    said = refuse(_file([(n, label) for n, (_, label) in enumerate(ROWS)], "number,label"))
    assert has_parts(said, "train.csv:1: no column for text ", "number, label; ", "data.columns.text=NAME")


def test_a7_24_many_long_names_are_shortened(refuse: Refuse) -> None:
    names = [f"{'long ' * 30}{n}" for n in range(60)]
    said = refuse(_file([[*names[:59], "pos"]] * 4, ",".join(names)), "data.columns.text=none")
    assert has_parts(said, "train.csv:1: no column 'none'; ", "long long", "…")


MISSPELT = {
    "txt,label": ("text", "data.columns.text=txt"),
    "text,lable": ("label", "data.columns.label=lable"),
    "Sentance,Lables": ("text and label", "data.columns.text=Sentance data.columns.label=Lables"),
    "revew,kind": ("text and label", "data.columns.text=revew data.columns.label=NAME"),
}


@pytest.mark.parametrize("header", MISSPELT)
def test_a7_25_a_misspelt_column_is_refused_with_the_nearest_name(header: str, refuse: Refuse) -> None:
    missing, fix = MISSPELT[header]
    names = header.replace(",", ", ")
    said = refuse(_file(ROWS, header))
    assert has_parts(said, f"train.csv:1: no column for {missing} ", f"{names}; did you mean {fix}?")


def test_a7_25_a_misspelt_name_in_the_recipe_is_refused_with_the_nearest(refuse: Refuse, command: Any) -> None:
    said = refuse(_file(ROWS, "kritik,urteil"), "data.columns={text: kritk, label: urteil}")
    assert has_parts(said, "train.csv:1: no column 'kritk'; ", "did you mean 'kritik'?")
    said = refuse(_file(ROWS, "kritik,urteil"), "data.columns={text: film, label: urteil}")
    assert has_parts(said, "train.csv:1: no column 'film'; ", "kritik, urteil")


def test_a7_25_a_role_that_is_none_is_refused(command: Any, write: Any) -> None:
    given = ("task=text-classification", "model=./none", f"data.train={write(_file(ROWS), 'train.csv')}")
    code, _, err = command("train", *given, "data.columns.txt=0", f"output={write('', 'x')}-run")
    assert code == 2 and has_parts(err, "error: ", "data.columns.txt: ", "no such column; did you mean 'text'?")


@pytest.mark.parametrize("header", (",text,label", "Unnamed: 0,text,label", "id,text,label", ",,text,label", ""))
def test_a7_26_an_extra_index_column_is_left_alone(header: str, read: Read) -> None:
    extra = max(header.count(",") - 1, 1)
    rows = [(*range(n, n + extra), f"{text} {n}", label) for n, (text, label) in enumerate(ROWS * 3)]
    assert _rows(read(_file(rows, header))) == [(row[-2], row[-1]) for row in rows]


def test_a7_26_row_names_without_a_name_of_their_own_are_refused(refuse: Refuse) -> None:
    said = refuse(_file([(n, *row) for n, row in enumerate(ROWS)]))
    assert has_parts(said, "train.csv:2: 3 fields,", "header has 2", "'0 | the film was great, so great | pos'; ")


@pytest.mark.parametrize("line", ("so warm,", "so warm,  ", 'so warm,""', "so warm,\t"))
def test_a7_27_a_blank_label_is_refused_or_skipped(line: str, refuse: Refuse, read: Read) -> None:
    content = _file(ROWS) + line + "\nso dull,neg\n"
    assert has_parts(refuse(content), "train.csv:6: label: empty; ", "remove the row", SKIP)
    found = read(content, on_bad_row="skip")
    assert _rows(found) == [*ROWS, ("so dull", "neg")] and found.notes == ["train: skipped 1 row (empty label)"]


def test_a7_27_a_blank_text_is_refused_or_skipped(refuse: Refuse, read: Read) -> None:
    content = _file(ROWS) + ",pos\n \t ,neg\n"
    assert has_parts(refuse(content), "train.csv:6: text: empty; ", "remove the row", SKIP)
    assert read(content, on_bad_row="skip").notes == ["train: skipped 2 rows (empty text)"]


def test_a7_28_blanks_around_a_label_are_none_of_it(read: Read) -> None:
    found = read("text, label\n" + "".join(f"so {n},{' ' * (n % 3)}{'pos' if n % 2 else 'neg'} \n" for n in range(12)))
    assert found.task.classes == ["neg", "pos"]  # type: ignore[attr-defined]


def test_a7_28_quotation_marks_behind_a_blank_are_quotation_marks(read: Read) -> None:
    content = 'text, label\n"so, warm", "pos"\n"so dull", "neg"\nso fine, "pos"\n'
    assert _rows(read(content)) == [("so, warm", "pos"), ("so dull", "neg"), ("so fine", "pos")]


def test_a7_29_one_and_one_point_zero_are_one_class(read: Read) -> None:
    found = read("text,label\n" + "".join(f"so {n},{('1', '1.0', ' 1', '0', '0.0', '00')[n]}\n" for n in range(6)))
    assert found.task.classes == ["0", "00", "1"]  # type: ignore[attr-defined]


WORDS = ("NA", "nan", "None", "null", "#N/A")


@pytest.mark.parametrize("word", WORDS)
def test_a7_30_a_word_for_a_missing_label_is_a_class_and_that_is_said(word: str, read: Read) -> None:
    found = read(_file([*ROWS, ("so far away", word), ("so very far", word)]))
    assert word in found.task.classes  # type: ignore[attr-defined]
    (note,) = found.notes
    assert has_parts(note, "2 train rows ", f"'{word}'", "class")


def test_a7_30_the_same_words_as_texts_are_texts(read: Read) -> None:
    rows = [(word, label) for word, (_, label) in zip(WORDS, ROWS, strict=False)]
    assert _rows(read(_file(rows))) == rows


def test_a7_30_parquet_s_missing_values_are_empty(refuse: Refuse, read: Read, tmp_path: Path) -> None:
    label = pa.array([1.0, 0.0, float("nan"), 1.0, None])
    pq.write_table(pa.table({"text": [f"so {n}" for n in range(5)], "label": label}), tmp_path / "a.parquet")
    assert has_parts(refuse(tmp_path / "a.parquet"), "a.parquet:3: label: empty; ", "remove the row", SKIP)
    found = read(tmp_path / "a.parquet", on_bad_row="skip")
    assert found.notes == ["train: skipped 2 rows (empty label)"] and found.rows == {"train": 3}


def test_a7_31_a_text_column_of_numbers_is_taken_and_that_is_said(read: Read) -> None:
    rows = [(f"{n * 7}.5", "pos" if n % 2 else "neg") for n in range(20)]
    found = read(_file(rows))
    assert _rows(found) == rows
    (note,) = found.notes
    assert has_parts(note, "text: ", "every value is a number; ", "data.columns.text=NAME")
    assert read(_file([*rows, ROWS[0]])).notes == []


@pytest.mark.parametrize("rest", ("\n", "", '"\n'), ids=("a line", "no end", "a quote"))
def test_a7_32_a_huge_field_is_refused_in_bounded_memory(
    rest: str, refuse: Refuse, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The field has a gigabyte; the limits and the field are divided by 256."""
    for module in ("raw", "delimited", "json_array"):
        monkeypatch.setattr(f"tunesmith.data.formats.{module}.MAX_CHARS", raw.MAX_CHARS // 256)
    path = tmp_path / "huge.csv"
    path.write_bytes(_file(ROWS).encode() + b"so very long " * (2**30 // 256 // 13) + rest.encode())
    said = refuse(path)
    assert has_parts(said, "huge.csv:6: ", "65,536 characters", "'so very long so very long so very long …'; ", "quot")
    tracemalloc.start()
    found = read(path, on_bad_row="skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 and _rows(found) == ROWS and found.notes[0].startswith("train: skipped 1 row (line too long)")


def test_a7_32_a_huge_field_of_many_lines_is_refused(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.formats.delimited.MAX_CHARS", 10_000)
    said = refuse(_file([*ROWS, ("so\n" * 10_000, "pos")]))
    assert has_parts(said, "train.csv:6: unclosed quotation mark", "'\"so'; ", "close")


@pytest.mark.parametrize("cell", ("=1+1", "=HYPERLINK(A1)", "+so", "-so", "@SUM(A1:A2)", "=cmd|' /C calc'!A0"))
def test_a7_33_a_formula_is_a_text(cell: str, read: Read) -> None:
    assert _rows(read(_file([*ROWS, (cell, "pos")])))[-1] == (cell, "pos")


def test_a7_34_columns_may_stand_in_another_order_in_another_split(read: Read, write: Any) -> None:
    other = [(label, f"{text} then") for text, label in ROWS]
    valid = write(_file(other, "label,text"), "valid.csv")
    test = write(_file(other * 3, ""), "test.csv")
    found = read(_file(ROWS * 3, ""), validation=str(valid), test=str(test))
    assert _rows(found, "validation") == [(text, label) for label, text in other]
    assert _rows(found, "test")[:4] == _rows(found, "validation") and _rows(found)[:4] == ROWS
    test_note, train_note = sorted(note.rpartition("/")[2] for note in found.notes[:2])
    assert has_parts(test_note, "test.csv: no header; ", "data.columns.text=1", "data.columns.label=0")
    assert has_parts(train_note, "train.csv: no header; ", "data.columns.text=0", "data.columns.label=1")


def test_a7_35_a_split_without_a_column_is_refused(refuse: Refuse, write: Any) -> None:
    valid = write(_file(ROWS, "text,topic"), "valid.csv")
    said = refuse(_file(ROWS), f"data.validation={valid}")
    assert has_parts(said, "valid.csv:1: no column for label ", "text, topic; ", "data.columns.label=NAME")


@pytest.mark.parametrize("lacking", ("train", "valid"))
def test_a7_35_a_second_text_in_one_split_only_is_refused(lacking: str, refuse: Refuse, write: Any) -> None:
    pairs = _file([(text, "so", label) for text, label in ROWS], "text,sentence2,label")
    train, valid = (_file(ROWS), pairs) if lacking == "train" else (pairs, _file(ROWS))
    has = "validation" if lacking == "train" else "train"
    said = refuse(train, f"data.validation={write(valid, 'valid.csv')}")
    what = f"{lacking}.csv: no column for text_pair", f"{has} has", "'sentence2'"
    assert has_parts(said, *what, "; ", "data.columns.text_pair=NAME", f"rename the column in {has}")


def test_a7_35_columns_that_nobody_reads_may_differ(read: Read, write: Any) -> None:
    valid = write(_file([(n, f"{text} then", label) for n, (text, label) in enumerate(ROWS)], "id,text,label"), "v.csv")
    assert read(_file(ROWS), validation=str(valid)).rows == {"train": 4, "validation": 4}


@pytest.mark.parametrize("above", ("# made today", "# made today, by us", "Reviews of 2024\n\nfirst sheet"))
def test_a7_36_lines_above_the_header_are_refused(above: str, refuse: Refuse) -> None:
    said = refuse(f"{above}\n{_file(ROWS)}")
    assert has_parts(said, "train.csv:1: ", "header is not on the first line", "'text, label'; ", "remove", "above")


def test_a7_36_a_comment_among_the_rows_is_refused_or_skipped(refuse: Refuse, read: Read) -> None:
    content = _file(ROWS) + "# checked up to here\n\nso dull,neg\n"
    said = refuse(content)
    assert has_parts(said, "train.csv:6: 1 field,", "header has 2", "'# checked up to here'; ", "comment", SKIP)
    assert _rows(read(content, on_bad_row="skip")) == [*ROWS, ("so dull", "neg")]


def test_a7_36_a_text_may_begin_with_a_hash(read: Read) -> None:
    rows = [(f"#happy {text}", label) for text, label in ROWS * 2]
    assert _rows(read(_file(rows, ""))) == rows and _rows(read(_file(rows))) == rows


def test_columns_are_named_by_number_with_and_without_a_header(read: Read, tmp_path: Path) -> None:
    task = TextClassification()
    swapped = [(label, text) for text, label in ROWS]
    for header in ("", "label,text", "a,b"):
        (tmp_path / "a.csv").write_text(_file(swapped * 3, header))
        named: dict[str, str | int] = {"text": 1, "label": 0}
        table = read_table(tmp_path / "a.csv", task.columns, named=named)
        assert [(row.values["text"], row.values["label"]) for row in table] == ROWS * 3
        assert (table.note is None) == (header != "a,b")  # 'a,b' could be a row
