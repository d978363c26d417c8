"""What most tests stand on: a tiny BERT with a real tokenizer on disk, sixty reviews, a cache folder of their own."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tunesmith.recipe import Recipe, load
from tunesmith.testing import tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")

GOOD = ("great", "lovely", "warm", "fine", "superb")
BAD = ("bad", "dull", "poor", "cold", "awful")
WORDS = ("the", "film", "plot", "was", "and", "very", "acting", "story", "it", "this", ".", "!", "a", "not", "so")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over some forty words, dressed as BERT's."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS, *GOOD, *BAD))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    )


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("TUNESMITH_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT of three blocks and its tokenizer, as transformers writes them."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tiny_model("bert", "AutoModelForMaskedLM").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short reviews of unequal length, two classes in turn."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(60):
            word = (BAD, GOOD)[number % 2][number // 2 % 5]
            filler = " ".join(WORDS[(number + k) % len(WORDS)] for k in range(number % 7))
            writer.writerow([f"the film was {word} {filler}".strip(), ("negative", "positive")[number % 2]])
    return path


@pytest.fixture
def recipe_of(tiny_bert: Path, reviews_csv: Path, tmp_path: Path) -> Any:
    """`recipe_of("train.epochs=1", ...)`: a recipe of a run that takes a second or two, fp32, into tmp_path/run."""

    def build(*overrides: str, **values: Any) -> Recipe:
        given = {
            "task": "text-classification",
            "model": str(tiny_bert),
            "data": {"train": str(reviews_csv), "validation": 0.2},
            "technique": "full",
            "train": {"epochs": 1, "batch_size": 8, "precision": "fp32", "device": "cpu", "learning_rate": 1e-3},
            "output": str(tmp_path / "run"),
        }
        return load(None, overrides, given | values)

    return build
