"""`data check` and `data show` of conversations: errors with their line, and the tokens that carry loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chatting import CHATML, CHATS, tokenizer

from tunesmith.testing import tiny_model

DOUBLE = "<s><s>" + CHATML


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    vocabulary = len(tokenizer())
    tiny_model("llama", "AutoModelForCausalLM", vocab_size=vocabulary, max_position_embeddings=512).save_pretrained(
        folder
    )
    tokenizer(template=CHATML).save_pretrained(folder)
    return folder


def _write(path: Path, chats: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return path


def _kinds(report: dict[str, Any]) -> dict[str, list[int]]:
    return {found["kind"]: [fault["line"] for fault in found["faults"]] for found in report["findings"]}


def test_a_file_of_conversations_is_taken_as_such_and_every_fault_has_its_line(
    base: Path, command: Any, tmp_path: Path
) -> None:
    user = [{"role": "user", "content": "zq" * 100}]
    well, long = {"role": "assistant", "content": "well"}, {"role": "assistant", "content": "qz" * 100}
    bad = [user, [*user, well], [{"role": "narrator", "content": "x"}], [], [CHATS[0][0], long]]
    path = _write(tmp_path / "chats.jsonl", [*CHATS, *bad])
    code, out, _ = command("data", "check", str(path), "--model", str(base), "data.max_length=64", "--json")
    report = json.loads(out)
    found = _kinds(report)
    assert code == 3 and report["task"] == "text-generation"
    assert sorted(found["bad-row"]) == [21, 23, 24], "no answer, an unknown role, no messages"
    assert found["no-answer"] == [22] and found["special-token"] == [13, 14]
    assert set(found["too-long"]) >= {22, 25} and 25 in found["answer-cut"] and 22 not in found["answer-cut"]
    lengths = report["splits"]["train"]["lengths"]
    assert lengths["unit"] == "tokens" and lengths["limit"] == 64 and lengths["longest"] > 100


def test_templates_that_begin_twice_or_are_refused_are_found(base: Path, command: Any, tmp_path: Path) -> None:
    path = _write(tmp_path / "chats.jsonl", CHATS[:4])
    template = tmp_path / "double.jinja"
    template.write_text(DOUBLE)
    words = ("data", "check", str(path), "task=text-generation", "--model", str(base), "--json")
    code, out, _ = command(*words, f"task.chat_template={template}")
    assert code == 0 and _kinds(json.loads(out))["double-bos"] == [1, 2, 3, 4]
    template.write_text(CHATML.replace("<|im_end|>", ""))
    code, out, _ = command(*words, f"task.chat_template={template}")
    (finding,) = (one for one in json.loads(out)["findings"] if one["kind"] == "refused")
    assert code == 3 and "it ends an answer with" in finding["faults"][0]["value"]
    strict = "{% if messages|length > 4 %}{{ raise_exception('at most two turns') }}{% endif %}"
    template.write_text(strict + CHATML)
    code, out, _ = command(*words, f"task.chat_template={template}")
    assert code == 3 and _kinds(json.loads(out))["template"] == [4]


def test_special_tokens_in_raw_text_are_found(base: Path, command: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b c", "one </s> two", "d e f g")))
    code, out, _ = command("data", "check", str(path), "task=text-generation", "--model", str(base), "--json")
    assert code == 0 and _kinds(json.loads(out))["special-token"] == [2]


def test_show_marks_the_answers_of_every_turn(base: Path, command: Any, tmp_path: Path) -> None:
    path = _write(tmp_path / "chats.jsonl", CHATS[1:2])
    words = ("data", "show", str(path), "task=text-generation", "--model", str(base), "data.validation=null")
    code, out, _ = command(*words, "--json")
    ((window,),) = (row["windows"] for row in json.loads(out)["rows"])
    marked = "".join(token["text"] for token in window if token["target"] is not None)
    assert code == 0 and marked == "Hello!<|im_end|>Fine,ĠandĠyou?<|im_end|>"
    assert all(token["target"] in (None, token["text"]) for token in window)
    code, out, _ = command(*words)
    assert "[<|im_end|>]" in out and "<|im_start|> " in out and "[<|im_start|>]" not in out
    page = tmp_path / "page.html"
    command(*words, "--html", str(page))
    assert page.read_text(encoding="utf-8").count('class="token special loss"') == 2, "two ends of answers"


def test_show_of_raw_text_has_a_window_for_each_document(base: Path, command: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("one two\n\nthree four\n\nfive\n")
    words = ("data", "show", str(path), "task=text-generation", "--model", str(base), "data.validation=null", "--json")
    code, out, _ = command(*words)
    (row,) = json.loads(out)["rows"]
    assert code == 0 and len(row["windows"]) == 3
    for window in row["windows"]:
        assert [token["target"] is None for token in window] == [True] + [False] * (len(window) - 1)
        assert window[-1]["text"] == "</s>"
