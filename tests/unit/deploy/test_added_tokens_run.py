"""Added tokens in a whole run: trained, scored, saved, loaded with and without tunesmith, merged, continued."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from chatting import CHATML, tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith
from tunesmith.console import Console
from tunesmith.deploy import merge as merging
from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.recipe import load
from tunesmith.testing import tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of third parties at import
    pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's

TOKENS = ["<yes>", "<no>"]
QUIET = Console(level=-1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA with a ChatML template and tied embeddings."""
    folder, own = tmp_path_factory.mktemp("base"), tokenizer(template=CHATML)
    sizes = {"vocab_size": len(own), "max_position_embeddings": 512, "eos_token_id": 2, "tie_word_embeddings": True}
    tiny_model("llama", "AutoModelForCausalLM", **sizes).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose answer is one of the new tokens."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"prompt": f"is {n} even", "completion": TOKENS[n % 2]} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _recipe(base: Path, chats: Path, output: Path, *words: str, **keys: Any) -> Any:
    train = {"max_steps": 60, "batch_size": 8, "precision": "fp32", "device": "cpu", "learning_rate": 2e-2}
    task = {"name": "text-generation", "add_tokens": TOKENS, "general": "none", "generate": {"max_new_tokens": 4}}
    given = {"task": task, "model": str(base), "technique": "lora", "train": train,
             "data": {"train": str(chats), "validation": 0.2, "test": 0.1}, "output": str(output)}  # fmt: skip
    return load(None, words, given | keys)


