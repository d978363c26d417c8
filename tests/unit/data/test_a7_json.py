"""Bad inputs 37-56, JSON and JSONL: each is read, read with a note, or refused with file and row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from messages import has_parts

from tunesmith.data.formats import json_array
from tunesmith.training.dataset import Examples

Refuse = Callable[..., str]
Read = Callable[..., Examples]
SKIP = "data.on_bad_row=skip"
ROWS = [(f"the film was {word}", ("pos", "neg")[n % 2]) for n, word in enumerate("great bad fine dull".split())]
OBJECTS = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
each_form = pytest.mark.parametrize("form", ("lines", "array"))


def _file(objects: Iterable[str], form: str = "lines") -> str:
    """Return the objects, one a line, as lines or as an array; each is on the line of its number."""
    return "\n".join([*objects, ""]) if form == "lines" else "[" + ",\n".join(objects) + "]"


def _with(third: str, form: str = "lines") -> str:
    return _file([*OBJECTS[:2], third, *OBJECTS[3:]], form)


def _rows(read: Examples) -> list[tuple[object, object]]:
    return [(row.values["text"], row.values["label"]) for row in read.splits["train"].rows()]


def _is_skipped(read: Read, content: str, reason: str) -> bool:
    found = read(content, on_bad_row="skip")
    return _rows(found) == [*ROWS[:2], ROWS[3]] and found.notes == [f"train: skipped 1 row ({reason})"]


@each_form
@pytest.mark.parametrize("indent", (None, 2))
@pytest.mark.parametrize("name", ("train.json", "train.jsonl", "train.csv"))
def test_a7_37_an_array_and_lines_are_told_apart(name: str, indent: int | None, form: str, read: Read) -> None:
    objects = [{"text": text, "label": label, "more": {"id": [1]}} for text, label in ROWS]
    content = json.dumps(objects, indent=indent) if form == "array" else _file(json.dumps(row) for row in objects)
    assert _rows(read(f" \n{content}\n\n", name=name)) == ROWS


@pytest.mark.parametrize("size", (1, 7, 64, 10_000))
def test_a7_37_an_array_is_read_piece_by_piece(size: int, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f'{text} {{[",]}} "\\ é 👍 {n}' + "so " * (n % 50), label) for n, (text, label) in enumerate(ROWS * 50)]
    content = json.dumps([{"text": text, "label": label, "n": 123_456} for text, label in rows], indent=1)
    monkeypatch.setattr(json_array, "CHUNK_CHARS", size)
    assert _rows(read(content)) == rows
    found = read(content.replace('\\u00e9 \\ud83d\\udc4d 100"', '\\u00e9 \\ud83d 100"'), on_bad_row="skip")
    assert _rows(found) == rows[:100] + rows[101:] and found.notes == ["train: skipped 1 row (lone surrogate)"]


ARRANGEMENTS = {
    "one object on many lines": (
        json.dumps({"text": "a", "label": "b"}, indent=1),
        ("1: not valid JSON: ", "'{'; ", "one object per line"),
    ),
    "rows inside an object": (
        json.dumps({"data": [{"text": "a", "label": "b"}]}),
        ("1: no column for text and label ", "data; ", "data.columns.text=NAME data.columns.label=NAME"),
    ),
    "columns": (
        json.dumps({"text": {"0": "a"}, "label": {"0": "b"}}),
        ("1: text: '{'0': 'a'}' is not a text; ", "one text", SKIP),
    ),
    "two arrays": ("[" + ",".join(OBJECTS) + "] []", ("1: ", "after the array", "; ")),
    "two on a line": (
        f"{OBJECTS[0]} {OBJECTS[1]}",
        ("1: ", "after the object", '\' {"text": "the film was bad", "label": "neg"}\'; ', "one object"),
    ),
    "no commas": ("[" + "\n".join(OBJECTS) + "]", ("2: missing comma ", "; ")),
}


@pytest.mark.parametrize(("content", "parts"), ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
def test_a7_37_other_arrangements_are_refused(content: str, parts: tuple[str, ...], refuse: Refuse) -> None:
    assert has_parts(refuse(content), f"train.csv:{parts[0]}", *parts[1:])


@each_form
def test_a7_38_a_trailing_comma_in_an_object_is_refused(form: str, refuse: Refuse, read: Read) -> None:
    said = refuse(_with('{"text": "so", "label": "pos",}', form))
    assert has_parts(said, "train.csv:3: not valid JSON: ", "; remove the comma")
    if form == "lines":
        assert _is_skipped(read, _with('{"text": "so", "label": "pos",}'), "not valid JSON")


def test_a7_38_a_trailing_comma_in_the_array_is_refused(refuse: Refuse) -> None:
    said = refuse(_file(OBJECTS, "array")[:-1] + ",\n]")
    assert has_parts(said, "train.csv:5: not valid JSON: ", "; remove the comma")


@each_form
def test_a7_39_single_quotes_are_refused(form: str, refuse: Refuse, read: Read) -> None:
    said = refuse(_with("{'text': 'so', 'label': 'pos'}", form))
    assert has_parts(said, "train.csv:3: not valid JSON: ", "; ", "double quotation marks")
    if form == "lines":
        assert _is_skipped(read, _with("{'text': 'so', 'label': 'pos'}"), "not valid JSON")


@pytest.mark.parametrize("keep", (1, 8, 12, 20, -1))
def test_a7_40_a_last_line_that_is_cut_off_is_refused_or_skipped(keep: int, refuse: Refuse, read: Read) -> None:
    content = _file(OBJECTS) + OBJECTS[0][:keep]
    said = refuse(content)
    assert said.startswith("train.csv:5: not valid JSON: ") and said.endswith(SKIP)
    assert has_parts(said, "train.csv:5: ", "; ", "truncated", "remove it") or keep == 1
    assert read(content, on_bad_row="skip").notes == ["train: skipped 1 row (not valid JSON)"]


@pytest.mark.parametrize("cut", (1, 2, 10, 30, 40))
def test_a7_40_an_array_that_is_cut_off_is_refused(cut: int, refuse: Refuse) -> None:
    said = refuse(_file(OBJECTS, "array")[:-cut])
    assert has_parts(said, "train.csv:4: ", "array is truncated", "'; ", "again")


def test_a7_41_blank_lines_are_passed_over_and_counted_as_lines(read: Read, refuse: Refuse) -> None:
    content = "\n\n".join([" ", *OBJECTS, "\t", "\r\n"])
    assert _rows(read(content)) == ROWS
    assert refuse(content.replace('"dull"', "dull").replace("dull", 'dull"', 1)).startswith("train.csv:9: not valid")


@each_form
@pytest.mark.parametrize("number", ("NaN", "Infinity", "-Infinity", "1e999", "-1e999"))
def test_a7_42_what_is_no_number_is_refused_or_skipped(number: str, form: str, refuse: Refuse, read: Read) -> None:
    content = _with(f'{{"text": "so", "label": {number}}}', form)
    said = refuse(content)
    what = f"'{number}' overflows a float" if "e" in number else f"{number} is not JSON"
    assert said.startswith(f'train.csv:3: {what} in \'{{"text": "so", ') and said.endswith(SKIP)
    assert _is_skipped(read, content, "not valid JSON")


@each_form
@pytest.mark.parametrize("more", ('"text": "other"', '"id": {"a": 1, "a": 2}'), ids=("column", "inside"))
def test_a7_43_a_key_given_twice_is_refused_or_skipped(more: str, form: str, refuse: Refuse, read: Read) -> None:
    content = _with(f'{{"text": "so", "label": "pos", {more}}}', form)
    said = refuse(content)
    key = "a" if "id" in more else "text"
    assert said.startswith(f"train.csv:3: duplicate key '{key}' in '{{") and has_parts(said, "", "; keep one", SKIP)
    assert _is_skipped(read, content, "not valid JSON")


@each_form
@pytest.mark.parametrize(
    ("third", "key"),
    (
        ('{"text": "so \\ud83d", "label": "pos"}', "text"),
        ('{"text": "so \\uDE00\\uD83D", "label": "pos"}', "text"),
        ('{"text": "so", "label": ["pos", "\\ud83d"]}', "label"),
        ('{"text": "so", "label": "pos", "more": {"\\udead": 1}}', "more"),
    ),
)
def test_a7_44_half_a_character_is_refused_or_skipped(
    third: str, key: str, form: str, refuse: Refuse, read: Read
) -> None:
    said = refuse(_with(third, form))
    assert has_parts(said, f"train.csv:3: {key}: ", "lone surrogate", "'; ", "remove it", SKIP)
    assert _is_skipped(read, _with(third, form), "lone surrogate")


@each_form
def test_a7_44_whole_characters_written_as_two_halves_are_read(form: str, read: Read) -> None:
    content = _with('{"text": "so \\ud83d\\ude00 \\\\ud83d", "label": "pos"}', form)
    assert _rows(read(content))[2] == ("so 😀 \\ud83d", "pos")


@each_form
@pytest.mark.parametrize("opening", ("[", '{"a":'))
def test_a7_45_what_is_nested_100_000_deep_is_refused(opening: str, form: str, refuse: Refuse, read: Read) -> None:
    deep = f'{{"text": "so", "label": {opening * 100_000}1{("]" if opening == "[" else "}") * 100_000}}}'
    said = refuse(_with(deep, form))
    assert has_parts(said, "train.csv:3: not valid JSON: ", "nested too deep", "; ", "flatten")
    if form == "lines":
        assert _is_skipped(read, _with(deep), "not valid JSON")


@each_form
def test_a7_46_a_number_of_5000_digits_is_refused_or_skipped(form: str, refuse: Refuse, read: Read) -> None:
    content = _with(f'{{"text": "so", "label": {"7" * 5000}}}', form)
    said = refuse(content)
    assert has_parts(said, "train.csv:3: ", "5,000 digits", "'{", "; ", "quote it", "identifier")
    assert _is_skipped(read, content, "not valid JSON")


OTHERS = ('"so warm"', "42", "null", "true", "[]", '["so warm", "pos"]')


@each_form
@pytest.mark.parametrize("other", OTHERS)
def test_a7_47_a_row_that_is_no_object_is_refused_or_skipped(other: str, form: str, refuse: Refuse, read: Read) -> None:
    said = refuse(_with(other, form))
    assert has_parts(said, f"train.csv:3: '{other}' is not an object; ", "key per column", SKIP)
    assert _is_skipped(read, _with(other, form), "not an object")


@pytest.mark.parametrize("other", ("42", "null", '"so warm"'))
def test_a7_47_a_first_line_that_is_no_object_is_refused(other: str, refuse: Refuse) -> None:
    assert refuse(_file([other, *OBJECTS])).startswith(f"train.csv:1: '{other}' is not an object; ")


@pytest.mark.parametrize("rows", ([["so warm", "pos"], ["so dull", "neg"]], ["so warm", "so dull"]))
def test_a7_47_arrays_without_any_object_are_refused(rows: list[Any], refuse: Refuse) -> None:
    said = refuse(json.dumps(rows))
    assert has_parts(said, f"train.csv:1: '{json.dumps(rows[0])}' is not an object; ", "key per column")


NO_TEXTS = {
    "null": ("empty", "remove the row"),
    '""': ("empty", "remove the row"),
    '" \\n"': ("empty", "remove the row"),
    "42": ("'42' is not a text", "quotes"),
    "4.5": ("'4.5' is not a text", "quotes"),
    "true": ("'True' is not a text", "quotes"),
    '["so", "warm"]': ("'['so', 'warm']' is not a text", "one text"),
    "[]": ("'[]' is not a text", "one text"),
    '{"en": "so"}': ("'{'en': 'so'}' is not a text", "one text"),
}


@each_form
@pytest.mark.parametrize("value", NO_TEXTS)
def test_a7_48_a_text_that_is_none_is_refused_or_skipped(value: str, form: str, refuse: Refuse, read: Read) -> None:
    content = _with(f'{{"text": {value}, "label": "pos"}}', form)
    what, hint = NO_TEXTS[value]
    assert has_parts(refuse(content), f"train.csv:3: text: {what}; ", hint, SKIP)
    assert _is_skipped(read, content, "empty text" if what == "empty" else "text is not a text")


@each_form
def test_a7_48_a_second_text_that_only_late_rows_have_is_found(form: str, read: Read) -> None:
    objects = [{"text": f"the film {n}", "label": ("pos", "neg")[n % 2]} for n in range(300)]
    objects[270] |= {"hypothesis": "it was great"}
    found = list(read(_file([json.dumps(row) for row in objects], form)).splits["train"].rows())
    assert found[270].values["text_pair"] == "it was great" and len(found) == 300
    assert not any("text_pair" in row.values for row in found if row is not found[270])


@each_form
@pytest.mark.parametrize("missing", ("text", "label"))
def test_a7_48_a_key_that_is_not_there_is_refused_or_skipped(
    missing: str, form: str, refuse: Refuse, read: Read
) -> None:
    content = _with(json.dumps({key: "so" for key in ("text", "label") if key != missing}), form)
    assert has_parts(refuse(content), f"train.csv:3: {missing}: missing; ", "remove the row", SKIP)
    assert _is_skipped(read, content, f"empty {missing}")


@pytest.mark.parametrize("label", ("null", '{"id": 1}', '[["pos"]]', '["pos", null]', '[{"pos": 1}]'))
def test_a7_48_a_label_that_is_none_is_refused_or_skipped(label: str, refuse: Refuse, read: Read) -> None:
    content = _with(f'{{"text": "so", "label": {label}}}')
    what = ("empty",) if label == "null" else (f"'{json.loads(label)}'", "unsupported type")
    assert has_parts(refuse(content), "train.csv:3: label: ", *what, "; ")
    assert _is_skipped(read, content, "empty label" if label == "null" else "label has an unsupported type")


def _turns(*roles: str, **more: object) -> list[dict[str, object]]:
    return [{"role": role, "content": f"so {n}"} | more for n, role in enumerate(roles)]


CHATS: dict[str, list[dict[str, object]]] = {
    "49 unknown role": _turns("user", "narrator"),
    "50 missing content": [{"role": "user"}, {"role": "assistant", "content": "so"}],
    "51 empty messages": [],
    "52 assistant first": _turns("assistant", "user"),
    "53 two users in a row": _turns("user", "user", "assistant"),
    "54 system mid-way": _turns("user", "assistant", "system", "user", "assistant"),
    "55 ends without assistant": _turns("user", "assistant", "user"),
    "56 tool call without result": [*_turns("user"), {"role": "assistant", "tool_calls": [{"name": "so"}]}],
    "56 ten thousand turns": _turns(*("user", "assistant") * 5000),
}
each_chat = pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())


@each_chat
@each_form
@pytest.mark.parametrize("key", ("messages", "conversations"))
def test_a7_49_to_56_conversations_are_no_rows_of_text_and_label(
    key: str, form: str, chat: list[Any], refuse: Refuse
) -> None:
    said = refuse(_file([json.dumps({key: chat})] * 4, form))
    assert has_parts(said, "train.csv:1: ", f"conversations ({key})", "no column for text and label; ", "columns")
    said = refuse(_file([json.dumps({key: chat, "label": "pos"})] * 4, form))
    assert has_parts(said, "train.csv:1: ", f"conversations ({key}, label)", "no column for text; ", "columns")


@each_chat
@each_form
def test_a7_49_to_56_a_conversation_taken_for_the_text_is_refused_or_skipped(
    form: str, chat: list[Any], refuse: Refuse, read: Read
) -> None:
    objects = [json.dumps({"messages": text, "label": label}) for text, label in ROWS]
    objects[2] = json.dumps({"messages": chat, "label": "pos"})
    content = _file(objects, form)
    said = refuse(content, "data.columns.text=messages")
    what = ("conversation", f"{len(chat):,} turns", "'[{'role'") if chat else ("'[]' is not a text",)
    assert has_parts(said, "train.csv:3: messages: ", *what, "; ") and said.endswith(SKIP)
    found = read(content, columns={"text": "messages"}, on_bad_row="skip")
    assert _rows(found) == [*ROWS[:2], ROWS[3]]
    assert found.notes == ["train: skipped 1 row (text is not a text)"]
