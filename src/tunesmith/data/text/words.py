"""Splitting of texts into words, and tokenization of sentences word by word.

A word is a run of letters and digits, one punctuation character, or one Chinese, Japanese or Korean character.
Intra-word punctuation (`O'Neil`, `www.who.int`, `@who`) is kept inside words if the training data has such words.

Each word is predicted once, at its first sub-word. A sentence that exceeds the maximum length is split into windows of
whole words, which overlap by a quarter. A word in two windows is predicted in the window where it is further from the
edge.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data.encoded import Encoded
from tunesmith.data.formats import Row
from tunesmith.data.text.texts import unknown_notes
from tunesmith.errors import DataError, counted, shorten

BY_CHARACTER = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Kana, Han and Hangul."""
_HANGUL = re.compile("[\uac00-\ud7af]")

INNER_MARKS, PREFIX_MARKS = "-.&_/'\u2019", "@#"
"""Punctuation that may occur inside a word, and at its start."""
MIN_INNER_SHARE = 0.02
"""Minimum ratio of occurrences inside words to separate occurrences, for punctuation to count as intra-word."""
_LINK = re.compile(r"(?:https?://|www\.)[!-~]*[\w/=&#-]", re.ASCII)

OVERLAP_DIVISOR = 4
"""Windows overlap by 1/OVERLAP_DIVISOR of their length. A word that is longer than the overlap is truncated."""


@dataclass(frozen=True)
class Sentence:
    """A text and its words; word i is `text[start:end]` with `(start, end) = offsets[i]`."""

    text: str
    offsets: list[tuple[int, int]]
    words: list[str]


def split_words(text: str, marks: str = "") -> list[tuple[int, int]]:
    """Return start and end of each word of a text; `marks` are the intra-word punctuation (`inner_marks`)."""
    pieces: list[tuple[int, int]] = []
    start = None
    for index, character in enumerate(text):
        is_word = BY_CHARACTER.match(character)
        if not is_word and (character.isalnum() or character == "_" or _is_combining(character)):
            start = index if start is None else start
            continue
        if start is not None:
            pieces.append((start, index))
            start = None
        if not character.isspace():
            pieces.append((index, index + 1))
    pieces = pieces if start is None else [*pieces, (start, len(text))]
    return _join_pieces(text, pieces, marks) if marks else pieces


def _join_pieces(text: str, pieces: list[tuple[int, int]], marks: str) -> list[tuple[int, int]]:
    """Join pieces at intra-word punctuation, and the pieces of a URL."""
    links = [match.span() for match in _LINK.finditer(text)] if "/" in marks else []
    joined: list[tuple[int, int]] = []
    for start, end in pieces:
        while links and links[0][1] <= start:
            links.pop(0)
        if (
            joined
            and joined[-1][1] == start
            and ((links and links[0][0] < start) or _continues_word(text, joined[-1], start, marks))
        ):
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


def _continues_word(text: str, word: tuple[int, int], start: int, marks: str) -> bool:
    """Return whether the piece at `start` continues the word before it, whose start and end are `word`."""
    previous, first, following = text[start - 1], text[start], text[start + 1 : start + 2]
    if first in marks and first not in PREFIX_MARKS:
        return _is_word_character(previous) and _is_word_character(following)
    length = word[1] - word[0]
    if previous in marks and previous not in PREFIX_MARKS:
        return length > 1 and _is_word_character(first)
    begins_word = length == 1 and not (word[0] and _is_word_character(text[word[0] - 1]))
    return previous in marks and begins_word and _is_word_character(first)


def _is_word_character(character: str) -> bool:
    return (character.isalnum() or character == "_") and not BY_CHARACTER.match(character)


def inner_marks(sentences: Iterable[Sequence[str]]) -> str:
    """Return the intra-word punctuation of a corpus.

    A mark is intra-word if its occurrences inside words exceed MIN_INNER_SHARE of its separate occurrences.
    Apostrophes, `@` and `#` must occur inside words more often than separately. A corpus that splits words at hyphens,
    for example, has no intra-word hyphen.
    """
    inside, separate = Counter[str](), Counter[str]()
    for words in sentences:
        for word in words:
            if len(word) == 1:
                separate[word] += 1
            elif not word.isalnum():
                triples = zip(word, word[1:], word[2:], strict=False)
                inner = {mark for before, mark, after in triples if before.isalnum() and after.isalnum()}
                inside.update(inner | {word[0]} & set(PREFIX_MARKS))
                separate.update({word[0]} & set("'\u2019"))  # `'s`: the corpus splits words before apostrophes
    return "".join(
        mark
        for mark in INNER_MARKS + PREFIX_MARKS
        if inside[mark] > separate[mark] * (MIN_INNER_SHARE if mark in INNER_MARKS and mark not in "'\u2019" else 1)
    )


