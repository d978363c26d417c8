"""Documents as one stream of tokens, cut into blocks of equal length: no padding, no token dropped.

Where one document ends and the next begins stands the model's separator; each block is dressed as a text of its own
(`blocks`), or keeps its documents apart, each a window of its own (`packed`).
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
"""A text as its words, one behind the other, nothing left out."""

BATCH_CHARS = 2**21
UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")
"""Chinese characters and Japanese kana, which no blanks divide into words."""

WORD_START, WORD_CONTINUATION, SEPARATOR = 1, 0, -1
"""What a token is to a word: its first one, a later one, or a separator between documents."""


def make_blocks(
    rows: Iterable[Row], column: str, processor: Any, max_length: int, *, whole_words: bool, segment: Segment | None
) -> Iterator[Row]:
    """Rows with `input_ids`, `max_length` of them but in the last block and where a separator would stand at an end,
    and `words`: the number of each token's word within the block, -1 for special and unknown tokens. A block's place
    is that of the document it begins in.
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
    """Rows with `input_ids`, `max_length` (or one less) but in the last, and `windows`: how many each document has.

    Documents begin with `first` and end with `last`. What goes on in the next block begins there with the token before
    it, so that each token but a document's first stands once behind another. Special tokens that a text spells are
    words like others.
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
            if len(ids) > max_length - 2:  # one token more would have nothing behind it
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
    """What stands before a text, between two of them, and after one."""
    first, last = processor.cls_token_id, processor.sep_token_id
    first = processor.bos_token_id if first is None else first
    last = processor.eos_token_id if last is None else last
    after = [] if last is None else [last]
    return ([] if first is None else [first]), after, after


def _tokens(
    rows: Iterable[Row], column: str, processor: Any, whole_words: bool, segment: Segment | None
) -> Iterator[tuple[Row, Array, Array]]:
    """Each document, its tokens, and whether each of them begins a word."""
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
    """Tokenizers are fast on many texts; not so many that memory grows with the corpus."""
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
    """Of each token of the vocabulary, whether SentencePiece marks it as the first of a word."""
    found = np.zeros(len(processor), bool)
    for token, index in processor.get_vocab().items():
        found[index] = token.startswith("\N{LOWER ONE EIGHTH BLOCK}")
    return found


def _word_starts(encoding: Any, text: str, segment: Segment | None) -> Array:
    """Whether each token begins a word: as the tokenizer divided the text, and without blanks as `segment` does, else
    character by character.
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
    at += [text[place].isspace() and place + 1 < len(text) for place in at.tolist()]  # a blank is SentencePiece's own
    there = unspaced[at]
    return np.where(there, _differs_from_previous(units[at]), starts) | _differs_from_previous(there)


def _differs_from_previous(values: Array) -> Array:
    """Whether each value differs from the one before it; the first does."""
    return np.concatenate([[True], values[1:] != values[:-1]])
