"""Near duplicates: candidates by LSH bands, and the true similarity."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tunesmith.data.text import duplicates

WORDS = [
    f"{a}{b}" for a in ("ba", "ke", "lo", "mi", "su", "tra", "pen", "gor") for b in ("n", "tal", "ving", "s", "rest")
]


def _texts(count: int, words: int = 18) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=words)) for _ in range(count)]


def _found(texts: list[str], parts: list[int] | None = None) -> dict[tuple[int, int], float]:
    plain = [duplicates.normalize(text) for text in texts]
    where = np.array(parts or [0] * len(texts))
    pairs = duplicates.candidates(duplicates.band_keys(plain), where)
    return {(a, b): likeness for a, b, likeness in duplicates.near_duplicates(pairs, dict(enumerate(plain)), where)}


def test_texts_that_are_alike_are_found_with_their_true_likeness_and_others_are_not() -> None:
    texts = _texts(400)
    changed = [text.replace(text.split()[4], "other", 1) for text in texts[:50]]
    found = _found(texts + changed)
    assert set(found) == {(number, 400 + number) for number in range(50)}
    for (earlier, later), likeness in found.items():
        one, other = duplicates.shingles(texts[earlier]), duplicates.shingles(changed[later - 400])
        assert likeness == len(one & other) / len(one | other) >= duplicates.MIN_SIMILARITY


def test_case_white_space_and_width_make_no_difference() -> None:
    assert _found(["The film was fine, all in all.", "THE film  was ｆｉｎｅ, all in all.\n"]) == {(0, 1): 1.0}


def test_of_a_text_there_is_at_most_one_in_its_own_split_and_one_across() -> None:
    texts = _texts(1) * 6
    texts = [f"{text} {end}" for text, end in zip(texts, "abcdef", strict=True)]
    found = _found(texts, [0, 0, 0, 1, 1, 1])
    assert {later for _, later in found} == {1, 2, 3, 4, 5}
    across = [later for earlier, later in found if earlier < 3 <= later]
    assert sorted(across) == [3, 4, 5] and len(found) == 2 + 3 + 2


def test_a_thousand_of_a_kind_are_linked_and_not_compared_pair_by_pair() -> None:
    texts = [f"{_texts(1)[0]} {number:04}" for number in range(1000)]
    keys = duplicates.band_keys([duplicates.normalize(text) for text in texts])
    pairs = duplicates.candidates(keys, np.zeros(1000, dtype=np.int64))
    assert len(pairs) <= duplicates.MAX_CANDIDATES * 1000
    assert {later for _, later in _found(texts)} == set(range(1, 1000))


def test_keys_do_not_depend_on_what_stands_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _texts(20)
    together = duplicates.band_keys(texts)
    monkeypatch.setattr(duplicates, "BLOCK_CHARS", 100)
    assert np.array_equal(together, duplicates.band_keys(texts))
    assert np.array_equal(together[7], duplicates.band_keys(texts[7:8])[0])


def test_nothing_is_compared_with_nothing() -> None:
    assert len(duplicates.candidates(duplicates.band_keys([]), np.empty(0, dtype=np.int64))) == 0
