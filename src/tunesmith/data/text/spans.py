"""The tags of a row's words as people write them: a tag for each word, or spans of characters with their labels."""

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
    """Characters `start` to `end` (exclusive), and what they are."""

    start: int
    end: int
    label: str


def has_spans(row: Row) -> bool:
    """Whether a row is labelled by spans rather than by tags."""
    label = row.values.get("label")
    if not isinstance(label, list):
        return False
    return any(isinstance(part, dict | list) for part in label) or (not label and "tokens" not in row.values)


def words_of(row: Row, marks: str = "") -> Sentence:
    """The words of a row: what its spans count in, its tokens, or its text, in which `marks` part no word.

    Raises:
        DataError: there are none.
    """
    return sentence_of(row, whole_text=has_spans(row), marks=marks)


def read_tags(row: Row, names: Sequence[str] | None) -> tuple[str, ...]:
    """The tag of each word; those of spans are BIO. `names` are those that numbers stand for.

    Raises:
        DataError: there is not one for each word, or a span is none.
    """
    sentence, label = words_of(row), row.values.get("label")
    if has_spans(row):
        assert isinstance(label, list)
        return _tags_of_spans(sentence, [_span(part, sentence, row) for part in label], row)
    if not isinstance(label, list):
        what = f"{shorten(label)} is neither a list of tags nor of spans"
        raise row.fault("label", what, 'give a tag for each word, or {"start": 0, "end": 5, "label": "PER"}')
    if len(label) != len(sentence.words):
        what = f"{counted(len(label), 'tag')} for {counted(len(sentence.words), 'word')}"
        raise row.fault("label", what, "give one for each word")
    return tuple(_tag(part, index, row, names) for index, part in enumerate(label))


def _tag(part: object, index: int, row: Row, names: Sequence[str] | None) -> str:
    if isinstance(part, int) and not isinstance(part, bool):
        if names is None or not 0 <= part < len(names):
            what = f"{part} is the number of a tag that has no name"
            hint = "task.tags=[O, B-PER, ...] names them in their order"
            if part == -100:
                hint = "it marks sub-words without loss: give words with a tag for each; sub-words follow"
            raise row.fault("label", what, hint, index)
        return names[part]
    if not isinstance(part, str) or not part.strip():
        raise row.fault("label", f"{shorten(part)} is no tag", "O is the tag of a word in no entity", index)
    return sys.intern(part.strip())


def _span(part: Any, sentence: Sentence, row: Row) -> Span:
    """A span as it is written: a mapping, or [start, end, label]."""
    if isinstance(part, dict):
        found = [next((part[name] for name in names if name in part), None) for names in (START, END, LABEL)]
        said = part.get("text")
    else:
        found, said = list(part) if isinstance(part, list) and len(part) == 3 else [None] * 3, None
    start, end, label = found
    if not (_is_count(start) and _is_count(end) and isinstance(label, str) and label.strip()):
        raise row.fault("label", f"{shorten(part)} is no span", 'give {"start": 0, "end": 5, "label": "PER"}')
    span = Span(start, end, sys.intern(label.strip()))
    if not 0 <= start < end or end > len(sentence.text):
        what = f"the span {start}-{end} lies beyond the text of {counted(len(sentence.text), 'character')}"
        if not 0 <= start < end:
            what = f"the span {start}-{end} holds no character"
        raise row.fault("label", what, _unit_hint(row) or "the end is the character after the last")
    if isinstance(said, str) and said != sentence.text[start:end]:
        what = f"the span {start}-{end} is {shorten(sentence.text[start:end])}, not {shorten(said)}"
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
            hint = _unit_hint(row) or "count characters from 0; the end is the one after the last"
            raise row.fault("label", fault, hint)
        if other := next((taken[n] for n in inside if n in taken), None):
            what = f"the spans {_span_text(other, sentence)} and {_span_text(span, sentence)} overlap"
            raise row.fault("label", what, "keep one of them: a word has one tag")
        for number in inside:
            tags[number] = f"{'B' if number == inside[0] else 'I'}-{span.label}"
            taken[number] = span
    return tuple(sys.intern(tag) for tag in tags)


def _alignment_fault(span: Span, inside: list[int], sentence: Sentence) -> str | None:
    """What is wrong where a span does not begin and end with a word; blanks around it are no matter."""
    if not inside:
        return f"the span {span.start}-{span.end} holds no word"
    first, last = sentence.offsets[inside[0]], sentence.offsets[inside[-1]]
    for edge, (start, end) in ((span.start, first), (span.end, last)):
        if start < edge < end:
            word = shorten(sentence.text[start:end])
            return f"the span {_span_text(span, sentence)} breaks the word {word} in two"
    return None


def _span_text(span: Span, sentence: Sentence) -> str:
    return f"{span.start}-{span.end} {shorten(sentence.text[span.start : span.end], 40)}"


def _unit_hint(row: Row) -> str:
    """The unit in which all spans of a row would begin and end with words, if characters are not meant."""
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
            return f"do they count {unit}? characters are meant"
    return ""


def span_edges(label: list[Any]) -> list[tuple[int, int]]:
    """Start and end of whatever in a label looks like a span."""
    found = []
    for part in label:
        values = [part.get(name) for name in (*START, *END)] if isinstance(part, dict) else part
        numbers = [value for value in values if _is_count(value)] if isinstance(values, list) else []
        if len(numbers) == 2:
            found.append((numbers[0], numbers[1]))
    return found


def unknown_tag(tag: str, index: int, row: Row, names: Sequence[str]) -> DataError:
    """The error of a tag that training does not have."""
    what, type_ = f"{shorten(tag)} is none of the {len(names)} tags that are learned", split_tag(tag)[1]
    near = did_you_mean(type_, {split_tag(name)[1] for name in names} - {""})
    if near.startswith("did"):  # the type is known or misspelt; a prefix in common makes no tag near
        return row.fault("label", what, did_you_mean(tag, names[:20]), index)
    hint = f"train has nothing of type {shorten(type_)}: add such sentences, or mend it; {near}"
    return row.fault("label", what, hint, index)
