"""Conversations in every layout and format, and their errors (A7: chats and instructions)."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.data.formats import Row, Table, read_table
from tunesmith.data.text.conversations import conversation, is_conversation
from tunesmith.errors import DataError
from tunesmith.tasks.text_generation import TextGeneration

TASK = TextGeneration()


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


USER, ASSISTANT, SYSTEM = _said("user", "Is it?"), _said("assistant", "It is."), _said("system", "Be short.")
LAYOUTS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "messages": ({"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "system among them": (
        {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]},
        [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": " Is it?"}, {"from": "gpt", "value": "It is.\n"}],
            "system": "Be short.",
        },
        [SYSTEM, USER, ASSISTANT],
    ),
    "alpaca": ({"instruction": "Is it?", "input": "", "output": "It is."}, [USER, ASSISTANT]),
    "alpaca with input": (
        {"instruction": "Sum up.", "input": "It is so.", "output": "So."},
        [_said("user", "Sum up.\n\nIt is so."), _said("assistant", "So.")],
    ),
    "alpaca with history": (
        {"instruction": "Is it?", "input": "", "output": "It is.", "history": [["Is it?", "It is."]]},
        [USER, ASSISTANT, USER, ASSISTANT],
    ),
    "self-instruct": ({"instruction": "Is it?", "instances": [{"input": "", "output": "It is."}]}, [USER, ASSISTANT]),
    "prompt and completion": ({"prompt": "Is it?", "completion": " It is."}, [USER, ASSISTANT]),
    "both as messages": ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
    "question and answer": ({"id": 7, "question": "Is it?", "answer": "It is."}, [USER, ASSISTANT]),
    "with a passage": (
        {"context": "So.", "question": "Is it?", "answer": "It is."},
        [_said("user", "Is it?\n\nSo."), ASSISTANT],
    ),
    "中文": ({"问题": "是吗？", "回答": "是的。"}, [_said("user", "是吗？"), _said("assistant", "是的。")]),
    "a text beside": ({"instruction": "Is it?", "output": "It is.", "text": "### Is it?"}, [USER, ASSISTANT]),
    "choices by number": ({"question": "Is it?", "choices": ["No.", "It is."], "answer": 1}, [USER, ASSISTANT]),
    "choices by letter": ({"question": "Is it?", "choices": ["No.", "It is."], "answerKey": "B"}, [USER, ASSISTANT]),
    "choices by words": ({"question": "Is it?", "choices": ["No.", "It is."], "answer": "It is."}, [USER, ASSISTANT]),
    "numbers": ({"question": "Is it?", "answer": 42}, [USER, _said("assistant", "42")]),
    "texts in parts": (
        {"messages": [_said("user", [{"type": "text", "text": "Is "}, {"type": "text", "text": "it?"}]), ASSISTANT]},
        [USER, ASSISTANT],
    ),
    "a tool": (
        {"messages": [USER, _said("assistant", "look()"), _said("observation", "yes"), ASSISTANT]},
        [USER, _said("assistant", "look()"), _said("tool", "yes"), ASSISTANT],
    ),
}


def _json_lines(path: Path, row: dict[str, Any]) -> None:
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")


def _json(path: Path, row: dict[str, Any]) -> None:
    path.write_text(json.dumps([row], indent=1, ensure_ascii=False), encoding="utf-8")


def _parquet(path: Path, row: dict[str, Any]) -> None:
    pq.write_table(pa.Table.from_pylist([row]), path)


def _csv(path: Path, row: dict[str, Any]) -> None:
    """Lists are JSON in a cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(row)
        writer.writerow([json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for v in row.values()])


def _table(path: Path, **options: Any) -> Table:
    return read_table(path, TASK.columns, plain_text=True, **options)


@pytest.mark.parametrize("write", [_json_lines, _json, _parquet, _csv], ids=lambda write: write.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_format(layout: str, write: Callable[..., None], tmp_path: Path) -> None:
    given, wanted = LAYOUTS[layout]
    if write is _csv and (given.keys() & {"history", "instances", "choices"} or isinstance(given.get("prompt"), list)):
        pytest.skip("lists are no cells there")
    if write is _parquet and layout == "texts in parts":
        pytest.skip("a column of Parquet is of one kind")
    write(tmp_path / "data", given)
    (row,) = _table(tmp_path / "data")
    assert is_conversation(row) and conversation(row) == wanted
    assert TASK.parse_target(row) == "chat"


def test_a_system_message_of_the_recipe_is_for_those_without_one() -> None:
    bare, own = (
        Row("x:1", {"messages": [USER, ASSISTANT]}),
        Row("x:2", {"messages": [USER, ASSISTANT], "system": "Own."}),
    )
    assert conversation(bare, system="Be short.")[0] == SYSTEM
    assert [one["content"] for one in conversation(own, system="Be short.")[:2]] == ["Own.", "Is it?"]


def test_what_is_asked_needs_no_answer_and_has_none() -> None:
    for messages in ([USER], [USER, ASSISTANT]):
        assert conversation(Row("x:1", {"messages": messages}), answered=False) == [USER]
    assert conversation(Row("x:1", {"prompt": "Is it?"}), answered=False) == [USER]


def test_a_fault_names_the_column_as_the_file_does(tmp_path: Path) -> None:
    for given, told in (
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "conversations[0].from: unknown role 'narrator'"),
        ({"instruction": "Is it?", "output": True}, "output: 'True' is not a text"),
    ):
        _json_lines(tmp_path / "data", given)
        (row,) = _table(tmp_path / "data")
        with pytest.raises(DataError, match=re.escape(f"data:1: {told}")):
            conversation(row)


