"""Words split into sub-words and windows: no word is lost, and each is predicted in one window."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.data.formats import Row
from tunesmith.data.text.words import cut_windows, encode_words, inner_marks, join_words, sentence_of, split_words
from tunesmith.testing import tiny_tokenizer

TEXTS = {
    "He didn't pay $3.50.": "He didn ' t pay $ 3 . 50 .",
    "  two\twords \n": "two words",
    "snake_case, x": "snake_case , x",
    "我爱New York。": "我 爱 New York 。",
    "東京タワーへ": "東 京 タ ワ ー へ",
    "서울에 산다": "서 울 에 산 다",
    "हिन्दी में": "हिन्दी में",
    "cafe\u0301 noir": "cafe\u0301 noir",
    "Жё-ль": "Жё - ль",
    "a👍🏽b": "a 👍 🏽 b",
    "": "",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_split_sensibly(text: str) -> None:
    assert [text[start:end] for start, end in split_words(text)] == TEXTS[text].split()


@settings(max_examples=50)
@given(st.text(max_size=60))
def test_nothing_but_blanks_is_left_out_and_offsets_are_those_of_the_text(text: str) -> None:
    offsets = split_words(text)
    left = list(text)
    for start, end in offsets:
        assert start < end and not text[start:end].isspace()
        left[start:end] = " " * (end - start)
    assert "".join(left).isspace() or not text
    assert all(a[1] <= b[0] for a, b in zip(offsets[:-1], offsets[1:], strict=True))


def test_words_are_joined_as_they_are_written() -> None:
    joined = join_words(["我", "爱", "New", "York", "。"])
    assert joined.text == "我爱 New York 。"
    assert [joined.text[start:end] for start, end in joined.offsets] == joined.words


def test_korean_has_blanks_between_words_and_none_between_syllables() -> None:
    assert join_words(["나는", "학교에", "간다"]).text == "나는 학교에 간다"
    assert join_words(["나", "는", "我"]).text == "나는我"


TWEETS = [
    "I met Mary-Jane O'Neil , in the U.S. .".split(),
    "@who_x see http://t.co/a-b #tag R&D and/or it .".split(),
    "Wnt - signaling".split(),
]
PARTED = ["Wnt - signaling of APC - / - , 3 . 5 .".split(), "Mary 's".split()]


def test_marks_stay_in_words_where_words_have_them() -> None:
    assert set(inner_marks(TWEETS)) == set("-.&_/'@#") and inner_marks(PARTED) == ""
    text = "I met Mary-Jane O'Neil (A.B.C.) at www.who.int/x-y. @who_x, #tag a@b.com -x- 我在ABC-D公司 3.5"
    words = (
        "I met Mary-Jane O'Neil ( A.B.C . ) at www.who.int/x-y . @who_x , #tag a @ b.com - x - 我 在 ABC-D 公 司 3.5"
    )
    assert [text[start:end] for start, end in split_words(text, inner_marks(TWEETS))] == words.split()
    assert split_words(text, inner_marks(PARTED)) == split_words(text)


@settings(max_examples=50)
@given(st.text("ab -'.@#/_我", max_size=30))
def test_with_marks_nothing_but_blanks_is_left_out(text: str) -> None:
    offsets = split_words(text, "-.&_/'@#")
    assert "".join(text[start:end] for start, end in offsets) == "".join(text.split())
    assert not any(" " in text[start:end] for start, end in offsets)


def test_words_stand_in_the_text_that_is_given_with_them() -> None:
    sentence = sentence_of(Row("a:1", {"tokens": ["John", "'s", "dog", "(", "Rex", ")"], "text": "John's dog (Rex)"}))
    assert [sentence.text[start:end] for start, end in sentence.offsets] == sentence.words
    assert sentence.text == "John's dog (Rex)"
    for text in ("b a", "Anna b", "a c b"):
        assert sentence_of(Row("a:1", {"tokens": ["a", "b"], "text": text})).text == "a b"


def test_a_text_may_have_any_number_of_words() -> None:
    assert len(sentence_of(Row("a:1", {"text": "字" * 6000})).words) == 6000


@settings(max_examples=50)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=200), st.integers(32, 64))
def test_windows_hold_every_word_and_overlap(sizes: list[int], room: int) -> None:
    windows = cut_windows(sizes, room)
    assert windows[0][0] == 0 and windows[-1][1] == len(sizes)
    for start, end in windows:
        assert start < end and sum(sizes[start:end]) <= room
    for (start, end), (other, after) in zip(windows[:-1], windows[1:], strict=True):
        assert start < other <= end < after and sum(sizes[other:end]) <= room // 4


@pytest.mark.parametrize("length", (1, 13, 14, 15, 40, 333))
@pytest.mark.parametrize("max_length", (4, 16, 64))
def test_each_word_is_answered_once_where_it_stands(length: int, max_length: int) -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = ("film", "plot", "great", "bad", "so")
    words = [vocabulary[n * n % 5] for n in range(length)]
    (fields,) = encode_words([words], tokenizer, max_length)
    ids = np.array(fields["input_ids"])
    assert [tokenizer.convert_ids_to_tokens(int(token)) for token in ids[fields["first"]]] == words
    assert len(set(fields["first"])) == length and fields["cut"] == fields["void"] == 0
    assert sum(fields["windows"]) == len(ids) and max(fields["windows"]) <= max_length
    starts = np.cumsum([0, *fields["windows"]])
    assert (ids[starts[:-1]] == tokenizer.cls_token_id).all() and (ids[starts[1:] - 1] == tokenizer.sep_token_id).all()
    if len(fields["windows"]) > 1 and max_length == 64:  # each word has context in its window
        edges = {int(edge) for edge in starts[1:-1]}
        nearest = min(abs(place - edge) for place in fields["first"] for edge in edges)
        assert nearest > 3


def _pieces() -> PreTrainedTokenizerFast:
    """Every word is a single letter."""
    names = {"unk": "[UNK]", "pad": "[PAD]"}
    vocabulary = {token: n for n, token in enumerate(("[PAD]", "[UNK]", *"abc", *(f"##{one}" for one in "abc")))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{k}_token": v for k, v in names.items()})


def test_other_sub_words_know_their_word() -> None:
    (fields,) = encode_words([["abc", "a", "ba"]], _pieces(), 40, inside=True)
    assert fields["first"] == [0, 3, 4] and fields["rest"] == [1, 2, 5] and fields["owner"] == [0, 0, 2]


def test_a_word_too_long_is_cut_and_counted_and_one_of_nothing_is_unknown() -> None:
    (fields,) = encode_words([["abcabc", "\u200b", "a"]], _pieces(), 8)
    assert fields["cut"] == 1 and fields["void"] == 1
    assert fields["input_ids"] == [2, 6, 1, 2] and fields["first"] == [0, 2, 3]


def _byte_level(add_prefix_space: bool) -> PreTrainedTokenizerFast:
    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a")]
    vocabulary = letters | {"".join(pair): len(letters) + n for n, pair in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.mark.parametrize("made", (lambda: _byte_level(False), lambda: _byte_level(True)), ids=("plain", "with a blank"))
def test_words_of_byte_level_tokenizers_have_their_blank(made: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = made()
    (fields,) = encode_words([["the", "a"]], tokenizer, 16)
    assert tokenizer.convert_ids_to_tokens(fields["input_ids"]) == ["Ġthe", "Ġa"]