@pytest.fixture(scope="module")
def trained(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "tokens"
    return folder, tunesmith.train(_recipe(base, chats, folder), console=QUIET)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def test_new_rows_learn_at_a_rate_of_their_own(base: Path, chats: Path, tmp_path: Path) -> None:
    short = ("train.max_steps=1", "train.learning_rate=1e-4", "task.generate=null")
    for words, rate in (((), 5e-3), (("train.head_learning_rate=1e-3",), 1e-3), (("task.add_tokens=[]",), 1e-4)):
        recipe = _recipe(base, chats, tmp_path / f"run-{rate}", *short, *words)
        tunesmith.train(recipe, console=QUIET)
        assert load(tmp_path / f"run-{rate}" / "recipe.yaml").train.head_learning_rate == rate


def test_new_rows_alone_are_learned_and_saved(trained: tuple[Path, dict[str, Any]], base: Path) -> None:
    folder, result = trained
    size = len(tokenizer(template=CHATML))
    held = load_file(folder / "adapter" / "adapter_model.safetensors")
    rows = {name: value for name, value in held.items() if "lora" not in name}
    (row,) = rows.values()
    assert list(rows) == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert row.shape == (2, 32) and not torch.allclose(row[0], row[1]), "both have learned, apart"
    about = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert about["trainable_token_indices"] == {"model.embed_tokens": [size, size + 1]}
    assert "model.embed_tokens.added" in json.loads((folder / "run.json").read_text())["learned"]
    assert result["trainable_parameters"] == sum(value.numel() for value in held.values())
    own = AutoTokenizer.from_pretrained(folder / "base")
    assert own.convert_tokens_to_ids(TOKENS) == [size, size + 1]
    assert json.loads((folder / "base" / "config.json").read_text())["vocab_size"] == size
    assert result["metrics"]["test"]["loss"] < 0.7 * result["metrics"]["before"]["validation"]["loss"]


def test_final_scores_come_again_and_new_tokens_are_written(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, result = trained
    assert tunesmith.evaluate(folder)["metrics"] == result["metrics"]["test"]
    tuned = tunesmith.load(folder)
    assert tuned.predict(["is 3 even"])[0]["generated_text"] in TOKENS
    assert tunesmith.evaluate(folder, base=True)["metrics"]["loss"] > result["metrics"]["test"]["loss"]


def test_the_lines_of_the_card_load_it_with_and_without_us(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    text = (folder / "README.md").read_text(encoding="utf-8")
    ours, plain = re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M)
    size = len(tokenizer(template=CHATML)) + 2
    assert f"\nmodel.resize_token_embeddings({size}, mean_resizing=False)\n" in plain
    first: dict[str, Any] = {"print": lambda *_: None}
    second: dict[str, Any] = {}
    exec(ours, first)
    exec(plain, second)
    asked = torch.tensor([[5, size - 1, 9, size - 2, 7]])
    theirs, own = _logits(second["model"], asked), _logits(first["model"].model, asked)
    torch.testing.assert_close(theirs, own, atol=1e-5, rtol=1e-5)


def test_merged_it_is_a_plain_model_that_answers_the_same(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, chats: Path
) -> None:
    folder, _ = trained
    merging.merge_adapter(folder)
    size = len(tokenizer(template=CHATML)) + 2
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert plain.config.vocab_size == size and plain.lm_head.weight is plain.model.embed_tokens.weight
    asked = torch.tensor([[5, size - 1, 9, size - 2, 7]])
    own = _logits(tunesmith.load(folder).model, asked)
    torch.testing.assert_close(_logits(plain, asked), own, atol=1e-5, rtol=1e-5)
    again = _recipe(folder, chats, tmp_path / "again", "train.max_steps=2")
    with pytest.raises(RecipeError, match="task.add_tokens: '<yes>'"):
        tunesmith.train(again, console=QUIET)
    result = tunesmith.train(again, "task.add_tokens=[]", console=QUIET)
    assert result["metrics"]["before"]["validation"]["loss"] < 3, "what was learned of them is the start"


@pytest.mark.parametrize("technique", ("full", {"name": "freeze", "last_n_blocks": 1}), ids=("full", "freeze"))
def test_a_whole_model_has_them_in_its_tables(technique: Any, base: Path, chats: Path, tmp_path: Path) -> None:
    result = tunesmith.train(_recipe(base, chats, tmp_path / "run", technique=technique), console=QUIET)
    size = len(tokenizer(template=CHATML)) + 2
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert (
        len(plain.model.embed_tokens.weight) == size == len(AutoTokenizer.from_pretrained(tmp_path / "run" / "model"))
    )
    assert tunesmith.evaluate(tmp_path / "run")["metrics"] == result["metrics"]["test"]
    if technique != "full":
        before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(plain.model.embed_tokens.weight[:-2], before), "old rows stay bit for bit"


def test_two_runs_with_the_same_tokens_are_summed(base: Path, chats: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        recipe = _recipe(base, chats, tmp_path / f"run{number}", f"train.seed={number}", "train.max_steps=4")
        tunesmith.train(recipe, console=QUIET)
    merging.merge([tmp_path / "run1", tmp_path / "run2"], tmp_path / "sum")
    merged = load_file(tmp_path / "sum" / "model" / "model.safetensors")["model.embed_tokens.weight"]
    rows = [
        load_file(tmp_path / f"run{number}" / "adapter" / "adapter_model.safetensors")[
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        ]
        for number in (1, 2)
    ]
    torch.testing.assert_close(merged[-2:], (rows[0] + rows[1]) / 2, atol=1e-6, rtol=1e-5)


def test_stopped_and_resumed_it_gives_the_same_bits(
    trained: tuple[Path, dict[str, Any]], base: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.training import loop

    whole = load_file(trained[0] / "adapter" / "adapter_model.safetensors")
    steps = loop.steps

    def cut(*args: Any, **given: Any) -> Any:
        for step in steps(*args, **given):
            yield step
            if step.number == 6:
                raise KeyboardInterrupt

    monkeypatch.setattr(loop, "steps", cut)
    recipe = _recipe(base, chats, tmp_path / "run", "train.save_every=3")
    with pytest.raises(KeyboardInterrupt):
        tunesmith.train(recipe, console=QUIET)
    monkeypatch.setattr(loop, "steps", steps)
    tunesmith.train(resume=tmp_path / "run", console=QUIET)
    again = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_other_tokens_in_the_dress_are_refused(base: Path, chats: Path, tmp_path: Path) -> None:
    tunesmith.train(_recipe(base, chats, tmp_path / "run", "train.max_steps=2"), console=QUIET)
    file = tmp_path / "run" / "base" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<yes>", "<yea>"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="run/base: .*the tokenizer differs"):
        tunesmith.load(tmp_path / "run")
