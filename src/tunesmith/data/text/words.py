"""Encoding of sentences as words: each word is predicted at exactly one token, its first sub-word.

A sentence beyond the maximum length is split into windows of whole words that overlap by a quarter. A word in two
windows is predicted in the one where it is further from the edge. A text is split into runs of letters and digits,
single punctuation characters, and single Chinese, Japanese and Korean characters. Intra-word punctuation (`O'Neil`,
`www.who.int`, `@who`) is kept in words if training data has such words.
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
"""Punctuation that may be inside a word, or before it."""
MIN_INNER_SHARE = 0.02
"""Minimal ratio of occurrences inside words to occurrences alone for punctuation to count as intra-word."""
_LINK = re.compile(r"(?:https?://|www\.)[!-~]*[\w/=&#-]", re.ASCII)

OVERLAP_DIVISOR = 4
"""Windows overlap by 1/OVERLAP_DIVISOR of their length; a longer word is truncated to that."""


@dataclass(frozen=True)
class Sentence:
    """Words and their offsets in a text: `text[start:end]` is a word."""

    text: str
    offsets: list[tuple[int, int]]
    words: list[str]


def split_words(text: str, marks: str = "") -> list[tuple[int, int]]:
    """Return start and end of each word of a text; `marks` are the intra-word punctuation (`inner_marks`)."""
    pieces: list[tuple[int, int]] = []
    start = None
    for index, character in enumerate(text):
        alone = BY_CHARACTER.match(character)
        if not alone and (character.isalnum() or character == "_" or _is_combining(character)):
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


def _continues_word(text: str, before: tuple[int, int], at: int, marks: str) -> bool:
    """Return whether the piece at a position continues the word before it."""
    last, here, after = text[at - 1], text[at], text[at + 1 : at + 2]
    if here in marks and here not in PREFIX_MARKS:
        return _is_word_character(last) and _is_word_character(after)
    if last in marks and last not in PREFIX_MARKS:
        return before[1] - before[0] > 1 and _is_word_character(here)
    alone = before[1] - before[0] == 1 and not (before[0] and _is_word_character(text[before[0] - 1]))
    return last in marks and alone and _is_word_character(here)


def _is_word_character(character: str) -> bool:
    return (character.isalnum() or character == "_") and not BY_CHARACTER.match(character)


def inner_marks(sentences: Iterable[Sequence[str]]) -> str:
    """Return the intra-word punctuation of a corpus: no hyphen if the corpus splits words at hyphens."""
    whole, apart = Counter[str](), Counter[str]()
    for words in sentences:
        for word in words:
            if len(word) == 1:
                apart[word] += 1
            elif not word.isalnum():
                inside = {m for a, m, b in zip(word, word[1:], word[2:], strict=False) if a.isalnum() and b.isalnum()}
                whole.update(inside | {word[0]} & set(PREFIX_MARKS))
                apart.update({word[0]} & set("'\u2019"))  # `'s`: the corpus splits words there
    return "".join(
        mark
        for mark in INNER_MARKS + PREFIX_MARKS
        if whole[mark] > apart[mark] * (MIN_INNER_SHARE if mark in INNER_MARKS and mark not in "'\u2019" else 1)
    )


def _is_combining(character: str) -> bool:
    """Return whether a character combines with the previous one: accents, vowel signs, zero-width joiners."""
    return character > "\u02ff" and (unicodedata.category(character)[0] == "M" or character in "\u200c\u200d")


def join_words(words: Sequence[str]) -> Sentence:
    """Join words into a text, with spaces between them if the script uses spaces."""
    text, offsets = "", list[tuple[int, int]]()
    for before, word in zip(["", *words], words, strict=False):
        text += " " * _needs_space(before, word) + word
        offsets.append((len(text) - len(word), len(text)))
    return Sentence(text, offsets, list(words))


def _needs_space(before: str, word: str) -> bool:
    """Return whether a space separates two words; Korean uses spaces between words of several syllables."""
    if not before or not (BY_CHARACTER.match(word[:1]) and BY_CHARACTER.match(before[-1])):
        return bool(before)
    return bool(_HANGUL.match(word) and _HANGUL.match(before[-1])) and len(before) + len(word) > 2


def _locate_words(words: list[str], text: str) -> Sentence | None:
    """Locate words in a text that has nothing else but white space; None if it has."""
    offsets, end = list[tuple[int, int]](), 0
    for word in words:
        if (start := text.find(word, end)) < 0 or text[end:start].strip():
            return None
        end = start + len(word)
        offsets.append((start, end))
    return Sentence(text, offsets, words)


def sentence_of(row: Row, *, whole_text: bool = False, marks: str = "") -> Sentence:
    """Return the words of a row: its `tokens`, located in its `text` if there is one, else its `text` split into words.

    `whole_text`: split the text even if there are tokens. `marks`: intra-word punctuation.

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
    sub-word, where it is predicted; `cut`, the number of truncated words; `void`, the number of words without tokens,
    which become unknown tokens. With `inside`: `rest`, the positions of the other sub-words, and `owner`, their words.
    """
    before, after = _special_tokens(processor)
    room = max(max_length - len(before) - len(after), 1)
    most, unknown = max(room // OVERLAP_DIVISOR, 1), _fallback_id(processor)
    pieces = _tokenize_words({word for words in sentences for word in words}, processor, most * 2)
    fields = []
    for words in sentences:
        mine = [pieces[word] for word in words]
        cut, void = sum(len(one) > most for one in mine), sum(not one for one in mine)
        kept = [one[:most] or [unknown] for one in mine]
        one = _window_fields(kept, before, after, room, inside)
        fields.append(one | {"cut": cut, "void": void})
    return fields


def _window_fields(
    pieces: list[list[int]], before: list[int], after: list[int], room: int, inside: bool
) -> dict[str, list[int]]:
    sizes = [len(one) for one in pieces]
    windows = cut_windows(sizes, room)
    homes = [(start + end + 1) // 2 for (_, end), (start, _) in zip(windows[:-1], windows[1:], strict=True)]
    homes = [0, *homes, len(pieces)]
    ids, lengths, first, rest, owner = (list[int]() for _ in range(5))
    for (start, end), low, high in zip(windows, homes[:-1], homes[1:], strict=True):
        begin = len(ids)
        ids += before
        for word in range(start, end):
            if low <= word < high:
                first.append(len(ids))
                rest += range(len(ids) + 1, len(ids) + sizes[word])
                owner += [word] * (sizes[word] - 1)
            ids += pieces[word]
        ids += after
        lengths.append(len(ids) - begin)
    fields = {"input_ids": ids, "windows": lengths, "first": first}
    return fields | ({"rest": rest, "owner": owner} if inside else {})


def cut_windows(sizes: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Return (first word, word after the last) of windows of at most `room` sub-words.

    Each window overlaps the previous one by at most a quarter; no word is larger than that.
    """
    ends = np.concatenate([[0], np.cumsum(sizes)])
    windows: list[tuple[int, int]] = []
    start = 0
    while True:
        end = int(np.searchsorted(ends, ends[start] + room, side="right")) - 1
        windows.append((start, end))
        if end >= len(sizes):
            return windows
        start = max(start + 1, int(np.searchsorted(ends, ends[end] - room // OVERLAP_DIVISOR)))


def _tokenize_words(words: set[str], processor: Any, most: int) -> dict[str, list[int]]:
    """Tokenize each word separately into at most `most` sub-words.

    Tokenizers that include the preceding space in a word (GPT-2, RoBERTa) get it.
    """
    alone, spaced = (processor(text, add_special_tokens=False)["input_ids"] for text in ("the", " the"))
    space = " " * (alone != spaced and len(spaced) <= len(alone))
    ordered = sorted(words)
    heads = [word[: most * 64] for word in ordered]  # bounds the tokenizer's time
    texts = [word if BY_CHARACTER.match(word) else space + word for word in heads]
    coded = processor(texts, add_special_tokens=False)["input_ids"] if texts else []
    return {word: list(ids[:most]) for word, ids in zip(ordered, coded, strict=True)}


def _special_tokens(processor: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text."""
    whole, inside = processor("the")["input_ids"], processor("the", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(inside) + 1):
        if whole[start : start + len(inside)] == inside:
            return list(whole[:start]), list(whole[start + len(inside) :])
    raise AssertionError(f"{type(processor).__name__} tokenizes a word differently with special tokens")


def _fallback_id(processor: Any) -> int:
    """The token for a word without tokens."""
    ids = (processor.unk_token_id, processor.eos_token_id, processor.pad_token_id, 0)
    return int(next(token for token in ids if token is not None))


def words_notes(encoded: Encoded, processor: Any) -> list[str]:
    """Notes on sentences in several windows, truncated words, words without tokens, and unknown tokens."""
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