def _chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown role": (
        _chat(_said("narrator", "x")),
        r"\[0\]\.role: unknown role 'narrator'; set one of system, user, assist",
    ),
    "misspelt role": (_chat(USER, _said("asistant", "x")), r"'asistant'; did you mean 'assistant'"),
    "no role": (_chat({"content": "x"}), r"messages\[0\]: no role in"),
    "no content": (_chat(USER, {"role": "assistant"}), r"messages\[1\]: no content in .*fill it in"),
    "content is null": (_chat(USER, _said("assistant", None)), r"messages\[1\]: no content in"),
    "content is an object": (_chat(_said("user", {"a": 1}), ASSISTANT), r"\[0\]\.content: .* is not a text"),
    "content is true": (_chat(_said("user", True), ASSISTANT), r"'True' is not a text"),
    "a picture": (_chat(_said("user", [{"type": "image", "url": "x"}]), ASSISTANT), r"is not a text; give texts only"),
    "no messages": (_chat(), r"messages: empty; remove the row"),
    "only a system message": (_chat(SYSTEM), r"messages: no messages"),
    "messages are a text": ({"messages": "hello"}, r"messages: 'hello' is not a list of messages; give \[\{"),
    "a message is a text": (_chat("hello"), r"messages\[0\]: 'hello' is not a message"),
    "assistant first": (_chat(ASSISTANT, USER), r"message 1 is from assistant, with nothing before it.*add a question"),
    "assistant behind system": (_chat(SYSTEM, ASSISTANT), r"message 2 is from assistant, after one from system"),
    "two users in a row": (_chat(USER, USER, ASSISTANT), r"message 2 is from user, after one from user.*join the two"),
    "two answers in a row": (_chat(USER, ASSISTANT, ASSISTANT), r"message 3 is from assistant, .*assistant"),
    "system in the middle": (
        _chat(USER, ASSISTANT, SYSTEM, USER, ASSISTANT),
        r"message 3 is a system message, which must be",
    ),
    "system twice": (
        _chat(SYSTEM, USER, ASSISTANT, system="Other."),
        r"system: the messages have a system message too",
    ),
    "no answer at the end": (_chat(USER, ASSISTANT, USER), r"the last message is from user and has no answer: 'Is it"),
    "a tool's result at the end": (_chat(USER, ASSISTANT, _said("tool", "x")), r"the last message is from tool"),
    "a tool unasked": (_chat(USER, _said("tool", "x"), ASSISTANT), r"message 2 is from tool, after one from user"),
    "a tool call": (_chat(USER, CALL), r"messages\[1\]\.tool_calls: not supported.*write the call into content"),
    "empty answer": ({"instruction": "Is it?", "output": ""}, r"no answer: the column for answer is empty or missing"),
    "blank answer": (_chat(USER, _said("assistant", " \n")), r"messages\[1\]\.content: empty answer"),
    "blank question": (_chat(_said("user", ""), ASSISTANT), r"messages\[0\]\.content: empty message from user"),
    "no question": ({"instruction": " ", "output": "x"}, r"no question: the column for prompt is empty or missing"),
    "two instances": (
        {"instruction": "x", "instances": [{"output": "a"}] * 2},
        r"instances: 2 instances, not one; give each",
    ),
    "a choice too far": (
        {"question": "x", "choices": ["a", "b"], "answer": 2},
        r"answer: '2' is not among .*0 to 1, or A",
    ),
    "no such choice": (
        {"question": "x", "choices": ["a", "b"], "answer": "see"},
        r"answer: 'see' is not among the choices",
    ),
    "one choice": ({"question": "x", "choices": ["a"], "answer": 0}, r"choices: .* is not a list of texts"),
    "history of no pairs": (
        {"instruction": "x", "output": "y", "history": ["a"]},
        r"history: .* is not a list of pairs",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said_with_its_place(fault: str, tmp_path: Path) -> None:
    given, said = FAULTS[fault]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ({"messages": [USER, ASSISTANT]} | {}, given)) + "\n")
    bad = list(_table(path))[1]
    with pytest.raises(DataError, match=said) as caught:
        TASK.parse_target(bad)
    assert caught.value.exit_code == 3 and str(caught.value).startswith(f"{path}:2: ") and len(str(caught.value)) < 400


def test_a_file_without_any_such_column_is_refused_at_its_header(tmp_path: Path) -> None:
    path = tmp_path / "chats.csv"
    path.write_text("id,promt,anwser\n1,Is it?,It is.\n")
    with pytest.raises(
        DataError, match=r"chats.csv:1: no column for text or messages or prompt .*id, promt, anwser"
    ) as caught:
        _table(path)
    assert "data.columns.prompt=promt data.columns.answer=anwser" in str(caught.value)
    path.write_text("id,one,two\n1,Is it?,It is.\n")
    with pytest.raises(DataError, match=r"data\.columns\.ROLE=NAME"):
        _table(path)
    (row,) = _table(path, named={"prompt": "one", "answer": "two"})
    assert conversation(row) == [USER, ASSISTANT]


def test_a_row_without_conversation_or_text() -> None:
    with pytest.raises(DataError, match="x:1: .*messages.*prompt.*text"):
        TASK.parse_target(Row("x:1", {"system": "Be short."}))
