"""Splits are stratified and seeded; equal texts are found despite different spelling."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import has_parts

from tunesmith.data.formats import Row
from tunesmith.data.splits import (
    count_duplicates,
    count_overlap,
    digest,
    join_groups,
    refuse_same_file,
    stratified_split,
)
from tunesmith.errors import DataError
from tunesmith.recipe import Data
from tunesmith.tasks.text_classification import TextClassification
from tunesmith.training import dataset

COLUMNS = TextClassification().columns
COUNTS = st.lists(st.integers(1, 60), min_size=1, max_size=8)


def _draw(strata: np.ndarray, fraction: float, seed: int, name: str = "validation") -> tuple[np.ndarray, np.ndarray]:
    """Split rows that all differ."""
    return stratified_split(strata, np.arange(len(strata), dtype=np.uint64), fraction, seed, name)


def _strata(counts: list[int]) -> np.ndarray:
    """Return shuffled classes."""
    return np.random.default_rng(len(counts)).permutation(np.repeat(np.arange(len(counts)), counts))


@given(counts=COUNTS, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 5))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_each_class_gives_its_share(counts: list[int], fraction: float, seed: int) -> None:
    strata = _strata(counts)
    if round(fraction * len(strata)) < 1 or max(counts) == 1:
        with pytest.raises(DataError, match=r"^data.test: "):
            _draw(strata, fraction, seed, "test")
        return
    kept, drawn = _draw(strata, fraction, seed)
    assert sorted([*kept, *drawn]) == list(range(len(strata)))
    assert (np.diff(kept) > 0).all() and (np.diff(drawn) > 0).all()
    gives = np.bincount(strata[drawn], minlength=len(counts))
    assert (gives < counts).all(), "every class stays in train"
    assert 1 <= gives.sum() <= round(fraction * len(strata))
    if all(count * (1 - fraction) >= 2 for count in counts):  # every class is large enough for its share
        assert gives.sum() == round(fraction * len(strata))
        assert (np.abs(gives - fraction * np.array(counts)) <= 1).all()


def test_classes_without_a_second_row_give_none_and_others_give_for_them() -> None:
    kept, drawn = _draw(np.array([0] * 18 + [1, 2]), 0.25, 0)
    assert len(drawn) == 5 and {18, 19} <= set(kept.tolist())


def test_the_draw_is_a_function_of_the_seed() -> None:
    strata = _strata([30, 20, 10])
    draws = [tuple(_draw(strata, 0.2, seed)[1].tolist()) for seed in (0, 1, 2, 0)]
    assert draws[0] == draws[3] and len(set(draws)) == 3


def test_the_names_of_classes_do_not_matter() -> None:
    strata = _strata([30, 20, 10])
    renamed = np.array([7, -3, 100])[strata]
    one, two = (_draw(codes, 0.2, 0)[1] for codes in (strata, renamed))
    assert np.bincount(strata[one]).tolist() == np.bincount(strata[two]).tolist() == [6, 4, 2]


@pytest.mark.parametrize(
    ("counts", "fraction", "parts"),
    (
        ([20, 20], 0.01, ("0.01 of 40 rows ", "one row; ", "fraction", "file", "data.validation=null")),
        ([1, 1, 1], 0.5, ("every class has a single text", "; ", "file", "data.validation=null")),
    ),
)
def test_what_cannot_be_drawn_is_refused(counts: list[int], fraction: float, parts: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        _draw(_strata(counts), fraction, 0)
    assert has_parts(str(caught.value), "data.validation: ", *parts)


def test_rows_that_all_differ_are_drawn_as_they_always_were() -> None:
    assert _draw(np.arange(40) % 4 // 3, 0.2, 0)[1].tolist() == [0, 1, 10, 15, 21, 22, 32, 35]


@given(texts=st.integers(15, 40), fraction=st.floats(0.1, 0.6), seed=st.integers(0, 10_000))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_equal_rows_stay_on_one_side(texts: int, fraction: float, seed: int) -> None:
    chosen = np.random.default_rng(seed)
    digests, strata = chosen.integers(0, texts, 120).astype(np.uint64), chosen.integers(0, 4, 120)
    kept, drawn = stratified_split(strata, digests, fraction, seed)
    assert sorted([*kept, *drawn]) == list(range(120))
    assert not set(digests[kept]) & set(digests[drawn])
    assert set(strata[kept]) == set(strata), "every class stays in train"
    assert 0.6 * fraction * 120 - 1 <= len(drawn) <= round(fraction * 120)


def test_of_rows_given_twice_each_class_still_gives_its_share() -> None:
    strata = np.repeat(np.arange(24), 50)
    texts = np.arange(1200, dtype=np.uint64) // 2
    kept, drawn = stratified_split(strata, texts, 0.1, 0)
    assert len(drawn) == 120 and not set(texts[kept]) & set(texts[drawn])
    assert np.abs(np.bincount(strata[drawn]) - 5).max() == 1, "5 is no number of pairs: some give 4, some 6"


def test_a_text_too_often_to_be_drawn_stays_in_train_and_others_go_for_it() -> None:
    strata, texts = np.arange(100) % 2, np.maximum(np.arange(100), 59).astype(np.uint64)
    kept, drawn = stratified_split(strata, texts, 0.1, 0)
    assert len(drawn) == 10 and set(range(60)) <= set(kept.tolist())
    assert np.bincount(strata[drawn]).tolist() == [5, 5]


def test_texts_too_few_to_draw_from_are_refused() -> None:
    strata, texts = np.arange(40) % 2, np.arange(40, dtype=np.uint64) % 4
    with pytest.raises(DataError, match=r"^data.test: 0.1 of 40 rows .*smallest group"):
        stratified_split(strata, texts, 0.1, 0, "test")
    assert len(stratified_split(strata, texts, 0.25, 0)[1]) == 10
    with pytest.raises(DataError, match="every class has a single text.*; "):
        stratified_split(strata, strata.astype(np.uint64), 0.5, 0)


def test_a_hundred_thousand_rows_are_drawn_at_once() -> None:
    strata, texts = np.arange(100_000) % 7, np.arange(100_000, dtype=np.uint64) // 3
    before = time.process_time()
    kept, drawn = stratified_split(strata, texts, 0.1, 0)
    assert time.process_time() - before < 2
    assert 9_990 <= len(drawn) <= 10_000 and not np.isin(texts[kept], texts[drawn]).any()


def _digest(**values: object) -> int:
    return digest(Row("here", values), COLUMNS)


SAME = ("The café was great", "the CAFÉ was great", " the cafe\u0301  was\ngreat ", "the\u00a0café was great")
OTHER = ("the cafe was great", "the café was great!", "café the was great", "thecafé was great", "")


@pytest.mark.parametrize("text", SAME)
def test_case_white_space_and_coding_make_no_other_text(text: str) -> None:
    assert _digest(text=text, label="pos") == _digest(text=SAME[0], label="neg")


@pytest.mark.parametrize("text", OTHER)
def test_other_words_make_another_text(text: str) -> None:
    assert _digest(text=text) != _digest(text=SAME[0])


def test_both_texts_of_a_pair_count_and_their_border() -> None:
    pairs = [_digest(text=a, text_pair=b) for a, b in (("a", "b"), ("b", "a"), ("a b", ""), ("", "a b"), ("a", "c"))]
    assert len({*pairs, _digest(text="a"), _digest(text="a b")}) == 7
    assert _digest(text="a", text_pair="b") == _digest(text_pair="b", text="a")


def test_half_a_character_has_a_digest_too() -> None:
    assert 0 <= _digest(text="\ud83d") < 2**64


def test_overlaps_and_repeats_are_counted() -> None:
    train, other = (np.array(values, dtype=np.uint64) for values in ([5, 2**64 - 1, 7, 5], [5, 5, 8, 2**64 - 1]))
    assert count_overlap(train, other) == 3 and count_overlap(train, other[2:3]) == 0
    assert count_duplicates(train, np.array([0, 1, 0, 1])) == (1, 1)
    assert count_duplicates(train, np.array([0, 1, 0, 0])) == (1, 0)
    assert count_duplicates(np.array([5, 5, 5, 6, 6], dtype=np.uint64), np.array([0, 1, 2, 0, 0])) == (3, 1)


def test_the_training_file_is_no_other_split(tmp_path: Path) -> None:
    for name in ("train.csv", "copy.csv"):
        (tmp_path / name).write_text("text,label\n")
    (tmp_path / "hard.csv").hardlink_to(tmp_path / "train.csv")
    refuse_same_file(tmp_path / "train.csv", tmp_path / "copy.csv", "test")
    with pytest.raises(DataError, match=r"hard.csv: data.test .*training file; .*data.test=0.1"):
        refuse_same_file(tmp_path / "train.csv", tmp_path / "hard.csv", "test")


GROUPED = [
    f"{number},clause {number % 37} of {number},{'abcd'[number % 4]},contract {number % 23}" for number in range(460)
]


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_a_group_are_never_parted(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "clauses.csv"
    path.write_text("\n".join(["n,text,label,contract", *GROUPED]))
    data = Data(train=str(path), validation=0.2, test=0.1, group="contract")
    found = dataset.read(TextClassification(), data, seed)
    groups = {name: {row.values["group"] for row in split.rows()} for name, split in found.splits.items()}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == 23, "each is on one side"
    assert found.rows["validation"] == pytest.approx(92, abs=20) and found.rows["test"] == pytest.approx(46, abs=20)
    assert {row.values["label"] for row in found.splits["train"].rows()} == set("abcd")
    without = dataset.read(TextClassification(), data.model_copy(update={"group": None}), seed)
    parted = {name: {row.place for row in split.rows()} for name, split in without.splits.items()}
    assert parted["test"] != {row.place for row in found.splits["test"].rows()}


def _patients(shared: int) -> str:
    """Return a CSV of fifty patients with eight notes each; `shared` patients have the same first note."""
    rows = (
        f"{'normal' if n % 8 == 0 and n // 8 < shared else f'note {n}'},{'ab'[n % 2]},p{n // 8}" for n in range(400)
    )
    return "\n".join(["text,label,patient", *rows])


@pytest.mark.parametrize("shared", (20, 50))
def test_groups_that_share_a_text_stay_together_as_long_as_they_are_not_most(shared: int, tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text(_patients(shared))
    found = dataset.read(TextClassification(), Data(train=str(path), validation=0.1, test=0.2, group="patient"), 0)
    assert found.rows == {"train": 280, "validation": 40, "test": 80}
    sides = [name for name, split in found.splits.items() for row in split.rows() if row.values["text"] == "normal"]
    assert (len(set(sides)) == 1) == (shared == 20)
    said = [note for note in found.notes if "duplicate" in note]
    assert len(said) == (0 if shared == 20 else 2)
    assert all("groups of patient" in note and "data check" in note for note in said)


def test_a_chain_of_groups_is_one() -> None:
    groups = np.array([1, 2, 2, 3, 3, 4, 9, 9, 8, 8, 7, 7], dtype=np.uint64)
    texts = np.array([1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9], dtype=np.uint64)
    found = join_groups(groups, texts)
    assert len(set(found[:6].tolist())) == 1 and len(set(found.tolist())) == 4
    assert (join_groups(groups[:8], texts[:8]) == groups[:8]).all(), "it is more than half of the rows"


def test_a_group_is_of_train_alone_and_no_text(tmp_path: Path) -> None:
    path, other = tmp_path / "clauses.csv", tmp_path / "other.csv"
    path.write_text("\n".join(["n,text,label,contract", *GROUPED, "1,same,a,contract 1", "2,same,a,contract 2"]))
    other.write_text("text,label\nsomething else,a\nand more,b\n")
    found = dataset.read(TextClassification(), Data(train=str(path), validation=str(other), group="contract"), 0)
    assert found.rows == {"train": 462, "validation": 2}
    assert any("1 of 462 train rows repeat" in note for note in found.notes)
    with pytest.raises(DataError, match="no column 'contrakt'; did you mean 'contract'"):
        dataset.read(TextClassification(), Data(train=str(path), group="contrakt"), 0)
    path.write_text("text,label,contract\none,a,x\ntwo,b,\n")
    with pytest.raises(DataError, match="clauses.csv:3: contract: empty"):
        dataset.read(TextClassification(), Data(train=str(path), group="contract"), 0)
