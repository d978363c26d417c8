"""A conversation with a run: each answer follows the whole history and is streamed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from chatting import CHATML, tokenizer

import tunesmith
from tunesmith.console import Console
from tunesmith.deploy.chat import chat
from tunesmith.errors import RecipeError
from tunesmith.recipe import load
from tunesmith.recipe.fields import Generation
from tunesmith.run import train as run
from tunesmith.testing import tiny_model

HOW = Generation.model_validate({"max_new_tokens": 5})
QUIET = Console(level=-1)


def _trained(folder: Path, lines: list[dict[str, Any]], **task: Any) -> Path:
    vocabulary = len(tokenizer())
    tiny_model("llama", "AutoModelForCausalLM", vocab_size=vocabulary, max_position_embeddings=256).save_pretrained(
        folder / "base"
    )
    tokenizer(template=CHATML).save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    given = {
        "task": {"name": "text-generation", "general": "none", **task},
        "model": str(folder / "base"),
        "data": {"train": str(folder / "rows.jsonl"), "validation": None},
        "train": {"max_steps": 2, "precision": "fp32", "device": "cpu"},
        "output": str(folder / "run"),
    }
    run.train(load(None, (), given), console=QUIET)
    return folder / "run"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"say {n}", "completion": f"{n}"} for n in range(12)]
    return _trained(tmp_path_factory.mktemp("chats"), rows, generate={"max_new_tokens": 5})


def test_each_answer_is_that_of_predict_behind_all_that_was_said(chats: Path) -> None:
    tuned, said = tunesmith.load(chats), list[str]()
    messages = chat(tuned, ["say 1", "", " say 2 "], said.append, HOW, "Be short.")
    assert [one["role"] for one in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "say 2"
    for index in (2, 4):
        (answer,) = tuned.predict([{"messages": messages[:index]}])
        assert answer["generated_text"] == messages[index]["content"]
    told = "".join(said).split("\n")
    assert [part.strip() for part in told[:2]] == [messages[2]["content"].strip("."), messages[4]["content"].strip(".")]


def test_anew_forgets_what_was_said(chats: Path) -> None:
    tuned = tunesmith.load(chats)
    messages = chat(tuned, ["say 1", "/new", "say 2"], lambda text: None, HOW)
    assert messages == chat(tuned, ["say 2"], lambda text: None, HOW) and len(messages) == 2


def test_the_command_line_reads_lines_and_gives_the_conversation(
    chats: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("say 1\nsay 2\n"))
    code, out, err = command("chat", str(chats), "--max-new-tokens", "5", "--json")
    messages = json.loads(out)["messages"]
    assert code == 0 and len(messages) == 4 and messages[1]["content"].strip(".") in err
    monkeypatch.setattr("sys.stdin", io.StringIO("say 1\n"))
    code, out, _ = command("chat", str(chats), "--max-new-tokens", "5")
    assert code == 0 and out.strip() == messages[1]["content"].strip(".").strip()


def test_predict_tells_a_single_text_as_it_is_written(chats: Path, command: Any) -> None:
    (answer,) = tunesmith.load(chats).predict("say 3")
    pieces: list[str] = []
    assert tunesmith.load(chats).stream("say 3", pieces.append) == answer["generated_text"]
    assert "".join(pieces).strip() == answer["generated_text"]
    code, out, _ = command("predict", str(chats), "say 3")
    assert code == 0 and out.strip() == answer["generated_text"]


def test_streamed_and_written_answers_write_nothing_to_disk(chats: Path, home: Path, no_writes: Any) -> None:
    tuned, pieces = tunesmith.load(chats), list[str]()
    with no_writes(home):
        (answer,) = tuned.predict("say 3")
        assert tuned.stream("say 3", pieces.append) == answer["generated_text"]
    assert pieces


def test_a_run_on_raw_text_does_not_converse(tmp_path: Path, tiny_bert: Path, recipe_of: Any) -> None:
    folder = _trained(tmp_path, [{"text": f"one two {n}"} for n in range(12)])
    with pytest.raises(RecipeError, match="not trained on conversations; use `tunesmith predict`"):
        chat(tunesmith.load(folder), ["hi"], print, HOW)
    run.train(recipe_of(output=str(tmp_path / "reviews")), console=QUIET)
    with pytest.raises(RecipeError, match="not trained on conversations; "):
        chat(tunesmith.load(tmp_path / "reviews"), ["hi"], print, HOW)
