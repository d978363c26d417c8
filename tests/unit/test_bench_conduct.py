from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import conduct, report
from bench.conduct import Missing, Outcome, Setting
from bench.workloads import Peer, Workload

ARM = """
import os
from pathlib import Path

LIBRARIES = ()
held = []

def go(job):
    print("to stderr, not between the answers")
    with open(os.environ["STUB_LOG"], "a") as log:
        log.write(NAME[0])
    if job.get("fails"):
        raise ValueError("no luck")
    held.append(bytearray(b"x") * SIZE)
    return {"seconds": SECONDS, "cpu_seconds": SECONDS, "samples": 8, "tokens": 100, "learned": 5, "loss": 1.0}
"""
PEERS = (
    Peer("slow", "stub_slow", 1.5),
    Peer("failing", "stub_slow", 2.0, {"fails": True}),
    Peer("absent", "stub_absent", 2.0),
)
WORKLOAD = Workload("W1", "made up", "none", "none", "none", 8, technique={}, theirs={}, peers=PEERS)


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    about = {"ours": (1.0, 20_000_000), "slow": (2.0, 50_000_000)}
    for name, (seconds, size) in about.items():
        code = f"NAME, SECONDS, SIZE = '{name}', {seconds}, {size}\n{ARM}"
        (tmp_path / f"stub_{name}.py").write_text(code, encoding="utf-8")
    (tmp_path / "stub_absent.py").write_text("import nobody_has_this\n", encoding="utf-8")
    floor = "LIBRARIES = ()\ndef go(job):\n    return {'multiply_adds': 10**9, 'rate': 4e9}\n"
    (tmp_path / "stub_floor.py").write_text(floor, encoding="utf-8")
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "order"))
    monkeypatch.setattr(conduct, "OURS_ARM", "stub_ours")
    monkeypatch.setattr(conduct, "FLOOR_ARM", "stub_floor")
    return Setting(sys.executable, sys.executable, 1, 4, tmp_path / "logs", lambda text: None)


def test_rounds_alternate_and_what_cannot_run_is_left_out(setting: Setting, tmp_path: Path) -> None:
    outcome = conduct.run(WORKLOAD, setting, {})
    assert (tmp_path / "order").read_text() == "oss" + "osso" * 2  # warm-up, the failing one too, then rounds
    assert {name: len(goes) for name, goes in outcome.goes.items()} == {"ours": 4, "slow": 4}
    assert any("skipped absent: nobody_has_this is not installed" in note for note in outcome.notes)
    assert any("skipped failing: stub_slow: ValueError: no luck" in note for note in outcome.notes)
    assert "to stderr" in (tmp_path / "logs" / "stub_ours.log").read_text()
    (row,) = report.rows(outcome)
    assert row.startswith("| W1 | slow | 50 | 100 | 2.00 (2.00 to 2.00) | 1.5 | yes | 2 | 1 |")
    assert "| 12% | 25% | 1.000 | 1.000 |" in row
    assert row.count("|") == report.HEAD.splitlines()[0].count("|")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux lets a peak be forgotten")
def test_peaks_are_of_fresh_processes(setting: Setting) -> None:
    outcome = conduct.run(replace(WORKLOAD, memory=True, peers=(replace(PEERS[0], wanted=0.6),)), setting, {})
    peaks = [go["peak_bytes"] / 1e6 for go in outcome.goes["slow"]]
    assert len(peaks) == 4 and all(45 < peak < 70 for peak in peaks), "earlier goes are in none"
    (row,) = report.rows(outcome)
    assert row.startswith("| W1 | slow | 5") and "| 0.6 | yes |" in row
    assert row.count("|") == report.MEMORY_HEAD.splitlines()[0].count("|")


def test_ours_cannot_be_left_out(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conduct, "OURS_ARM", "stub_absent")
    with pytest.raises(Missing, match="nobody_has_this"):
        conduct.run(WORKLOAD, setting, {})


def test_a_python_that_is_not_there(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conduct, "APART", ("stub_slow",))
    outcome = conduct.run(WORKLOAD, replace(setting, peer_python="build/nowhere/python"), {})
    assert list(outcome.goes) == ["ours"]
    assert any("build/nowhere/python: no such file" in note for note in outcome.notes)


def test_other_work_is_said() -> None:
    go = {"samples": 8, "tokens": 1000, "learned": 5}
    other = {"samples": 8, "tokens": 900, "learned": 6}
    outcome = Outcome(WORKLOAD, goes={"ours": [go], "slow": [other], "absent": [go]})
    conduct._compare_work(outcome)
    assert outcome.notes == ["W1: tokens: slow 900, ours 1,000", "W1: learned: slow 6, ours 5"]


def test_the_interval_of_the_median() -> None:
    assert report.bootstrap([2.0]) == (2.0, 2.0)
    low, high = report.bootstrap([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 9.0])
    assert 1.0 <= low < 1.3 < high <= 9.0
    assert report.bootstrap([1.0, 1.1, 1.2]) == report.bootstrap([1.0, 1.1, 1.2])


@pytest.mark.parametrize(
    ("low", "high", "wanted", "less", "said"),
    [
        (1.5, 1.7, 1.4, False, "yes"),
        (1.1, 1.3, 1.4, False, "**no**"),
        (1.3, 1.5, 1.4, False, "open"),
        (0.5, 0.6, 0.75, True, "yes"),
        (0.8, 0.9, 0.75, True, "**no**"),
        (0.7, 0.8, 0.75, True, "open"),
    ],
)
def test_what_is_reached(low: float, high: float, wanted: float, less: bool, said: str) -> None:
    assert report.reached(low, high, wanted, less=less) == said


def test_a_page_is_added_to(tmp_path: Path) -> None:
    go = {"seconds": 1.0, "cpu_seconds": 1.0, "samples": 8, "tokens": 100, "learned": 5, "loss": 1.0}
    goes = {"ours": [go], "slow": [go | {"loss": 2.0}]}
    outcome = Outcome(WORKLOAD, goes=goes, peaks=dict.fromkeys(goes, 10**6), multiply_adds=10**9, rates=[4e9])
    outcome.notes.append("a note")
    body = report.text([outcome], ["where it was"])
    assert "- where it was" in body and "- a note" in body and "| **2.000** | **1.000** |" in body
    assert "| open |" in body, "one round shows nothing"
    assert "- W1: made up; 8 rows, batch 16, 100 non-padding tokens in total; floor 2 GFLOP at 8 GFLOP/s" in body
    path = tmp_path / "results" / "page.md"
    for name in ("C1", "C2"):
        report.write(path, "A title", name, body)
    said = path.read_text(encoding="utf-8")
    assert said.startswith("# A title\n\n## C1\n") and said.count("# A title") == 1 and "## C2" in said