def _is_combining(character: str) -> bool:
    """Return whether a character combines with the previous one: accents, vowel signs, zero-width joiners."""
    return character > "\u02ff" and (unicodedata.category(character)[0] == "M" or character in "\u200c\u200d")


def join_words(words: Sequence[str]) -> Sentence:
    """Join words into a text, with spaces between them if the script uses spaces."""
    text, offsets = "", list[tuple[int, int]]()
    for previous, word in zip(["", *words], words, strict=False):
        text += " " * _needs_space(previous, word) + word
        offsets.append((len(text) - len(word), len(text)))
    return Sentence(text, offsets, list(words))


def _needs_space(before: str, word: str) -> bool:
    """Return whether a space separates two words.

    Chinese and Japanese have no spaces; Korean has them, except between two single syllables.
    """
    if not before or not (BY_CHARACTER.match(word[:1]) and BY_CHARACTER.match(before[-1])):
        return bool(before)
    return bool(_HANGUL.match(word) and _HANGUL.match(before[-1])) and len(before) + len(word) > 2


def _locate_words(words: list[str], text: str) -> Sentence | None:
    """Locate words in a text. Return None if the text has anything else than these words and white space."""
    offsets, end = list[tuple[int, int]](), 0
    for word in words:
        if (start := text.find(word, end)) < 0 or text[end:start].strip():
            return None
        end = start + len(word)
        offsets.append((start, end))
    return Sentence(text, offsets, words)


def sentence_of(row: Row, *, whole_text: bool = False, marks: str = "") -> Sentence:
    """Return the words of a row.

    These are its `tokens`, located in its `text` if it has one. Without tokens, or with `whole_text`, its `text` is
    split into words; `marks` are the intra-word punctuation.

    Raises:
        DataError: the row has neither, or no words.
    """
    tokens, text = row.values.get("tokens"), row.values.get("text")
    if isinstance(text, str) and (whole_text or tokens is None):
        offsets = split_words(text, "" if whole_text else marks)
        sentence = Sentence(text, offsets, [text[start:end] for start, end in offsets])
    elif tokens is None or whole_text:
        what = "spans need a text, which is missing" if whole_text else "neither text nor tokens"
        hint = "set data.columns.text=NAME, or data.columns.tokens=NAME for lists of words"
        raise DataError(what, where=row.place, hint=hint)
    else:
        words = _words(tokens, row)
        sentence = (_locate_words(words, text) if isinstance(text, str) else None) or join_words(words)
    if not sentence.words:
        raise DataError("the row has no words", where=row.place, hint="remove the row")
    return sentence


def _words(tokens: object, row: Row) -> list[str]:
    if not isinstance(tokens, list):
        what = f"{shorten(tokens)} is not a list of words"
        raise row.fault("tokens", what, 'give ["one", "word", "each"], or a text under `text`')
    for index, token in enumerate(tokens):
        if not isinstance(token, str | int | float) or isinstance(token, bool) or not str(token):
            raise row.fault("tokens", f"{shorten(token)} is not a word", "give non-empty texts", index)
    return [str(token) for token in tokens]


