"""Documents concatenated and cut into blocks of equal length, without padding or dropped tokens.

`make_blocks` puts separator tokens between documents and wraps each block in special tokens like a single text.
`pack_documents` keeps the documents of a block apart, each in its own attention window.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.formats import Row

Array = NDArray[Any]
Segment = Callable[[str], Iterable[str]]
"""Text -> its words in order; joined, they give the text."""

BATCH_CHARS = 2**21
UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")
"""Chinese characters and Japanese kana: no spaces separate words."""

WORD_START, WORD_CONTINUATION, SEPARATOR = 1, 0, -1
"""Kinds of tokens: the first of a word, a later one, or a separator between documents."""


def make_blocks(
    rows: Iterable[Row], column: str, processor: Any, max_length: int, *, whole_words: bool, segment: Segment | None
) -> Iterator[Row]:
    """Yield blocks as rows of `input_ids` and `words`.

    A block has `max_length` tokens, except the last one and those that lose a separator at an edge. `words` has the
    index of each token's word within the block, -1 for special and unknown tokens. A block's place is that of its
    first document.
    """
    before, between, after = _special_ids(processor)
    room = max_length - len(before) - len(after)
    ids, kinds, place = np.empty(0, np.int64), np.empty(0, np.int64), ""

    def block(ids: Array, kinds: Array) -> Iterator[Row]:
        inside = np.flatnonzero(kinds != SEPARATOR)
        if not len(inside):
            return
        ids, kinds = ids[inside[0] : inside[-1] + 1], kinds[inside[0] : inside[-1] + 1]
        first = np.arange(len(kinds)) == 0
        words = np.cumsum((kinds == WORD_START) | (first & (kinds == WORD_CONTINUATION))) - 1
        words[(kinds == SEPARATOR) | np.isin(ids, processor.all_special_ids)] = -1
        values: dict[str, object] = {
            "input_ids": [*before, *ids.tolist(), *after],
            "words": [*[-1] * len(before), *words.tolist(), *[-1] * len(after)],
        }
        yield Row(place, values)

    for row, own, own_kinds in _tokens(rows, column, processor, whole_words, segment):
        more = between if len(ids) else []
        place = place if len(ids) else row.place
        ids, kinds = np.concatenate([ids, more, own]), np.concatenate([kinds, [SEPARATOR] * len(more), own_kinds])
        ids, kinds = ids.astype(np.int64), kinds.astype(np.int64)
        for start in range(0, len(ids) - len(ids) % room, room):
            yield from block(ids[start : start + room], kinds[start : start + room])
            place = row.place
        rest = len(ids) - len(ids) % room
        ids, kinds = ids[rest:], kinds[rest:]
    yield from block(ids, kinds)


def pack_documents(
    rows: Iterable[Row], column: str, processor: Any, max_length: int, first: Sequence[int], last: Sequence[int]
) -> Iterator[Row]:
    """Yield blocks as rows of `input_ids` (`max_length` of them, or one less) and `windows`, the length per document.

    Documents begin with `first` and end with `last`. A document that continues in the next block repeats its last token
    there, so that every token except a document's first is predicted exactly once. Special tokens that occur in a
    text are tokenized as ordinary text.
    """
    ids, windows, place = list[int](), list[int](), ""
    for row, own in _documents(rows, column, processor):
        left = [*first, *own, *last]
        while len(left) > 1:
            place = place if ids else row.place
            part = left[: max_length - len(ids)]
            ids += part
            windows.append(len(part))
            left = left[len(part) - 1 :]
            if len(ids) > max_length - 2:  # a document's first token alone predicts nothing
                yield Row(place, {"input_ids": ids, "windows": windows})
                ids, windows = [], []
    if ids:
        yield Row(place, {"input_ids": ids, "windows": windows})


def _documents(rows: Iterable[Row], column: str, processor: Any) -> Iterator[tuple[Row, list[int]]]:
    for part in _batches(rows, column):
        texts = [str(row.values[column]) for row in part]
        coded = processor(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        yield from zip(part, coded, strict=True)


def _special_ids(processor: Any) -> tuple[list[int], list[int], list[int]]:
    """Return the special tokens before a text, between two texts, and after a text."""
    first, last = processor.cls_token_id, processor.sep_token_id
    first = processor.bos_token_id if first is None else first
    last = processor.eos_token_id if last is None else last
    after = [] if last is None else [last]
    return ([] if first is None else [first]), after, after


def _tokens(
    rows: Iterable[Row], column: str, processor: Any, whole_words: bool, segment: Segment | None
) -> Iterator[tuple[Row, Array, Array]]:
    """Yield each document with its tokens and their kinds."""
    sign = _sentencepiece_starts(processor) if whole_words else np.empty(0, bool)
    for part in _batches(rows, column):
        texts = [str(row.values[column]) for row in part]
        coded = processor(texts, add_special_tokens=False, verbose=False)
        for index, (row, text) in enumerate(zip(part, texts, strict=True)):
            ids = np.asarray(coded["input_ids"][index], dtype=np.int64)
            begins = np.ones(len(ids), bool)
            if whole_words and len(ids):
                begins = _word_starts(coded.encodings[index], text, segment) | sign[ids]
            yield row, ids, np.where(begins, WORD_START, WORD_CONTINUATION)


def _batches(rows: Iterable[Row], column: str) -> Iterator[list[Row]]:
    """Group rows into batches of BATCH_CHARS characters, for fast tokenization in bounded memory."""
    part: list[Row] = []
    size = 0
    for row in rows:
        part.append(row)
        size += len(str(row.values[column]))
        if size >= BATCH_CHARS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _sentencepiece_starts(processor: Any) -> Array:
    """Return for each token of the vocabulary whether SentencePiece marks it as the first of a word."""
    starts = np.zeros(len(processor), bool)
    for token, index in processor.get_vocab().items():
        starts[index] = token.startswith("\N{LOWER ONE EIGHTH BLOCK}")
    return starts


def _word_starts(encoding: Any, text: str, segment: Segment | None) -> Array:
    """Return for each token whether it begins a word.

    Words are those of the tokenizer's pre-tokenizer. In scripts without spaces they are those of `segment`, or single
    characters if there is no `segment`.
    """
    words = np.asarray([-1 if word is None else word for word in encoding.word_ids])
    starts = _differs_from_previous(words)
    if UNSPACED.search(text) is None:
        return starts
    units = np.arange(len(text))
    if segment is not None:
        sizes = [len(word) for word in segment(text)]
        units = np.repeat(np.arange(len(sizes)), sizes)
    unspaced = np.fromiter((UNSPACED.match(char) is not None for char in text), bool, len(text))
    at = np.minimum(np.asarray([start for start, _ in encoding.offsets]), len(text) - 1)
    at += [text[place].isspace() and place + 1 < len(text) for place in at.tolist()]  # SentencePiece includes a space
    is_unspaced = unspaced[at]
    return np.where(is_unspaced, _differs_from_previous(units[at]), starts) | _differs_from_previous(is_unspaced)


def _differs_from_previous(values: Array) -> Array:
    """Return for each value whether it differs from the previous one; True for the first."""
    return np.concatenate([[True], values[1:] != values[:-1]])
