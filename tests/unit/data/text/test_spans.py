"""Tags and character spans in common spellings, and their errors."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tunesmith.data.formats import Row
from tunesmith.data.text.spans import read_tags, words_of
from tunesmith.errors import DataError

TEXT = "Ann lives in New York."
ANN, YORK = {"start": 0, "end": 3, "label": "PER"}, {"start": 13, "end": 21, "label": "LOC"}
TAGS = ("B-PER", "O", "O", "B-LOC", "I-LOC", "O")


def _row(label: Any, text: str | None = TEXT, **values: Any) -> Row:
    return Row("a.jsonl:3", ({} if text is None else {"text": text}) | {"label": label} | values)


WAYS: dict[str, Any] = {
    "mappings": [ANN, YORK],
    "in any order": [YORK, ANN],
    "triples": [[0, 3, "PER"], [13, 21, "LOC"]],
    "doccano": [
        {"start_offset": 0, "end_offset": 3, "label": "PER"},
        {"start_offset": 13, "end_offset": 21, "label": "LOC"},
    ],
    "with their text": [ANN | {"text": "Ann"}, YORK | {"text": "New York"}],
    "with blanks around": [ANN | {"end": 4}, YORK | {"start": 12}],
    "other names": [{"begin": 0, "end": 3, "type": "PER"}, {"begin": 13, "end": 21, "entity": "LOC"}],
}


@pytest.mark.parametrize("label", WAYS.values(), ids=WAYS)
def test_spans_become_tags(label: Any) -> None:
    assert read_tags(_row(label), None) == TAGS
    assert words_of(_row(label)).words == ["Ann", "lives", "in", "New", "York", "."]


def test_a_text_without_spans_has_no_entity() -> None:
    assert read_tags(_row([]), None) == ("O",) * 6


def test_spans_count_in_the_text_even_where_there_are_tokens() -> None:
    tokens = [{"text": "Ann", "id": 0}, {"text": "lives", "id": 1}]
    assert read_tags(_row([ANN, YORK], tokens=tokens), None) == TAGS


def test_tags_of_tokens_and_their_numbers() -> None:
    tokens = ["Ann", "lives", 3]
    row = _row(["B-PER", " O ", "O"], None, tokens=tokens)
    assert read_tags(row, None) == ("B-PER", "O", "O") and words_of(row).words == ["Ann", "lives", "3"]
    assert read_tags(_row([1, 0, 0], None, tokens=tokens), ["O", "B-PER"]) == ("B-PER", "O", "O")


EMOJI = "Hi 👋🏽 Zoë in Köln"
WRONG: dict[str, tuple[Row, str]] = {
    "unaligned": (
        _row([ANN | {"start": 1}]),
        "the span 1-3 'nn' splits the word 'Ann'; count characters from 0",
    ),
    "off by one": (_row([YORK | {"end": 20}]), "the span 13-20 'New Yor' splits the word 'York'"),
    "overlap": (_row([YORK, YORK | {"start": 17}]), "the spans 13-21 'New York' and 17-21 'York' overlap; keep one"),
    "twice": (_row([ANN, ANN]), "overlap; keep one of them"),
    "beyond": (_row([ANN | {"end": 99}]), "the span 0-99 exceeds the text of 22 characters"),
    "backwards": (_row([ANN | {"start": 3, "end": 0}]), "the span 3-0 is empty"),
    "negative": (_row([ANN | {"start": -1}]), "the span -1-3 is empty"),
    "of blanks": (_row([ANN | {"start": 3, "end": 4}]), "the span 3-4 contains no word"),
    "another text": (_row([ANN | {"text": "Bob"}]), "the span 0-3 is 'Ann', not 'Bob'; count characters from 0"),
    "bytes": (
        _row([[EMOJI.encode().find("Zoë".encode()), 16, "PER"]], EMOJI),
        "the spans appear to count UTF-8 bytes",
    ),
    "UTF-16": (_row([[8, 11, "PER"]], EMOJI), "the spans appear to count UTF-16 units: count characters"),
    "no label": (_row([{"start": 0, "end": 3}]), "is not a span; give {"),
    "no numbers": (_row([{"start": "0", "end": "3", "label": "PER"}]), "is not a span; give {"),
    "two of three": (_row([[0, 3]]), "[0, 3]' is not a span"),
    "a word": (_row("PER"), "'PER' is not a list of tags or spans"),
    "too few tags": (_row(["O"], None, tokens=["a", "b"]), "1 tag for 2 words; give one tag per word"),
    "no tag": (_row(["O", None], None, tokens=["a", "b"]), "None' is not a tag; use O for a word outside entities"),
    "numbers without names": (
        _row([0, 1], None, tokens=["a", "b"]),
        "0 has no name; set task.tags=",
    ),
    "no words": (_row(["O"], None), "neither text nor tokens; set data.columns.text=NAME"),
    "spans without text": (
        _row([ANN], None, tokens=["Ann"]),
        "spans need a text, which is missing",
    ),
    "empty word": (_row(["O", "O"], None, tokens=["a", ""]), "'' is not a word"),
    "tokens as text": (_row(["O"], None, tokens="a b"), "'a b' is not a list of words"),
    "blank": (_row([], " \n"), "the row has no words; remove the row"),
}


@pytest.mark.parametrize(("row", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_with_place_and_way_out(row: Row, said: str) -> None:
    with pytest.raises(DataError, match="^a.jsonl:3: .*" + re.escape(said)):
        read_tags(row, None)


def test_a_tag_is_placed_on_its_line() -> None:
    row = Row("a.conll:7", {"tokens": ["a", "b"], "label": ["O", ""]}, by_line=True)
    with pytest.raises(DataError, match="^a.conll:8: "):
        read_tags(row, None)
