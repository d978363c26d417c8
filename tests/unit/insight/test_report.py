"""The report page: valid, self-contained, escaped, with scores and errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.console import Console
from tunesmith.insight import report
from tunesmith.metrics import MEANINGS
from tunesmith.recipe import load, to_yaml

ERRORS = "Most confident errors"
VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = {
    "script": "<script>alert(1)</script>",
    "attribute": '"><img src=x onerror=alert(1)>',
    "template": "{{ 7 * 7 }}{% for x in y %}",
    "control": "\x1b[31m\x00 red &amp;",
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f]")


class Page(HTMLParser):
    """Parser that checks nesting and collects elements, texts, and tables by heading."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.heading = ""
        self.feed(self.source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2"):
            self.heading = ""
        elif tag == "tr":
            self.tables.setdefault(self.heading.strip(), []).append([])
        elif tag in ("td", "th"):
            self.tables[self.heading.strip()][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.heading += data
        elif {"td", "th"} & set(self.open):
            self.tables[self.heading.strip()][-1][-1] += data.strip("\n")

    def table(self, heading: str) -> list[list[str]]:
        """Return the rows of the table whose heading starts with `heading`, or none."""
        return next((rows for name, rows in self.tables.items() if name.startswith(heading)), [])

    @property
    def errors(self) -> list[list[str]]:
        return self.table(ERRORS)[1:]

    def each(self, tag: str, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, reviews_csv: Path) -> Path:
    """Folder of a run of four steps, read-only."""
    folder = tmp_path_factory.mktemp("report")
    given = {
        "task": "text-classification",
        "model": str(tiny_bert),
        "data": {"train": str(reviews_csv), "validation": 0.2, "test": 0.2},
        "technique": "lora",
        "train": {"max_steps": 4, "batch_size": 8, "precision": "fp32", "evaluate_every": 1, "metric": "ece"},
        "output": str(folder / "run"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(folder / "home"))
        tunesmith.train(given, console=Console(level=-1))
    return folder / "run"


@pytest.fixture
def page(finished: Path, tmp_path: Path) -> Any:
    """`page(predictions, labels="multi", ...)`: return the page for these predictions and this task."""

    def build(predictions: Iterable[dict[str, Any]], **task: Any) -> Page:
        folder = shutil.copytree(finished, tmp_path / "run")
        tree = load(folder / "recipe.yaml").dump()
        tree["task"] |= task
        (folder / "recipe.yaml").write_text(to_yaml(tree), encoding="utf-8")
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        about["metrics"]["test"]["f1"] = dict.fromkeys(tree["task"]["classes"] or (), 0.5)
        (folder / "run.json").write_text(json.dumps(about), encoding="utf-8")
        lines = (json.dumps({"row": f"test.csv:{n}", **one}) for n, one in enumerate(predictions, start=2))
        (folder / "predictions-test.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
        report.write(folder, load(folder / "recipe.yaml"))
        return Page(folder)

    return build


def _row(label: Any, prediction: Any, text: str = "the film was bad", **more: Any) -> dict[str, Any]:
    if isinstance(prediction, tuple):
        prediction = {"label": prediction[0], "score": prediction[1], "probabilities": {}}
    return {"text": text, **more, "label": label, "prediction": prediction}


def test_the_page_is_whole_and_needs_nothing_but_itself(finished: Path) -> None:
    page = Page(finished)
    assert page.source.startswith("<!doctype html>") and 'charset="utf-8"' in page.source
    outside = {"script", "link", "img", "iframe", "object", "form", "a", "base"}
    assert {tag for tag, _ in page.elements}.isdisjoint(outside)
    for tag, attributes in page.elements:
        for name in attributes:
            assert not name.startswith("on") and name not in ("src", "href", "srcset", "style", "xlink:href"), (
                tag,
                name,
            )
    assert not re.search(r"https?://|@import|url\(|javascript:", page.source)
    policy = next(attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_scores_stand_beside_the_baseline(finished: Path) -> None:
    metrics = json.loads((finished / "run.json").read_text())["metrics"]
    page = Page(finished)
    header, *rows = page.table("Scores")
    assert header == ["", "validation", "test", "majority-class baseline"]
    assert {row[0] for row in rows} == {name for name, value in metrics["test"].items() if isinstance(value, float)}
    for name, *cells in rows:
        assert cells == [f"{metrics[split][name]:.4f}" for split in ("validation", "test", "baseline")]
    confusion = page.table("Confusion matrix")
    assert confusion[0] == ["", "negative", "positive"]
    assert [[int(cell) for cell in row[1:]] for row in confusion[1:]] == metrics["test"]["confusion_matrix"]
    each = page.table("F1 by class")
    assert each == [[name, f"{value:.4f}"] for name, value in metrics["test"]["f1"].items()]
    assert "torch 2" in page.source and "seed 0" in page.source


def test_each_score_is_explained_once(finished: Path) -> None:
    html = unescape((finished / "report.html").read_text(encoding="utf-8"))
    shown = json.loads((finished / "run.json").read_text())["metrics"]["test"]
    named = [name for name, value in shown.items() if isinstance(value, float)]
    assert "ece" in named and all(html.count(f"{name}: {MEANINGS[name]}.") == 1 for name in named)


def test_errors_are_those_of_the_test_rows(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "predictions-test.jsonl").read_text().splitlines()]
    wrong = [row for row in rows if row["prediction"]["label"] != row["label"]]
    wanted = [
        [row["row"].rpartition(":")[2], row["text"], row["label"], row["prediction"]["label"], f"{score:.4f}"]
        for row in sorted(wrong, key=lambda row: -row["prediction"]["score"])
        for score in [row["prediction"]["score"]]
    ]
    assert Page(finished).errors == wanted and wanted


def test_curves_are_drawn_within_their_frame(finished: Path) -> None:
    page = Page(finished)
    assert page.each("svg", "aria-label") == ["Training loss", "Learning rate", "Validation loss", "Validation ece"]
    for line in page.each("polyline", "points"):
        points = [tuple(map(float, point.split(","))) for point in line.split()]
        assert len(points) == 4 and points[0][0] == 0 and points[-1][0] == report.WIDTH
        assert all(0 <= x <= report.WIDTH and 0 <= y <= report.HEIGHT for x, y in points)
        assert {y for _, y in points} >= {5.0, report.HEIGHT - 5.0}, "from the lowest to the highest value"


def test_a_long_run_is_drawn_in_few_points_and_what_is_no_number_is_left_out(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    lines = [{"step": step, "loss": "nan" if step == 7 else 1 / step, "learning_rate": 0.1} for step in range(1, 5001)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write(folder, load(folder / "recipe.yaml"))
    loss, rate = Page(folder).each("polyline", "points")
    assert 150 <= len(loss.split()) <= 250 and "nan" not in loss + rate


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_and_labels_are_shown_and_nothing_more(hostile: str, page: Any) -> None:
    rows = [_row(hostile, ("neg", 0.9), text=f"{hostile} film"), _row("neg", (hostile, 0.8), text=f"{hostile} film")]
    found = page(rows, classes=[hostile, "neg"])
    assert {tag for tag, _ in found.elements}.isdisjoint({"script", "img"}) and not CONTROL.search(found.source)
    shown = CONTROL.sub("\N{REPLACEMENT CHARACTER}", hostile)
    first, second = found.errors
    assert first == ["2", f"{shown} film", shown, "neg", "0.9000"]
    assert second == ["3", f"{shown} film", "neg", shown, "0.8000"]
    assert [row[0] for row in found.table("F1 by class")] == [shown, "neg"]


@pytest.mark.parametrize(
    ("wrong", "right", "name", "other"),
    ((1, 0, "1", "0"), (1.0, 0.0, "1", "0"), ("1.0", "0.0", "1", "0"), (True, False, "True", "False")),
)
def test_errors_are_told_however_labels_are_written(wrong: Any, right: Any, name: str, other: str, page: Any) -> None:
    sure = [(wrong, 0.6), (right, 0.9), (wrong, 0.7)]
    found = page([_row(label, (other, score)) for label, score in sure], classes=[other, name])
    assert [row[0] for row in found.errors] == ["4", "2"], "the surest first"
    assert {(row[2], row[3]) for row in found.errors} == {(name, other)}


def test_errors_of_several_labels_are_where_any_of_them_is_wrong(page: Any) -> None:
    answer = {"labels": ["a"], "probabilities": {"a": 0.8, "b": 0.3}}
    rows = [_row(label, answer) for label in (["a"], ["a", "b"], [], "b;a")]
    found = page(rows, labels="multi", classes=["a", "b"])
    assert [[row[0], *row[2:]] for row in found.errors] == [
        ["4", "", "a", "0.8000"],
        ["3", "a, b", "a", "0.7000"],
        ["5", "a, b", "a", "0.7000"],
    ]


def test_errors_of_numbers_are_what_is_furthest_off(page: Any) -> None:
    rows = [_row(label, {"value": 2.25}) for label in (2.5, "-1", 4)]
    found = page(rows, labels="regression", classes=None)
    assert [row[2:] for row in found.errors] == [
        ["-1", "2.25", "3.2500"],
        ["4", "2.25", "1.7500"],
        ["2.5", "2.25", "0.2500"],
    ]


def test_at_most_twenty_errors_of_both_texts_cut_short(page: Any) -> None:
    row = _row("positive", ("negative", 0.9), text_pair="dull " * 200)
    found = page([row] * 30)
    assert len(found.errors) == report.MAX_ERRORS_SHOWN
    assert all("film" in cells[1] and 0 < cells[1].count("dull") < 100 for cells in found.errors)


def test_where_all_is_right_there_is_nothing_to_read(page: Any) -> None:
    found = page([_row("positive", ("positive", 0.9))])
    assert found.errors == [] and ERRORS not in found.source
