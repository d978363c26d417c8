"""Parsing of entity annotations: a tag per word, or character spans with labels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

from tunesmith.data.formats import Row
from tunesmith.data.text.tags import split_tag
from tunesmith.data.text.words import Sentence, sentence_of
from tunesmith.errors import DataError, counted, did_you_mean, shorten

START, END = ("start", "start_offset", "begin"), ("end", "end_offset", "stop")
LABEL = ("label", "type", "entity", "tag", "entity_group", "class")
UNITS: dict[str, Callable[[str], int]] = {
    "UTF-8 bytes": lambda text: len(text.encode()),
    "UTF-16 units": lambda text: len(text.encode("utf-16-le")) // 2,
}


class Span(NamedTuple):
    """Characters `start` to `end` (exclusive), and their label."""

    start: int
    end: int
    label: str


def has_spans(row: Row) -> bool:
    """Return whether a row is annotated by spans rather than by tags."""
    label = row.values.get("label")
    if not isinstance(label, list):
        return False
    return any(isinstance(part, dict | list) for part in label) or (not label and "tokens" not in row.values)


def words_of(row: Row, marks: str = "") -> Sentence:
    """Return the words of a row: its tokens, or its text split into words. Spans refer to the text.

    `marks` are intra-word punctuation.

    Raises:
        DataError: the row has no words.
    """
    return sentence_of(row, whole_text=has_spans(row), marks=marks)


def read_tags(row: Row, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the tag of each word; spans give BIO tags. `names` maps tag numbers to tags.

    Raises:
        DataError: the number of tags is wrong, or a tag or span is invalid.
    """
    sentence, label = words_of(row), row.values.get("label")
    if has_spans(row):
        assert isinstance(label, list)
        return _tags_of_spans(sentence, [_span(part, sentence, row) for part in label], row)
    if not isinstance(label, list):
        what = f"{shorten(label)} is not a list of tags or spans"
        raise row.fault("label", what, 'give a tag per word, or {"start": 0, "end": 5, "label": "PER"}')
    if len(label) != len(sentence.words):
        what = f"{counted(len(label), 'tag')} for {counted(len(sentence.words), 'word')}"
        raise row.fault("label", what, "give one tag per word")
    return tuple(_tag(part, index, row, names) for index, part in enumerate(label))


def _tag(part: object, index: int, row: Row, names: Sequence[str] | None) -> str:
    if isinstance(part, int) and not isinstance(part, bool):
        if names is None or not 0 <= part < len(names):
            what = f"tag number {part} has no name"
            hint = "set task.tags=[O, B-PER, ...] to name the tags in order"
            if part == -100:
                hint = "-100 marks sub-words without loss: give whole words with one tag each"
            raise row.fault("label", what, hint, index)
        return names[part]
    if not isinstance(part, str) or not part.strip():
        raise row.fault("label", f"{shorten(part)} is not a tag", "use O for a word outside entities", index)
    return sys.intern(part.strip())


def _span(part: Any, sentence: Sentence, row: Row) -> Span:
    """Parse a span: a mapping, or [start, end, label]."""
    if isinstance(part, dict):
        values = [next((part[name] for name in names if name in part), None) for names in (START, END, LABEL)]
        quoted = part.get("text")
    else:
        values, quoted = list(part) if isinstance(part, list) and len(part) == 3 else [None] * 3, None
    start, end, label = values
    if not (_is_count(start) and _is_count(end) and isinstance(label, str) and label.strip()):
        raise row.fault("label", f"{shorten(part)} is not a span", 'give {"start": 0, "end": 5, "label": "PER"}')
    span = Span(start, end, sys.intern(label.strip()))
    if not 0 <= start < end or end > len(sentence.text):
        what = f"the span {start}-{end} exceeds the text of {counted(len(sentence.text), 'character')}"
        if not 0 <= start < end:
            what = f"the span {start}-{end} is empty"
        raise row.fault("label", what, _unit_hint(row) or "the end is exclusive: one after the last character")
    if isinstance(quoted, str) and quoted != sentence.text[start:end]:
        what = f"the span {start}-{end} is {shorten(sentence.text[start:end])}, not {shorten(quoted)}"
        raise row.fault("label", what, _unit_hint(row) or "count characters from 0")
    return span


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _tags_of_spans(sentence: Sentence, spans: list[Span], row: Row) -> tuple[str, ...]:
    tags = ["O"] * len(sentence.words)
    taken: dict[int, Span] = {}
    for span in sorted(spans):
        inside = [n for n, (start, end) in enumerate(sentence.offsets) if start < span.end and end > span.start]
        if (fault := _alignment_fault(span, inside, sentence)) is not None:
            hint = _unit_hint(row) or "count characters from 0; the end is exclusive"
            raise row.fault("label", fault, hint)
        if other := next((taken[n] for n in inside if n in taken), None):
            what = f"the spans {_span_text(other, sentence)} and {_span_text(span, sentence)} overlap"
            raise row.fault("label", what, "keep one of them: a word can have only one tag")
        for number in inside:
            tags[number] = f"{'B' if number == inside[0] else 'I'}-{span.label}"
            taken[number] = span
    return tuple(sys.intern(tag) for tag in tags)


def _alignment_fault(span: Span, inside: list[int], sentence: Sentence) -> str | None:
    """Return the fault of a span that does not begin and end with a word; None if it does. White space is ignored."""
    if not inside:
        return f"the span {span.start}-{span.end} contains no word"
    first, last = sentence.offsets[inside[0]], sentence.offsets[inside[-1]]
    for edge, (start, end) in ((span.start, first), (span.end, last)):
        if start < edge < end:
            word = shorten(sentence.text[start:end])
            return f"the span {_span_text(span, sentence)} splits the word {word}"
    return None


def _span_text(span: Span, sentence: Sentence) -> str:
    return f"{span.start}-{span.end} {shorten(sentence.text[span.start : span.end], 40)}"


def _unit_hint(row: Row) -> str:
    """Return a hint if all spans of a row align with words when counted in bytes or UTF-16 units; else empty."""
    text, label = row.values.get("text"), row.values.get("label")
    assert isinstance(text, str) and isinstance(label, list)
    if text.isascii():
        return ""
    edges = {edge for start, end in span_edges(label) for edge in (start, end)}
    sentence = sentence_of(row, whole_text=True)
    words = {edge for offsets in sentence.offsets for edge in offsets}
    for unit, count in UNITS.items():
        where = {count(text[:edge]) for edge in words}
        if edges and edges <= where:
            return f"the spans appear to count {unit}: count characters"
    return ""


def span_edges(label: list[Any]) -> list[tuple[int, int]]:
    """Start and end of every element of a label that looks like a span."""
    edges = []
    for part in label:
        values = [part.get(name) for name in (*START, *END)] if isinstance(part, dict) else part
        numbers = [value for value in values if _is_count(value)] if isinstance(values, list) else []
        if len(numbers) == 2:
            edges.append((numbers[0], numbers[1]))
    return edges


def unknown_tag(tag: str, index: int, row: Row, names: Sequence[str]) -> DataError:
    """Return the error for a tag that does not occur in training data."""
    what, type_ = f"{shorten(tag)} is not among the {len(names)} tags of train", split_tag(tag)[1]
    near = did_you_mean(type_, {split_tag(name)[1] for name in names} - {""})
    if near.startswith("did"):  # the type is known or misspelled; a common prefix alone does not make tags similar
        return row.fault("label", what, did_you_mean(tag, names[:20]), index)
    hint = f"train has no entity of type {shorten(type_)}: add such sentences, or correct the tag; {near}"
    return row.fault("label", what, hint, index)
