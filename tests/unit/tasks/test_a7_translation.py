"""Bad inputs of translation: exit code 3 with file, line, value and fix, a counted skip, or a finding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from messages import has_parts

from tunesmith.inspect_data.check import check
from tunesmith.recipe import Data
from tunesmith.tasks.translation import Translation
from tunesmith.testing import sample_row
from tunesmith.training import dataset

Command = Callable[..., tuple[int, str, str]]
PAIRS = [(f"the dog number {n} runs", f"der Hund Nummer {n} rennt") for n in range(30)]
LANGUAGES = ("task.source_lang=en", "task.target_lang=de")


def _parallel(folder: Path, rows: list[tuple[str, str]] = PAIRS, missing: int = 0) -> str:
    (folder / "train.en").write_text("".join(f"{en}\n" for en, _ in rows))
    (folder / "train.de").write_text("".join(f"{de}\n" for _, de in rows[: len(rows) - missing]))
    return "train"


def _tsv(folder: Path, rows: list[tuple[str, str]] = PAIRS) -> str:
    (folder / "pairs.tsv").write_text("".join(f"{en}\t{de}\n" for en, de in [("en", "de"), *rows]))
    return "pairs.tsv"


def _jsonl(folder: Path, rows: list[object]) -> str:
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return "pairs.jsonl"


def _refused(command: Command, folder: Path, data: str, *words: str) -> str:
    given = ("task=translation", "model=./none", f"data.train={folder / data}", f"output={folder / 'run'}")
    code, out, err = command("train", *given, *words)
    line = err.splitlines()[-1].removeprefix("error: ")
    assert code == 3 and out == "" and "; " in line, err
    return line.replace(f"{folder}/", "")


def _with(place: int, row: tuple[str, str]) -> list[tuple[str, str]]:
    return [*PAIRS[: place - 1], row, *PAIRS[place:]]


@pytest.mark.parametrize("empty", ["", "   ", "\u3000"])
def test_a7_97_an_empty_target_is_refused_by_its_line(empty: str, command: Command, tmp_path: Path) -> None:
    rows = _with(7, ("the dog", empty))
    said = _refused(command, tmp_path, _parallel(tmp_path, rows), *LANGUAGES)
    assert has_parts(said, "train.{en,de}:7: de: empty; ", "remove the row", "data.on_bad_row=skip")
    said = _refused(command, tmp_path, _tsv(tmp_path, rows), *LANGUAGES)
    assert said.startswith("pairs.tsv:8: de: empty; ")
    objects: list[object] = [{"translation": {"en": en, "de": de}} for en, de in rows]
    assert _refused(command, tmp_path, _jsonl(tmp_path, objects), *LANGUAGES).startswith("pairs.jsonl:7: de: empty")
    objects = [{"source": en, "target": de} for en, de in rows]
    assert _refused(command, tmp_path, _jsonl(tmp_path, objects)).startswith("pairs.jsonl:7: target: empty")


def test_a7_97_or_is_skipped_and_counted(tmp_path: Path) -> None:
    name = _parallel(tmp_path, _with(7, ("the dog", "")))
    task = Translation(source_lang="en", target_lang="de")
    read = dataset.read(task, Data(train=str(tmp_path / name), validation=None, on_bad_row="skip"), seed=0)
    assert read.rows == {"train": 29} and read.notes == ["train: skipped 1 row (empty target)"]


def test_a_target_that_is_missing_or_none(command: Command, tmp_path: Path) -> None:
    rows: list[object] = [{"translation": {"en": en, "de": de}} for en, de in PAIRS]
    for bad, *parts in (
        ({"translation": {"en": "a dog"}}, "de: missing; ", "remove the row"),
        ({"translation": {"en": "a dog", "de": None}}, "de: empty; ", "remove the row"),
        ({"translation": {"en": "a dog", "de": 7}}, "de: '7' is not a text; ", "quotes"),
        ({"translation": {"en": "a dog", "de": ["x"]}}, "de: '['x']' is not a text; ", "one text"),
        ({"translation": "a dog"}, "en: missing; "),
        ({"id": 3}, "en: missing; "),
    ):
        name = _jsonl(tmp_path, [*rows[:2], bad, *rows[2:]])
        said = _refused(command, tmp_path, name, *LANGUAGES)
        assert has_parts(said, f"pairs.jsonl:3: {parts[0]}", *parts[1:])


def test_keys_that_are_not_the_languages_that_were_said(command: Command, tmp_path: Path) -> None:
    rows: list[object] = [{"translation": {"english_text": en, "german_text": de}} for en, de in PAIRS]
    said = _refused(command, tmp_path, _jsonl(tmp_path, rows), *LANGUAGES)
    fix = "did you mean data.columns.source=english_text data.columns.target=german_text?"
    assert has_parts(said, "pairs.jsonl:1: no column for source and target ", "english_text, german_text; ", fix)


def test_a7_98_targets_that_are_sources(command: Command, tmp_path: Path) -> None:
    most = [(en, en) for en, _ in PAIRS[:20]] + PAIRS[20:]
    said = _refused(command, tmp_path, _parallel(tmp_path, most), *LANGUAGES)
    assert has_parts(said, "train: ", "target equals source", "20 of 30 rows; ", "data.columns.target=NAME")
    found = check(str(tmp_path / _parallel(tmp_path, _with(4, ("Anna", "Anna")))), ("task=translation", *LANGUAGES))
    (one,) = [one for one in found["findings"] if one["kind"] == "copied-source"]
    assert (
        one["level"] == "warning"
        and one["faults"][0]["file"].endswith("train.{en,de}")
        and one["faults"][0]["line"] == 4
    )


def test_unequal_files_are_refused_with_both_names(command: Command, tmp_path: Path) -> None:
    said = _refused(command, tmp_path, _parallel(tmp_path, missing=2), *LANGUAGES, "data.on_bad_row=skip")
    assert has_parts(said, "train.en:29: ", "train.de", "28 lines", "train.en", "; ", "aligned")


def test_languages_that_are_not_said(command: Command, tmp_path: Path) -> None:
    said = _refused(command, tmp_path, _parallel(tmp_path))
    assert has_parts(said, "train:1: ", "direction", "de, en; ", "task.source_lang=de task.target_lang=en")
    said = _refused(command, tmp_path, _tsv(tmp_path))
    assert has_parts(said, "pairs.tsv:1: ", "direction", "en, de; ", "task.source_lang=en task.target_lang=de")


def test_a_language_that_is_not_there(command: Command, tmp_path: Path) -> None:
    said = _refused(command, tmp_path, _parallel(tmp_path), "task.source_lang=en", "task.target_lang=fr")
    assert has_parts(said, "train:1: no column for target ", "de, en; ", "data.columns.target=NAME")


@pytest.mark.parametrize(
    ("named", "parts"),
    [
        ("zz", ("task.target_lang: 'zz'", "'de'; ", "task.target_lang=de", "data.columns.target=")),
        ("klingon", ("unknown language 'klingon'; ", "code", "English name")),
    ],
)
def test_a_language_that_nobody_knows(named: str, parts: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    data, base = tmp_path / _parallel(tmp_path), "model=./none"
    words = base, f"data.train={data}", "task.source_lang=en", f"task.target_lang={named}"
    code, _, err = command("train", "task=translation", *words)
    assert code == 2 and has_parts(err, "error: ", *parts)


def test_the_other_way_round_is_seen_by_the_script(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("".join(f"number {n}\t第{n}号\n" for n in range(30)))
    said = _refused(command, tmp_path, "a.tsv", "task.source_lang=zh", "task.target_lang=en")
    assert has_parts(said, "a.tsv: ", "script of en", "zh", "swapped; ", "data.columns")


def test_exchanged_rows_are_named_by_data_check(tmp_path: Path) -> None:
    rows = _with(9, ("der Hund Nummer 8 rennt", "the dog number 8 runs"))
    found = check(str(tmp_path / _tsv(tmp_path, rows)), ("task=translation", *LANGUAGES))
    (one,) = [one for one in found["findings"] if one["kind"] == "swapped-pair"]
    assert [fault["line"] for fault in one["faults"]] == [10] and found["errors"] == 0


def test_the_same_source_with_two_targets_is_no_conflict(tmp_path: Path) -> None:
    name = _tsv(tmp_path, [*PAIRS, (PAIRS[0][0], "jener Hund rennt")])
    kinds = {one["kind"] for one in check(str(tmp_path / name), ("task=translation", *LANGUAGES))["findings"]}
    assert "label-conflict" not in kinds and "duplicate" in kinds


def test_sound_pairs_have_no_finding_and_targets_beyond_the_limit_one(tiny_marian: Path, tmp_path: Path) -> None:
    rows = [sample_row("translation", n) for n in range(40)]
    pairs = [(f"{row['source']} {n}", str(row["target"])) for n, row in enumerate(rows)]
    pairs[4] = (pairs[4][0], "a bad plot " * 9)
    words = ("task=translation", *LANGUAGES, "data.max_length=16", "technique=full")
    found = check(str(tmp_path / _parallel(tmp_path, pairs)), words, model=str(tiny_marian))
    kinds = {one["kind"]: one for one in found["findings"]}
    assert check(str(tmp_path))["task"] == "translation", "a folder with such a pair needs no word"
    assert found["errors"] == 0 and kinds["target-cut"]["faults"][0]["line"] == 5
    assert found["splits"]["train"]["lengths"]["unit"] == "tokens"
