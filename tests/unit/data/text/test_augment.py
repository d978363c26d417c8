"""Augmentation is a function of (seed, epoch, index); protected words stay, and origins are correct."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tunesmith.data.formats import Row
from tunesmith.data.text.augment import (
    Augmenter,
    Words,
    drop_words,
    misspell,
    read_synonyms,
    replace_synonyms,
    split_words,
    swap_words,
)
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe.fields import Augmentation
from tunesmith.tasks.text_classification import TextClassification
from tunesmith.tasks.token_classification import TokenClassification

TEXT = "The  film, shot in Rome,\nwas a warm and moving story of two brothers"
EACH = [Augmentation(name=name, probability=0.3) for name in ("word-dropout", "word-swap", "typos")]
TEXT_COLUMNS, WORD_COLUMNS = TextClassification().columns, TokenClassification().columns
CHANGES = (drop_words, swap_words, misspell)


def _draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_same_seed_epoch_and_index_give_the_same_and_others_give_others() -> None:
    row = Row("x:1", {"text": TEXT, "label": "good"})
    one = Augmenter.of(EACH, 3, TEXT_COLUMNS)
    assert one.row(row, 1, 7) == Augmenter.of(EACH, 3, TEXT_COLUMNS).row(row, 1, 7)
    others = {one.row(row, 1, 7).values["text"], one.row(row, 2, 7).values["text"], one.row(row, 1, 8).values["text"]}
    others.add(Augmenter.of(EACH, 4, TEXT_COLUMNS).row(row, 1, 7).values["text"])
    assert len(others) == 4 and all(one.row(row, epoch, 7).values["label"] == "good" for epoch in range(9))


def test_a_text_to_which_nothing_happens_stays_as_it_is() -> None:
    rare = Augmenter.of([Augmentation(name="typos", probability=1e-9)], 0, TEXT_COLUMNS)
    assert rare.row(Row("x:1", {"text": f" {TEXT} "}), 0, 0).values["text"] == f" {TEXT} "


@pytest.mark.parametrize("change", CHANGES)
def test_words_to_be_kept_are_not_touched_and_origins_are_true(change: type) -> None:
    words = TEXT.split()
    keep = [number % 3 == 0 for number in range(len(words))]
    for seed in range(50):
        after = change(Words.of(words, keep), 0.5, _draw(seed))
        kept = {
            origin: word for word, origin, stays in zip(after.words, after.origins, after.keep, strict=True) if stays
        }
        assert kept == {number: word for number, word in enumerate(words) if keep[number]}
        places = [place for place, origin in enumerate(after.origins) if keep[origin]]
        if change is swap_words:
            assert places == [number for number in range(len(words)) if keep[number]]
        if change is not misspell:
            assert all(words[origin] == word for word, origin in zip(after.words, after.origins, strict=True))


def test_shares_are_those_asked_for_and_no_text_is_emptied() -> None:
    words = Words.of(["word"] * 10_000)
    assert len(drop_words(words, 0.2, _draw()).words) == pytest.approx(8000, abs=200)
    assert Counter(misspell(words, 0.2, _draw()).words)["word"] == pytest.approx(8000, abs=300)
    assert all(len(drop_words(Words.of(["a", "b"]), 0.99, _draw(seed)).words) >= 1 for seed in range(99))


def test_a_slip_is_one_key_from_the_word() -> None:
    for seed in range(200):
        (word,) = misspell(Words.of(["brothers"]), 0.999, _draw(seed)).words
        assert abs(len(word) - 8) <= 1 and set(word) - set("brothers") <= set("vgnetfyupijklwdszaxcqm")
    assert misspell(Words.of(["42", "!"]), 0.999, _draw()).words == ("42", "!")


def test_chinese_is_changed_by_character_and_stays_without_blanks() -> None:
    text = "这部电影很温暖 and moving"
    assert split_words(text) == [*"这部电影很温暖", "and", "moving"]
    seen = {
        Augmenter.of(EACH, 0, TEXT_COLUMNS).row(Row("x:1", {"text": text}), 0, index).values["text"]
        for index in range(30)
    }
    assert len(seen) > 20 and not any(" 部" in str(one) or "影 " in str(one)[:3] for one in seen)


def test_synonyms_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("warm, fond\nput up with, bear\n电影,片子\n\n", encoding="utf-8")
    synonyms = read_synonyms(path)
    after = replace_synonyms(Words.of('"Warm," they put up with it'.split()), 0.999, _draw(), synonyms)
    assert after.words == ('"Fond,"', "they", "bear", "it") and after.origins == (0, 1, 4, 5)
    keep = [False, False, False, True, False, False]
    kept = replace_synonyms(Words.of('"Warm," they put up with it'.split(), keep), 0.999, _draw(), synonyms)
    assert kept.words[1:] == ("they", "put", "up", "with", "it")
    step = Augmentation(name="synonyms", probability=0.999, file=str(path))
    changed = Augmenter.of([step], 0, TEXT_COLUMNS).row(Row("x:1", {"text": "这部电影 I bear it"}), 0, 0)
    assert changed.values["text"] == "这部片子 I put up with it"


def test_tags_go_along_and_entities_stay() -> None:
    row = Row("x:1", {"tokens": TEXT.split(), "label": ["O"] * 4 + ["B-CITY"] + ["O"] * 9})
    for index in range(50):
        after = Augmenter.of(EACH, 0, WORD_COLUMNS).row(row, 0, index).values
        assert after["tokens"][after["label"].index("B-CITY")] == "Rome,"  # type: ignore[attr-defined,index]
        assert len(after["tokens"]) == len(after["label"])  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="each has a tag"):
        Augmenter.of(EACH, 0, WORD_COLUMNS).row(Row("x:1", {"tokens": ["a", "b"], "label": [{"start": 0}]}), 0, 0)


def test_a_word_that_parts_two_entities_stays() -> None:
    row = Row("x:1", {"tokens": "ann and the bob O".split(), "label": ["I-PER", "O", "O", "I-PER", "O"]})
    for index in range(50):
        after = (
            Augmenter.of([Augmentation(name="word-dropout", probability=0.9)], 0, WORD_COLUMNS)
            .row(row, 0, index)
            .values
        )
        assert "the" in after["tokens"] and after["label"].index("O") == 1  # type: ignore[attr-defined,operator]


@pytest.mark.parametrize(
    ("text", "said"),
    (
        ("alone\n", "synonyms.txt:1: .*single word.*; "),
        ("a, b c d e f\n", "synonyms.txt:1: .*4 words.*; "),
        ("\n", "synonyms.txt: .*empty"),
    ),
)
def test_a_list_that_cannot_be_meant(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "synonyms.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        read_synonyms(tmp_path / "synonyms.txt")
    with pytest.raises(DataError, match="none.txt: .*synonym.*No such file or directory; "):
        read_synonyms(tmp_path / "none.txt")
