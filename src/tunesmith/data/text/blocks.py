"""Blocks of equal length from concatenated documents, without padding and without dropped tokens.

`make_blocks` (masked language models) separates documents by special tokens. A block has those of a single text.
`pack_documents` (causal language models) gives each document in a block an attention window of its own.
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
"""Word segmenter: text -> its words in order, whose concatenation is the text."""

BATCH_CHARS = 2**21
UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")
"""Scripts without spaces between words: Chinese characters and Japanese kana."""

WORD_START, WORD_CONTINUATION, SEPARATOR = 1, 0, -1
"""Kinds of tokens: the first of a word, a later one, or a separator between documents."""


def make_blocks(
    rows: Iterable[Row], column: str, processor: Any, max_length: int, *, whole_words: bool, segment: Segment | None
) -> Iterator[Row]:
    """Yield blocks as rows of `input_ids` and `words`.

    A block has `max_length` tokens; the last one may have fewer, and so may a block from whose edge a separator is
    removed. `words` has the index of each token's word within the block, -1 for special and unknown tokens. A block's
    place is that of its first document.
    """
    prefix, separator, suffix = _special_ids(processor)
    block_tokens = max_length - len(prefix) - len(suffix)
    ids, kinds, place = np.empty(0, np.int64), np.empty(0, np.int64), ""

    def block(ids: Array, kinds: Array) -> Iterator[Row]:
        in_document = np.flatnonzero(kinds != SEPARATOR)
        if not len(in_document):
            return
        without_edges = slice(in_document[0], in_document[-1] + 1)
        ids, kinds = ids[without_edges], kinds[without_edges]
        first = np.arange(len(kinds)) == 0
        words = np.cumsum((kinds == WORD_START) | (first & (kinds == WORD_CONTINUATION))) - 1
        words[(kinds == SEPARATOR) | np.isin(ids, processor.all_special_ids)] = -1
        values: dict[str, object] = {
            "input_ids": [*prefix, *ids.tolist(), *suffix],
            "words": [*[-1] * len(prefix), *words.tolist(), *[-1] * len(suffix)],
        }
        yield Row(place, values)

    for row, document_ids, document_kinds in _tokens(rows, column, processor, whole_words, segment):
        between = separator if len(ids) else []
        place = place if len(ids) else row.place
        ids = np.concatenate([ids, between, document_ids]).astype(np.int64)
        kinds = np.concatenate([kinds, [SEPARATOR] * len(between), document_kinds]).astype(np.int64)
        rest = len(ids) - len(ids) % block_tokens
        for start in range(0, rest, block_tokens):
            yield from block(ids[start : start + block_tokens], kinds[start : start + block_tokens])
            place = row.place
        ids, kinds = ids[rest:], kinds[rest:]
    yield from block(ids, kinds)


def pack_documents(
    rows: Iterable[Row], column: str, processor: Any, max_length: int, first: Sequence[int], last: Sequence[int]
) -> Iterator[Row]:
    """Yield blocks as rows of `input_ids` and `windows`, the number of tokens of each document in the block.

    A block has `max_length` tokens or one less; the last one may have fewer. Each document begins with `first` and ends
    with `last`. If a document continues in the next block, its last token is repeated there, so that every token except
    a document's first is predicted exactly once. Special tokens in a text are tokenized as ordinary text.
    """
    ids, windows, place = list[int](), list[int](), ""
    for row, document_ids in _documents(rows, column, processor):
        remaining = [*first, *document_ids, *last]
        while len(remaining) > 1:
            place = place if ids else row.place
            part = remaining[: max_length - len(ids)]
            ids += part
            windows.append(len(part))
            remaining = remaining[len(part) - 1 :]
            if len(ids) > max_length - 2:  # one more token would be a window without a prediction
                yield Row(place, {"input_ids": ids, "windows": windows})
                ids, windows = [], []
    if ids:
        yield Row(place, {"input_ids": ids, "windows": windows})


def _documents(rows: Iterable[Row], column: str, processor: Any) -> Iterator[tuple[Row, list[int]]]:
    """Yield each document with its tokens."""
    for batch in _batches(rows, column):
        texts = [str(row.values[column]) for row in batch]
        ids = processor(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        yield from zip(batch, ids, strict=True)


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
    sentencepiece_starts = _sentencepiece_starts(processor) if whole_words else np.empty(0, bool)
    for batch in _batches(rows, column):
        texts = [str(row.values[column]) for row in batch]
        encoding = processor(texts, add_special_tokens=False, verbose=False)
        for index, (row, text) in enumerate(zip(batch, texts, strict=True)):
            ids = np.asarray(encoding["input_ids"][index], dtype=np.int64)
            starts = np.ones(len(ids), bool)
            if whole_words and len(ids):
                starts = _word_starts(encoding.encodings[index], text, segment) | sentencepiece_starts[ids]
            yield row, ids, np.where(starts, WORD_START, WORD_CONTINUATION)


def _batches(rows: Iterable[Row], column: str) -> Iterator[list[Row]]:
    """Group rows into batches of about BATCH_CHARS characters, for fast tokenization in bounded memory."""
    batch: list[Row] = []
    chars = 0
    for row in rows:
        batch.append(row)
        chars += len(str(row.values[column]))
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _sentencepiece_starts(processor: Any) -> Array:
    """Return a mask over the vocabulary: True if SentencePiece marks the token as the start of a word."""
    starts = np.zeros(len(processor), bool)
    for token, index in processor.get_vocab().items():
        starts[index] = token.startswith("\N{LOWER ONE EIGHTH BLOCK}")
    return starts


def _word_starts(encoding: Any, text: str, segment: Segment | None) -> Array:
    """Return a mask over the tokens: True if the token starts a word.

    Words come from the tokenizer's pre-tokenizer. In scripts without spaces they come from `segment`; if it is None,
    each character is a word.
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
    # a SentencePiece token may start with the space before its word
    at += [text[place].isspace() and place + 1 < len(text) for place in at.tolist()]
    is_unspaced = unspaced[at]
    return np.where(is_unspaced, _differs_from_previous(units[at]), starts) | _differs_from_previous(is_unspaced)


def _differs_from_previous(values: Array) -> Array:
    """Return a mask over the values: True for the first, and for each that differs from the previous one."""
    return np.concatenate([[True], values[1:] != values[:-1]])