def encode_words(
    sentences: Sequence[Sequence[str]], processor: Any, max_length: int, *, inside: bool = False
) -> list[dict[str, Any]]:
    """Encode sentences.

    Fields: `input_ids` (all windows, flat); `windows`, their lengths; `first`, the position of each word's first
    sub-word, where the word is predicted; `cut`, the number of truncated words; `void`, the number of words without
    tokens, which become unknown tokens. With `inside`: `rest`, the positions of the other sub-words, and `owner`, the
    index of the word of each.
    """
    prefix, suffix = _special_tokens(processor)
    max_tokens = max(max_length - len(prefix) - len(suffix), 1)
    max_sub_words, unknown = max(max_tokens // OVERLAP_DIVISOR, 1), _fallback_id(processor)
    ids_of = _tokenize_words({word for words in sentences for word in words}, processor, max_sub_words * 2)
    encoded = []
    for words in sentences:
        sub_words = [ids_of[word] for word in words]
        cut, void = sum(len(ids) > max_sub_words for ids in sub_words), sum(not ids for ids in sub_words)
        kept = [ids[:max_sub_words] or [unknown] for ids in sub_words]
        fields = _window_fields(kept, prefix, suffix, max_tokens, inside)
        encoded.append(fields | {"cut": cut, "void": void})
    return encoded


def _window_fields(
    sub_words: list[list[int]], prefix: list[int], suffix: list[int], max_tokens: int, inside: bool
) -> dict[str, list[int]]:
    """Return the fields of a sentence from the sub-words of each word; each window has `prefix` and `suffix`."""
    sizes = [len(ids) for ids in sub_words]
    windows = cut_windows(sizes, max_tokens)
    middles = [(start + end + 1) // 2 for (_, end), (start, _) in zip(windows[:-1], windows[1:], strict=True)]
    bounds = [0, *middles, len(sub_words)]  # window i predicts the words from bounds[i] to bounds[i + 1]
    ids, lengths, first, rest, owner = (list[int]() for _ in range(5))
    for (start, end), low, high in zip(windows, bounds[:-1], bounds[1:], strict=True):
        window_start = len(ids)
        ids += prefix
        for word in range(start, end):
            if low <= word < high:
                first.append(len(ids))
                rest += range(len(ids) + 1, len(ids) + sizes[word])
                owner += [word] * (sizes[word] - 1)
            ids += sub_words[word]
        ids += suffix
        lengths.append(len(ids) - window_start)
    fields = {"input_ids": ids, "windows": lengths, "first": first}
    return fields | ({"rest": rest, "owner": owner} if inside else {})


def cut_windows(sizes: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """Return (first word, word after the last) of windows of at most `max_tokens` sub-words.

    `sizes` has the sub-words of each word, at most a quarter of `max_tokens`. Windows overlap by at most a quarter.
    """
    ends = np.concatenate([[0], np.cumsum(sizes)])
    windows: list[tuple[int, int]] = []
    start = 0
    while True:
        end = int(np.searchsorted(ends, ends[start] + max_tokens, side="right")) - 1
        windows.append((start, end))
        if end >= len(sizes):
            return windows
        start = max(start + 1, int(np.searchsorted(ends, ends[end] - max_tokens // OVERLAP_DIVISOR)))


def _tokenize_words(words: set[str], processor: Any, max_sub_words: int) -> dict[str, list[int]]:
    """Tokenize each word separately into at most `max_sub_words` sub-words.

    A space is put before each word for tokenizers that treat it as part of the word (GPT-2, RoBERTa).
    """
    alone, spaced = (processor(text, add_special_tokens=False)["input_ids"] for text in ("the", " the"))
    space = " " * (alone != spaced and len(spaced) <= len(alone))
    ordered = sorted(words)
    heads = [word[: max_sub_words * 64] for word in ordered]  # limits the tokenizer's time
    texts = [word if BY_CHARACTER.match(word) else space + word for word in heads]
    coded = processor(texts, add_special_tokens=False)["input_ids"] if texts else []
    return {word: list(ids[:max_sub_words]) for word, ids in zip(ordered, coded, strict=True)}


def _special_tokens(processor: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after a text."""
    whole, word = processor("the")["input_ids"], processor("the", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(word) + 1):
        if whole[start : start + len(word)] == word:
            return list(whole[:start]), list(whole[start + len(word) :])
    raise AssertionError(f"{type(processor).__name__} tokenizes a word differently with special tokens")


def _fallback_id(processor: Any) -> int:
    """Return the id that replaces a word without tokens: unknown, EOS, padding or 0."""
    ids = (processor.unk_token_id, processor.eos_token_id, processor.pad_token_id, 0)
    return int(next(token for token in ids if token is not None))


def words_notes(encoded: Encoded, processor: Any) -> list[str]:
    """Return notes on sentences in several windows, truncated words, words without tokens, and unknown tokens."""
    notes = []
    windows = len(encoded.column("windows")) - len(encoded)
    if windows:
        notes.append(
            f"long sentences are split into {counted(windows, 'additional window')}; each word is predicted once"
        )
    if cut := int(encoded.column("cut").sum()):
        notes.append(f"words truncated to a quarter of the maximum length: {cut:,}")
    if void := int(encoded.column("void").sum()):
        notes.append(f"words without tokens, encoded as unknown: {void:,}")
    return notes + unknown_notes(encoded, processor)
