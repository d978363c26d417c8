"""Line-aligned files and objects of translations give the same rows as a table of two columns."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tunesmith.data import splits
from tunesmith.data.formats import Table, find_splits, read_raw, read_table
from tunesmith.data.formats.parallel import display_path, language_of, sides_of
from tunesmith.errors import DataError, RecipeError
from tunesmith.tasks.translation import Translation

ROWS = [("A dog runs.", "Ein Hund rennt."), ("Two men!", "Zwei Männer!"), ("Snow, white snow", "Schnee, weißer Schnee")]
SHARED = Path(__file__).parents[4] / "shared" / "data"


def _read(path: Path, source: str | None = "en", target: str | None = "de", **options: object) -> Table:
    task = Translation(source_lang=source, target_lang=target)
    return read_table(path, task.columns, **options)  # type: ignore[arg-type]


def _values(table: Table) -> list[tuple[object, object]]:
    return [(row.values["source"], row.values["target"]) for row in table]


def _write(folder: Path, stem: str = "train", ends: tuple[str, str] = ("en", "de"), rows: object = ROWS) -> Path:
    for side, texts in zip(ends, zip(*rows, strict=True), strict=True):  # type: ignore[call-overload]
        content = "".join(f"{text}\n" for text in texts).encode()
        (folder / f"{stem}.{side}").write_bytes(gzip.compress(content) if side.endswith(".gz") else content)
    return folder / stem


@pytest.mark.parametrize("ends", [("en", "de"), ("en.gz", "de.gz"), ("eng", "deu"), ("en_XX.txt", "de_DE.txt")])
def test_files_are_named_by_what_they_share(tmp_path: Path, ends: tuple[str, str]) -> None:
    table = _read(_write(tmp_path, ends=ends))
    assert table.format == "parallel" and _values(table) == ROWS == _values(table), "it can be read again"
    side = [end.partition(".")[0] for end in ends]
    assert table.columns == {"source": side[0], "target": side[1]}
    rest = ends[0][len(side[0]) :]
    assert [row.place for row in table][1] == f"{tmp_path}/train.{{{side[0]},{side[1]}}}{rest}:2"
    assert _values(_read(tmp_path / "train", "de", "en")) == [row[::-1] for row in ROWS]


def test_names_without_a_language_of_their_own(tmp_path: Path) -> None:
    assert _values(_read(_write(tmp_path, ends=("src", "tgt")), None, None)) == ROWS
    assert _values(_read(_write(tmp_path, "news.en-de", ("en", "de")))) == ROWS


def test_of_many_languages_two_are_read(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "train.fr").write_text("Un chien\n")  # another length, not used
    assert _values(_read(tmp_path / "train")) == ROWS
    with pytest.raises(DataError, match="direction .*de, en, fr; .*task.source_lang"):
        _read(tmp_path / "train", None, None)


def test_one_language_is_enough_where_two_are_there(tmp_path: Path) -> None:
    path = _write(tmp_path)
    assert _read(path, None, "en").columns == {"target": "en", "source": "de"}
    assert Translation(target_lang="en").with_columns(_read(path, None, "en").columns).source_lang == "de"
    with pytest.raises(
        DataError, match=r"not set; languages: de, en; set task\.source_lang=de task\.target_lang=en, or the reverse"
    ):
        _read(path, None, None)


def test_objects_of_translations(tmp_path: Path) -> None:
    lines = [json.dumps({"id": n, "translation": {"en": en, "de": de}}) for n, (en, de) in enumerate(ROWS)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text(f"[{','.join(lines)}]")
    assert _values(_read(tmp_path / "a.jsonl")) == ROWS == _values(_read(tmp_path / "a.json"))
    plain = [json.dumps({"source": en, "translation": de}) for en, de in ROWS]  # a text in that column is the target
    (tmp_path / "b.jsonl").write_text("\n".join(plain))
    assert _values(_read(tmp_path / "b.jsonl")) == ROWS
    other = [json.dumps({"translate": {"en": en, "de": de}}) for en, de in ROWS]
    (tmp_path / "c.jsonl").write_text("\n".join(other))
    assert _values(_read(tmp_path / "c.jsonl")) == ROWS


@pytest.mark.parametrize("names", [("source", "target"), ("en", "de"), ("English", "German"), ("src", "tgt")])
def test_tables_by_usual_names_and_by_languages(tmp_path: Path, names: tuple[str, str]) -> None:
    (tmp_path / "a.tsv").write_text("\n".join("\t".join(row) for row in [names, *ROWS]))
    table = _read(tmp_path / "a.tsv")
    assert _values(table) == ROWS and table.columns == {"source": names[0], "target": names[1]}


def test_without_header_the_first_two_columns_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("\n".join(f"{n}\t{en}\t{de}\tby someone" for n, (en, de) in enumerate(ROWS)))
    table = _read(tmp_path / "a.tsv")
    assert _values(table) == ROWS and "assuming data.columns.source=1 and data.columns.target=2" in str(table.note)


def test_a_short_sentence_above_longer_ones_is_no_name_of_a_column(tmp_path: Path) -> None:
    rows = [
        ("Hi.", "嗨。"),
        *((f"This is sentence number {n} of many", f"这是许多句子中的第{n}句话，它很长") for n in range(9)),
    ]
    (tmp_path / "a.tsv").write_text("\n".join("\t".join(row) for row in rows))
    assert _values(_read(tmp_path / "a.tsv", "en", "zh", named={"source": 0, "target": 1})) == rows


def test_chinese_names_of_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("原文,译文\nhello there,你好\ngood day,日安\n")
    assert _values(_read(tmp_path / "a.csv", None, None)) == [("hello there", "你好"), ("good day", "日安")]


def test_a_file_that_ends_early_is_refused_with_both_names(tmp_path: Path) -> None:
    path = _write(tmp_path)
    (tmp_path / "train.de").write_text("Ein Hund rennt.\n")
    table = _read(path, on_bad_row="skip")
    with pytest.raises(DataError, match=r"train\.en:2: train\.de .*1 line\b.*train\.en .*; .*aligned"):
        list(table)


def test_an_empty_line_on_either_side_is_a_bad_row(tmp_path: Path) -> None:
    path = _write(tmp_path, rows=[ROWS[0], ("Two men!", " "), ("", "Schnee")])
    with pytest.raises(DataError, match=r"train\.\{en,de\}:2: de: empty; .*remove the row.*data\.on_bad_row=skip"):
        list(_read(path))
    table = _read(path, on_bad_row="skip")
    assert _values(table) == ROWS[:1] and table.skipped == {"empty target": 1, "empty source": 1}


def test_a_byte_that_is_no_text_names_its_file(tmp_path: Path) -> None:
    path = _write(tmp_path)
    (tmp_path / "train.de").write_bytes("Ein Hund\nM\xe4nner\nSchnee\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.\{en,de\}:2: train\.de: byte 0xe4 is not UTF-8"):
        list(_read(path))


def test_a_folder_of_splits(tmp_path: Path) -> None:
    for stem in ("train", "val", "test_2016_flickr"):
        _write(tmp_path, stem, ("en.gz", "de.gz"))
    found = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
    assert find_splits(tmp_path, pairs=True) == {name: tmp_path / stem for name, stem in found.items()}
    assert find_splits(tmp_path) == {}, "only of a task that asks for pairs"
    _write(tmp_path, "test_2017", ("en", "de"))
    with pytest.raises(DataError, match="test_2016_flickr and test_2017 .*; .*data.test"):
        find_splits(tmp_path, pairs=True)


def test_what_is_no_pair(tmp_path: Path) -> None:
    for name in ("train.csv", "train.md", "train.log", "notes.en"):
        (tmp_path / name).write_text("a\n")
    assert sides_of(tmp_path / "train") == sides_of(tmp_path / "notes") == sides_of(tmp_path / "none" / "x") == {}
    with pytest.raises(DataError, match="no such file"):
        _read(tmp_path / "train")
    assert language_of(Path("test.de.gz")) == "de" and language_of(Path("test.csv")) is None
    _write(tmp_path, "dev")
    assert display_path(tmp_path / "dev", ["en", "de"]).name == "dev.{en,de}"


def test_a_change_of_either_file_is_another_hash_and_is_noticed(tmp_path: Path) -> None:
    table = _read(_write(tmp_path))
    before = table.sha256
    (tmp_path / "train.de").write_text("Ein Hund\nZwei\nSchnee\n")
    with pytest.raises(DataError, match="train: .*has changed .*; "):
        list(table)
    assert _read(tmp_path / "train").sha256 != before


def test_the_training_files_are_no_test_files(tmp_path: Path) -> None:
    path = _write(tmp_path)
    with pytest.raises(DataError, match=r"data\.test is the training file"):
        splits.refuse_same_file(path, path, "test")
    splits.refuse_same_file(path, _write(tmp_path, "test"), "test")


def test_a_role_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.columns\.sorce: .*no such column; did you mean 'source'"):
        _read(_write(tmp_path), named={"sorce": "en"})


def test_raw_rows_for_conversion(tmp_path: Path) -> None:
    names, rows = read_raw(_write(tmp_path))
    assert list(names) == ["de", "en"] and [(row.values["en"], row.values["de"]) for row in rows()] == ROWS  # type: ignore[union-attr]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_real_files_are_read_as_they_are() -> None:
    folder = SHARED / "multi30k_en_de"
    counts = {name: len(list(_read(path))) for name, path in find_splits(folder, pairs=True).items()}
    assert counts == {"train": 29000, "validation": 1014, "test": 1000}
    table = _read(SHARED / "tatoeba_en_zh" / "cmn.txt.gz", "en", "zh")
    assert len(list(table)) == 29155 and table.columns == {"source": 0, "target": 1}
