"""Findings of `data check`: nearly all planted faults, each with file, line, value and fix; exit codes."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import planted
import pytest

from tunesmith.data.findings import MAX_FAULTS, Fault, Findings
from tunesmith.inspect_data import check as data_check
from tunesmith.tasks.text_classification import TextClassification

ROOT = Path(__file__).parents[3]
Checked = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def checked(command: Any) -> Checked:
    """`checked(path, "--group", "author")`: exit code and report."""

    def run(*words: object) -> tuple[int, dict[str, Any]]:
        code, out, _ = command("data", "check", *map(str, words), "--json")
        return code, json.loads(out)

    return run


def _write(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def _kinds(report: dict[str, Any]) -> dict[str, int]:
    return {finding["kind"]: finding["count"] for finding in report["findings"]}


def _only(report: dict[str, Any], kind: str) -> dict[str, Any]:
    (finding,) = (finding for finding in report["findings"] if finding["kind"] == kind)
    return finding


def _sentences(count: int) -> list[str]:
    """Distinct sentences of real words with natural frequencies."""
    words = " ".join(page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("docs/*.md"))).split()
    draw = random.Random(0)
    return [
        " ".join(draw.choices([word for word in words if word.isalpha()], k=draw.randint(10, 40))) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return _sentences(1500)


def test_of_two_hundred_planted_faults_nearly_all_are_found(sentences: list[str], tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [(text, draw.choice(("good", "bad", "so so"))) for text in sentences]
    found = planted.outcome(*planted.plant(rows, ("good", "bad", "so so"), draw), tmp_path)
    assert found["share"] >= 0.95 and found["false_alarms"] < 0.02, found


def test_clean_data_has_no_finding(sentences: list[str], checked: Checked, tmp_path: Path) -> None:
    path = _write(tmp_path / "train.jsonl", ({"text": text, "label": len(text) % 2} for text in sentences[:200]))
    code, report = checked(path)
    assert code == 0 and report["findings"] == [] and report["task"] == "text-classification"
    assert report["splits"]["train"]["rows"] == 200 and set(report["splits"]["train"]["classes"]) == {"0", "1"}
    assert report["splits"]["train"]["lengths"]["unit"] == "words"


def test_bad_rows_are_all_named_and_stop_a_run(checked: Checked, tmp_path: Path) -> None:
    lines = ["text,label", "a fine film,1", "a bad one", "an awful one,0", ",1", "what a bore,0", "quite warm,1"]
    code, report = checked(_write(tmp_path / "train.csv", lines))
    assert code == 3 and report["errors"] == 2
    short, empty = (finding for finding in report["findings"] if finding["kind"] == "bad-row")
    assert [fault["line"] for fault in short["faults"] + empty["faults"]] == [5, 3]
    assert all(fault["file"] == str(tmp_path / "train.csv") and fault["fix"] for fault in short["faults"])
    assert checked(tmp_path / "train.csv", "data.on_bad_row=skip")[0] == 0


def test_texts_of_another_width_are_the_same_and_labels_of_near_ones_are_told(
    sentences: list[str], checked: Checked, tmp_path: Path
) -> None:
    near = sentences[0] + " " + sentences[1]
    rows = [
        ("Ａ１２好，", "pos"),
        ("a12好,", "neg"),
        (near, "pos"),
        (near + "!", "neg"),
        *((t, "pos") for t in sentences[2:9]),
    ]
    _write(tmp_path / "train.jsonl", [{"text": text, "label": label} for text, label in rows])
    _, report = checked(tmp_path)
    assert _only(report, "label-conflict")["faults"][0]["value"].startswith("neg here, pos there")
    assert _only(report, "near-duplicate")["faults"][0]["see"].endswith("similar, neg here and pos there)")


def test_fields_classes_and_labels(sentences: list[str], checked: Checked, tmp_path: Path) -> None:
    rows = [{"text": text, "label": "a" if n else "b", "lang": "en", "note": "" if n < 3 else "x", "old": None}
            for n, text in enumerate(sentences[:40])]  # fmt: skip
    _write(tmp_path / "train.jsonl", rows)
    _write(tmp_path / "test.jsonl", [{"text": text, "label": "cd"[n % 2]} for n, text in enumerate(sentences[40:60])])
    code, report = checked(tmp_path)
    assert code == 3 and report["errors"] == 2
    assert _only(report, "unknown-label")["count"] == 20 and _only(report, "unknown-label")["level"] == "error"
    assert _only(report, "imbalance")["faults"][0]["value"] == "a: 39, b: 1"
    assert _only(report, "rare-class")["faults"][0]["value"] == "b: 1"
    assert _only(report, "constant-field")["what"] == "lang has the same value in every row"
    told = {finding["what"]: finding["count"] for finding in report["findings"] if finding["kind"] == "empty-field"}
    assert told == {"note is empty in some rows of train": 3, "old is empty in every row": 1}


def test_a_refusal_of_the_run_is_a_finding(sentences: list[str], checked: Checked, tmp_path: Path) -> None:
    path = _write(tmp_path / "train.jsonl", ({"text": text, "label": "a"} for text in sentences[:30]))
    code, report = checked(path)
    assert code == 3 and "all 30 rows have the class" in _only(report, "refused")["faults"][0]["value"]


@pytest.mark.parametrize("marks", ("B_", "B_ I_"))
def test_what_a_run_refuses_of_tags_is_told_before(
    marks: str, sentences: list[str], checked: Checked, tmp_path: Path
) -> None:
    tagged = [[(word, "O") for word in text.split()] for text in sentences[:40]]
    for words in tagged[:30]:
        words[2:5] = [(words[2][0], "B-X"), (words[3][0], "I-X"), (words[4][0], "O")]
    tagged[35][1] = (tagged[35][1][0], "B-Y")
    for name, part in (("train", tagged[:30]), ("dev", tagged[30:])):
        text = "\n\n".join("\n".join(f"{word}\t{tag}" for word, tag in words) for words in part)
        for mark in marks.split() if name == "train" else ():
            text = text.replace(f"\t{mark[0]}-", f"\t{mark}")
        (tmp_path / f"{name}.tsv").write_text(text)
    code, report = checked(tmp_path)
    unsound = _only(report, "tags")
    assert code == 3 and unsound["count"] == 30 * len(marks.split())
    assert (
        unsound["faults"][0]["value"] == "'B_X' is not a tag of the BIO scheme"
        and unsound["fix"] == "did you mean 'B-X'?"
    )


def test_tags_that_train_lacks_are_told(sentences: list[str], checked: Checked, tmp_path: Path) -> None:
    for name, type_, texts in (("train", "X", sentences[:30]), ("dev", "Y", sentences[30:40])):
        rows = [{"tokens": text.split(), "tags": [f"B-{type_}", *["O"] * (len(text.split()) - 1)]} for text in texts]
        _write(tmp_path / f"{name}.jsonl", rows)
    code, report = checked(tmp_path)
    lacks = _only(report, "unknown-label")
    assert code == 3 and lacks["count"] == 10 and lacks["what"] == "a tag is not in train"
    assert lacks["faults"][0]["line"] == 1 and lacks["faults"][0]["value"] == "B-Y"


def test_groups_on_two_sides(sentences: list[str], checked: Checked, tmp_path: Path) -> None:
    for name, authors in (("train", range(30)), ("test", range(28, 38))):
        rows = [
            {"text": sentences[n], "label": n % 2, "author": f"no {n if name == 'train' else n - 0}"} for n in authors
        ]
        for row, text in zip(rows, sentences[100 if name == "train" else 200 :], strict=False):
            row["text"] = text
        _write(tmp_path / f"{name}.jsonl", rows)
    code, report = checked(tmp_path, "--group", "author")
    leak = _only(report, "group-leak")
    assert code == 3 and [fault["value"] for fault in leak["faults"]] == ["author=no 28", "author=no 29"]
    assert leak["faults"][0]["see"] == f"{tmp_path / 'train.jsonl'}:29"
    assert checked(tmp_path)[0] == 0


def test_a_recipes_drawn_split_is_drawn_and_groups_torn_by_it_are_found(
    sentences: list[str], checked: Checked, tmp_path: Path
) -> None:
    rows = ({"text": text, "label": n % 2, "case": n // 2} for n, text in enumerate(sentences[:100]))
    path = _write(tmp_path / "all.jsonl", rows)
    recipe = _write(
        tmp_path / "recipe.yaml", ["task: text-classification", "model: ./none", f"data: {{train: {path}}}"]
    )
    code, report = checked(recipe, "--group", "case")
    assert code == 3 and report["splits"]["train"]["drawn"] == {"validation": 10}
    assert _only(report, "group-leak")["count"] == 10
    assert "the model cannot be loaded" in " ".join(report["notes"])
    code, report = checked(path, "--group", "case")
    assert code == 0 and _only(report, "group")["count"] == 50


def test_tokens_of_a_model_are_counted(tiny_bert: Path, checked: Checked, tmp_path: Path) -> None:
    texts = ["the film was great", "the plot was dull " * 20, "acting so very bad", "it was warm and fine"]
    path = _write(tmp_path / "train.jsonl", ({"text": text, "label": n % 2} for n, text in enumerate(texts)))
    _, report = checked(path, "--model", tiny_bert)
    lengths = report["splits"]["train"]["lengths"]
    assert lengths["unit"] == "tokens" and lengths["longest"] == 82 and lengths["limit"] == 64
    too_long = _only(report, "too-long")["faults"]
    assert [fault["line"] for fault in too_long] == [2] and too_long[0]["value"].startswith("82 tokens: the plot")
    assert "too-long" not in _kinds(checked(path, "--model", tiny_bert, "task=fill-mask")[1]), "it is cut into blocks"
    task = ("task=text-classification", "data.max_length=32")
    limits = {2: 2 + 2 * 30, 3: 2 + 3 * 30}
    for windows, limit in limits.items():
        _, report = checked(path, "--model", tiny_bert, *task, f"task.windows={windows}")
        assert report["splits"]["train"]["lengths"]["limit"] == limit
        assert _kinds(report).get("too-long", 0) == (limit < 82)
    _write(path, ({"text": f"zyx {text} wvu", "label": n % 2} for n, text in enumerate(texts[2:])))
    assert "unknown to this model" in _only(checked(path, "--model", tiny_bert)[1], "unknown-tokens")["what"]


def test_rows_without_a_task_are_looked_at_as_they_stand(
    sentences: list[str], checked: Checked, tmp_path: Path
) -> None:
    rows = [
        {"headline": text, "aside": "", "story": other}
        for text, other in zip(sentences, sentences[500:540], strict=False)
    ]
    path = tmp_path / "news.jsonl.gz"
    path.write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in [*rows, rows[3]]).encode()))
    code, report = checked(path)
    assert code == 0 and report["task"] is None
    assert _kinds(report) == {"duplicate": 1, "empty-field": 1}
    (fault,) = _only(report, "duplicate")["faults"]
    assert (fault["file"], fault["line"], fault["see"]) == (str(path), 41, f"{path}:4")
    assert fault["value"][:20] == sentences[3][:20] and len(fault["value"]) == 80 and fault["fix"]


def test_files_of_a_folder_that_are_no_splits_are_compared_and_warned_of(
    sentences: list[str], checked: Checked, tmp_path: Path
) -> None:
    for name in ("part-a.jsonl", "part-b.jsonl"):
        _write(tmp_path / name, ({"text": text, "label": n % 2} for n, text in enumerate(sentences[:30])))
    _write(tmp_path / "README.txt", ["about"])
    code, report = checked(tmp_path)
    assert (
        code == 0 and set(report["splits"]) == {"part-a.jsonl", "part-b.jsonl"} and _kinds(report) == {"duplicate": 30}
    )


def test_what_is_left_out_of_a_folder_is_said(sentences: list[str], checked: Checked, tmp_path: Path) -> None:
    for name, part in (("train.jsonl", sentences[:30]), ("test.jsonl", sentences[30:40]), ("more.jsonl", [])):
        _write(tmp_path / name, ({"text": text, "label": n % 2} for n, text in enumerate(part)))
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    _write(tmp_path / "SOURCE.txt", ["about"])
    code, report = checked(tmp_path)
    assert code == 0 and set(report["splits"]) == {"train", "test"}
    assert report["notes"] == [f"skipped files in {tmp_path}: more.jsonl, photo.png"]


def test_a_sentence_with_the_name_of_a_column_between_commas_is_no_header(checked: Checked, tmp_path: Path) -> None:
    long = "one word follows another until nobody would take all of them for what a column is called by those who"
    _write(tmp_path / "a.txt", [f"{long} write tables, target, sees"])
    _write(tmp_path / "b.txt", ["a second text", "", "and a third"])
    code, report = checked(tmp_path)
    assert code == 0 and report["task"] == "fill-mask" and set(report["splits"]) == {"train"}


@pytest.mark.parametrize("one_file", (True, False))
def test_raw_text_is_no_table(one_file: bool, sentences: list[str], checked: Checked, tmp_path: Path) -> None:
    parts = [" ".join(sentences[n : n + 3]).replace(" the ", ", ") for n in range(0, 30, 3)]
    for number, text in enumerate([*parts, parts[4]]):
        with (tmp_path / ("all.txt" if one_file else f"{number}.txt")).open("a", encoding="utf-8") as file:
            file.write(f"{text}\n\n")
    code, report = checked(tmp_path / "all.txt" if one_file else tmp_path)
    assert code == 0 and report["task"] == "fill-mask" and report["splits"]["train"]["rows"] == 11
    assert report["notes"] == [] and _kinds(report) == {"duplicate": 1}


def test_private_data_is_counted_and_masked(checked: Checked, tmp_path: Path) -> None:
    rows = [{"text": f"film number {n} was fine, write to me{n}@example.com", "label": n % 2} for n in range(4)]
    code, report = checked(_write(tmp_path / "train.jsonl", rows))
    finding = _only(report, "private")
    assert code == 0 and finding["count"] == 4 and finding["what"] == "e-mail in a text"
    assert "me0@example.com" not in json.dumps(report["findings"][0]["faults"] + finding["faults"][:0])
    assert finding["faults"][0]["value"] == "me*@*******.*om"


def test_what_a_task_alone_knows_is_asked_of_it(
    checked: Checked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faults(self: object, rows: Any) -> Any:
        return (
            Fault("shouting", "a row shouts", row.place, row.values["text"], "calm down")
            for row in rows
            if "!" in row.values["text"]
        )

    monkeypatch.setattr(TextClassification, "faults", faults)
    path = _write(tmp_path / "train.csv", ["text,label", "fine film,1", "dull film!,0", "warm film,1"])
    assert _only(checked(path)[1], "shouting")["faults"][0]["line"] == 3


def test_the_page_for_a_person(command: Any, tmp_path: Path) -> None:
    path = _write(
        tmp_path / "train.csv", ["text,label", *(f"the same film again,{n % 2}" for n in range(6)), "another,1"]
    )
    code, out, err = command("data", "check", str(path), "-n", "2")
    assert code == 0 and err == ""
    assert "train: 7 rows of" in out and "2 classes (1 4, 0 3)" in out
    assert f"  {path}:3  'the same film again'  see {path}:2\n" in out and "  and 3 more" in out
    assert "  fix: correct one of the labels" in out and out.endswith(": 0 errors, 3 warnings\n")
    assert "text-classification; set task=NAME" in out
    quiet = command("data", "check", str(path), "-q")[1]
    assert quiet.startswith("warning: ") and "train:" not in quiet and "found in" not in quiet


def test_unlike_faults_have_each_its_way_out(command: Any, tmp_path: Path) -> None:
    path = _write(tmp_path / "train.csv", ["text,label", "fine film,1", "dull film", "a, b, c, 0", "warm film,0"])
    code, out, _ = command("data", "check", str(path))
    assert code == 3 and f"  {path}:3  1 field, but the header has 2" in out
    assert out.count("    fix: ") == 2 and "    fix: quote the field that contains the delimiter" in out


def test_a_conflict_of_tags_names_the_word(checked: Checked, tmp_path: Path) -> None:
    rows = [
        {"tokens": ["Ann", "saw", "Paris", "."], "tags": tags}
        for tags in (["B-PER", "O", "B-LOC", "O"], ["B-PER", "O", "B-PER", "O"])
    ]
    code, report = checked(_write(tmp_path / "train.jsonl", [*rows, {"tokens": ["No", "."], "tags": ["O", "O"]}]))
    (fault,) = _only(report, "label-conflict")["faults"]
    assert code == 0 and fault["value"].startswith("Paris is B-PER here, B-LOC there: Ann saw Paris")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    (
        (("none.csv",), 3, "no such file"),
        (("{path}", "--group", "lable"), 2, "no column 'lable'; did you mean 'label'?"),
        (("{path}", "data.colums.text=x"), 2, "unknown key; did you mean 'columns'?"),
        (("{path}", "task=nonsense"), 2, "no task is called 'nonsense'"),
        (("{folder}",), 3, "no train file ... train.csv"),
        ((), 2, "missing argument"),
    ),
)
def test_what_cannot_be_looked_at(words: tuple[str, ...], code: int, said: str, command: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    path = _write(tmp_path / "train.csv", ["text,label", "fine film,1", "dull film,0"])
    found, out, err = command("data", "check", *(word.format(path=path, folder=tmp_path / "empty") for word in words))
    assert found == code and all(part in out + err for part in said.split(" ... "))


def test_of_endless_faults_the_first_are_kept_and_all_counted() -> None:
    findings = Findings()
    findings.add(Fault("k", "w", f"f.csv:{number}", "v", "x") for number in range(MAX_FAULTS + 5))
    (told,) = findings.dump()
    assert told["count"] == MAX_FAULTS + 5 and len(told["faults"]) == MAX_FAULTS


def test_the_python_call_is_the_command(tmp_path: Path) -> None:
    path = _write(tmp_path / "train.csv", ["text,label", "fine film,1", "dull film,0"])
    assert data_check.check(str(path))["splits"]["train"]["rows"] == 2


def test_a_folder_of_texts_is_looked_at_text_by_text(sentences: list[str], checked: Checked, tmp_path: Path) -> None:
    for number, text in enumerate([*sentences[:20], sentences[4]]):
        (tmp_path / f"{number:02}.txt").write_text(text, encoding="utf-8")
    code, report = checked(tmp_path, "task=fill-mask", "data.validation=null")
    (fault,) = _only(report, "duplicate")["faults"]
    assert code == 0 and report["splits"]["train"]["rows"] == 21
    assert (fault["file"], fault["line"]) == (str(tmp_path / "20.txt"), 1) and fault[
        "see"
    ] == f"{tmp_path / '04.txt'}:1"


def test_the_group_of_a_recipe_keeps_rows_together(sentences: list[str], checked: Checked, tmp_path: Path) -> None:
    rows = ({"text": text, "label": n % 2, "case": n // 4} for n, text in enumerate(sentences[:120]))
    path = _write(tmp_path / "all.jsonl", rows)
    assert _only(checked(path, "data.validation=0.2", "--group", "case")[1], "group-leak")["count"] > 0
    code, report = checked(path, "data.validation=0.2", "data.group=case")
    assert code == 0 and report["findings"] == []


def test_planted_faults_of_tags_are_found_by_line(sentences: list[str], checked: Checked, tmp_path: Path) -> None:
    draw, lines, planted_at = random.Random(0), list[str](), set[int]()
    for number, sentence in enumerate(sentences[:400]):
        words = sentence.split()
        tags = ["O"] * len(words)
        start = draw.randrange(1, len(words) - 3)
        tags[start : start + 3] = ["B-FILM", "I-FILM", "I-FILM"]
        if number % 8 == 0:
            tags[start] = "O"
            planted_at.add(len(lines) + start + 2)
        lines += [f"{word}\t{tag}" for word, tag in zip(words, tags, strict=True)] + [""]
    code, report = checked(_write(tmp_path / "train.conll", lines))
    finding = _only(report, "tags")
    assert code == 3 and report["task"] == "token-classification" and finding["count"] == 50
    assert {fault["line"] for fault in finding["faults"]} == planted_at
    assert "imbalance" not in _kinds(report)


def test_a_tag_of_no_scheme_does_not_make_words_a_table_of_texts(checked: Checked, tmp_path: Path) -> None:
    rows = [line for number in range(60) for line in (f"word{number}\tO", f"Rome{number}\tB-PLACE", "")]
    rows[3] = "view\tX-foo"
    code, report = checked(_write(tmp_path / "train.conll", rows))
    assert code == 3 and report["task"] == "token-classification"
    assert [fault["line"] for fault in _only(report, "tags")["faults"]] == [4]
