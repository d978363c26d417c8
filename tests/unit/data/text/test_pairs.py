"""Pairs that are not translations are found without a dictionary of either language."""

from __future__ import annotations

from tunesmith.data.formats import Row
from tunesmith.data.text.pairs import pair_faults

ENGLISH = "the dog and a man are on this street with their ball".split()
GERMAN = "der Hund und ein Mann sind auf dieser Straße mit ihrem Ball".split()


def _rows(count: int = 200) -> list[Row]:
    rows = []
    for n in range(count):
        words = [(n * k + k) % len(ENGLISH) for k in range(2, 9)]
        pair = {"source": " ".join(ENGLISH[k] for k in words), "target": " ".join(GERMAN[k] for k in words)}
        rows.append(Row(f"train:{n + 1}", dict(pair)))
    return rows


def test_sound_pairs_have_no_fault() -> None:
    assert list(pair_faults(_rows())) == []


def test_exchanged_and_copied_sides_are_named_by_row() -> None:
    rows = _rows()
    for n in (7, 90):
        rows[n] = Row(rows[n].place, {"source": rows[n].values["target"], "target": rows[n].values["source"]})
    rows[40] = Row("train:41", {"source": "Boston", "target": " Boston "})
    found = [(fault.kind, fault.place) for fault in pair_faults(rows)]
    assert found == [("swapped-pair", "train:8"), ("copied-source", "train:41"), ("swapped-pair", "train:91")]


def test_names_and_numbers_say_nothing() -> None:
    rows = [*_rows(), Row("train:201", {"source": "Anna 42", "target": "42 Anna"})]
    assert list(pair_faults(rows)) == []


def test_chinese_goes_by_characters() -> None:
    pairs = [
        ("the house is large", "房子很大"),
        ("the tree is old", "那棵树很老"),
        ("I see the large house", "我看见大房子"),
    ] * 20
    rows = [Row(f"a:{n + 1}", {"source": en, "target": zh}) for n, (en, zh) in enumerate(pairs)]
    rows[5] = Row("a:6", {"source": "那棵树很大", "target": "the tree is large"})
    assert [(fault.kind, fault.place) for fault in pair_faults(rows)] == [("swapped-pair", "a:6")]
