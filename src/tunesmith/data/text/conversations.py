"""Conversations, read from the common layouts of chat data as lists of messages with a role and a text.

    messages [{role, content}]                conversations [{from, value}]            each with an optional `system`
    instruction, input, output, history       instruction, instances [{input, output}]
    prompt, completion; question, answer      prompt and completion as lists of messages

White space around a message is removed. A row is refused if it has an unknown role, an empty message, an answer without
a question, two consecutive messages of the same role, or no answer at the end.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from tunesmith.data.columns import Column
from tunesmith.data.formats import Row
from tunesmith.errors import DataError, did_you_mean, shorten

Message = dict[str, str]
"""`role`: system, user, assistant or tool; `content`: the text."""

CHAT_COLUMNS = (
    Column("messages", "messages", ("conversations", "conversation", "dialog", "dialogue", "对话"), required=False),
    Column("prompt", "turn", ("instruction", "question", "query", "problem", "指令", "问题", "input"), required=False),
    Column("context", "value", ("input", "passage", "输入"), required=False),
    Column(
        "answer",
        "turn",
        ("answerkey", "completion", "output", "response", "solution", "target", "回答", "答案", "输出"),
        required=False,
    ),
    Column("system", "value", ("system_prompt",), required=False),
    Column("history", "list", required=False),
    Column("instances", "list", required=False),
    Column("choices", "list", ("options", "选项"), required=False),
)
"""Columns from which conversations are read."""

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "question", "问"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "bard", "bing", "ai", "answer", "答"),
    "tool": ("tool", "function", "observation", "ipython"),
}
_ROLE = {name: role for role, names in ROLES.items() for name in names}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
_PREDECESSORS = {"user": ("system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant",)}
"""Role of a message -> roles that may precede it."""


def has_conversation_columns(names: Collection[str]) -> bool:
    """Return whether columns hold conversations: messages, or questions with answers."""
    present = set(names)
    return "messages" in present or "prompt" in present and not present.isdisjoint({"answer", "instances"})


def is_conversation(row: Row) -> bool:
    """Return whether a row has a column of a conversation; else it is raw text."""
    return not row.values.keys().isdisjoint({"messages", "prompt", "answer", "instances"})


def conversation(row: Row, *, system: str | None = None, answered: bool = True) -> list[Message]:
    """Return the messages of a row, preceded by `system` if the row has no system message.

    If `answered`, the last message must be an answer. Otherwise an answer at the end is removed, so that the last
    message is a question.

    Raises:
        DataError: a message, a role or the order of the messages is invalid.
    """
    messages = _parse_messages(row, "messages") if "messages" in row.values else _messages_of_columns(row, answered)
    system_of_row = row.values.get("system")
    if system_of_row is not None:
        if messages and messages[0]["role"] == "system":
            raise row.fault("system", "the messages have a system message too", "keep one of the two")
        messages.insert(0, _make_message(row, row.column_name("system"), "system", system_of_row))
    elif system is not None and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    if not answered and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    _check_order(row, messages, answered)
    return messages


def all_content(row: Row) -> str | None:
    """Return all text of a conversation, even if the conversation is invalid; None if the row has none."""
    if not is_conversation(row):
        return None
    parts: list[str] = []
    for column in ("system", "history", "messages", "prompt", "context", "answer", "instances"):
        pending = [row.values.get(column)]
        while pending:
            value = pending.pop(0)
            if isinstance(value, list):
                pending = [*value, *pending]
            elif isinstance(value, dict):
                pending = [*(value[name] for name in (*_CONTENT_KEYS, "input", "output") if name in value), *pending]
            elif value is not None:
                parts.append(str(value))
    return "\n".join(parts)


def _fault(row: Row, what: str, hint: str) -> DataError:
    return DataError(what, where=row.place, hint=hint)


def _check_order(row: Row, messages: Sequence[Message], answered: bool) -> None:
    """Check the order of the roles; if `answered`, the last message must be an answer."""
    if not any(message["role"] != "system" for message in messages):
        raise row.fault("messages", "no messages", "remove the row")
    roles = [message["role"] for message in messages]
    for index, role in enumerate(roles):
        if index == 0 and role in ("system", "user"):
            continue
        if role == "system":
            raise _fault(row, f"message {index + 1} is a system message, which must be the first", "move it up")
        if index == 0 or roles[index - 1] not in _PREDECESSORS[role]:
            before = f"after one from {roles[index - 1]}" if index else "with nothing before it"
            what = f"message {index + 1} is from {role}, {before}: {shorten(messages[index]['content'], 40)}"
            if index == 0 and role == "assistant":
                hint = "remove it, or add a question before it"
            elif index and role == roles[index - 1]:
                hint = "join the two"
            else:
                hint = f"add a message from {_PREDECESSORS[role][-1]} before it"
            raise _fault(row, what, hint)
    if answered and roles[-1] != "assistant":
        what = f"the last message is from {roles[-1]} and has no answer: {shorten(messages[-1]['content'], 40)}"
        raise _fault(row, what, "remove it, or add an answer")


def _parse_messages(row: Row, role: str) -> list[Message]:
    """Parse a column that has a list of messages."""
    value = row.values[role]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            what = f"{shorten(value)} is not a list of messages"
            raise row.fault(role, what, 'give [{"role": "user", "content": ...}, ...]') from None
    if not isinstance(value, list) or not value:
        what = "empty" if value == [] else f"{shorten(value)} is not a list of messages"
        hint = "remove the row" if value == [] else 'give [{"role": "user", "content": ...}, ...]'
        raise row.fault(role, what, hint)
    return [_parse_message(row, f"{row.column_name(role)}[{index}]", message) for index, message in enumerate(value)]


def _parse_message(row: Row, where: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise _fault(row, f"{where}: {shorten(message)} is not a message", 'give {"role": ..., "content": ...}')
    role_key = next((name for name in _ROLE_KEYS if message.get(name) is not None), None)
    if role_key is None:
        raise _fault(row, f"{where}: no role in {shorten(message)}", f"add one of {', '.join(ROLES)}")
    role = _ROLE.get(str(message[role_key]).strip().lower())
    if role is None:
        near = did_you_mean(str(message[role_key]).lower(), _ROLE)
        hint = near if near.startswith("did") else f"set one of {', '.join(ROLES)}"
        raise _fault(row, f"{where}.{role_key}: unknown role {shorten(message[role_key])}", hint)
    if message.get("tool_calls"):
        what = f"{where}.tool_calls: not supported: {shorten(message['tool_calls'], 40)}"
        raise _fault(row, what, "write the call into content, in the format that the model should generate")
    content_key = next((name for name in _CONTENT_KEYS if message.get(name) is not None), None)
    if content_key is None:
        raise _fault(row, f"{where}: no content in {shorten(message)}", "fill it in, or remove the row")
    return _make_message(row, f"{where}.{content_key}", role, message[content_key])


def _make_message(row: Row, where: str, role: str, content: Any) -> Message:
    """Build a message from a text, a number, or a list of text parts; `where` is its column, for errors."""
    if isinstance(content, list) and content:  # a list of parts, as in multimodal data
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        other = next((part for part, text in zip(content, texts, strict=True) if not isinstance(text, str)), None)
        if other is not None:
            raise _fault(row, f"{where}: {shorten(other)} is not a text", "give texts only")
        content = "".join(map(str, texts))
    if isinstance(content, bool) or not isinstance(content, str | int | float):
        raise _fault(row, f"{where}: {shorten(content)} is not a text", "give a text")
    if not (text := str(content).strip()):
        what = "empty answer" if role == "assistant" else f"empty message from {role}"
        raise _fault(row, f"{where}: {what}", "fill it in, or remove the row")
    return {"role": role, "content": text}


def _messages_of_columns(row: Row, answered: bool) -> list[Message]:
    """Build the messages of a row with separate columns for question and answer."""
    values = dict(row.values)
    if "instances" in values:
        values |= _instance_columns(row, values["instances"])
    if "choices" in values and "answer" in values:
        values["answer"] = _choose(row, choices_of(row), values["answer"])
    messages: list[Message] = []
    for index, pair in enumerate(_history_pairs(row)):
        place = f"{row.column_name('history')}[{index}]"
        messages += [_make_message(row, place, role, text) for role, text in zip(_PAIR_ROLES, pair, strict=True)]
    if "prompt" not in values:
        raise _fault(row, "no question: the column for prompt is empty or missing", "set data.columns.prompt=NAME")
    if isinstance(values["prompt"], list):
        messages += _parse_messages(row, "prompt")
    else:
        question = [values[role] for role in ("prompt", "context") if role in values]
        messages.append(
            _make_message(row, row.column_name("prompt"), "user", "\n\n".join(str(part).strip() for part in question))
        )
    if isinstance(values.get("answer"), list):
        messages += _parse_messages(row, "answer")
    elif "answer" in values:
        messages.append(_make_message(row, row.column_name("answer"), "assistant", values["answer"]))
    elif answered:
        hint = "fill it in or remove the row; set data.columns.answer=NAME if it is another column"
        raise _fault(row, "no answer: the column for answer is empty or missing", hint)
    return messages


_PAIR_ROLES = ("user", "assistant")


def choices_of(row: Row) -> list[str]:
    """Return the choices of a multiple-choice row; empty for free-form answers."""
    choices: Any = row.values.get("choices", [])
    is_list = isinstance(choices, list) and len(choices) != 1
    if not is_list or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise row.fault("choices", f"{shorten(choices)} is not a list of texts", "give a list of two or more")
    return [choice.strip() for choice in choices]


def _choose(row: Row, choices: list[str], answer: Any) -> str:
    """Return the correct choice, which `answer` gives as text, number (from 0) or letter."""
    if isinstance(answer, str) and answer.strip() in choices:
        return answer.strip()
    index = answer
    if isinstance(answer, str):
        word = answer.strip().upper()
        index = int(word) if word.isdecimal() else ord(word) - ord("A") if len(word) == 1 else None
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(choices):
        return choices[index]
    hint = f"give one of them, 0 to {len(choices) - 1}, or A to {chr(ord('A') + len(choices) - 1)}"
    raise row.fault("answer", f"{shorten(answer)} is not among the choices {shorten(choices)}", hint)


def _history_pairs(row: Row) -> list[Any]:
    """Return the earlier pairs of question and answer."""
    pairs = row.values.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise row.fault("history", f"{shorten(pairs)} is not a list of pairs", "give [[question, answer], ...]")
    return pairs


def _instance_columns(row: Row, instances: Any) -> dict[str, object]:
    """Return context and answer from `instances`, a list of one {input, output}."""
    instance = instances[0] if isinstance(instances, list) and len(instances) == 1 else None
    if not isinstance(instance, dict):
        what = f"{len(instances) if isinstance(instances, list) else shorten(instances)} instances, not one"
        raise row.fault("instances", what, "give each instance its own row")
    parts = {"context": instance.get("input"), "answer": instance.get("output")}
    return {role: value for role, value in parts.items() if isinstance(value, str) and value.strip()}
