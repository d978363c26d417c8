"""Shared fixtures: a tiny BERT with a real tokenizer, sixty reviews, and a separate cache folder."""

from __future__ import annotations

import csv
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.recipe import Recipe, load
from tunesmith.testing import sample_row, tiny_model, tiny_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an activated environment
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # started by nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("TUNESMITH_HOME", str(folder))
    return folder


def _saved(family: str, kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / f"tiny-{family}"
    tiny_model(family, kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT of three blocks and its tokenizer, as transformers writes them."""
    return _saved("bert", "AutoModelForMaskedLM", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Marian of three and two blocks and the same tokenizer."""
    return _saved("marian", "AutoModelForSeq2SeqLM", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaMA of three blocks and the same tokenizer."""
    return _saved("llama", "AutoModelForCausalLM", tmp_path_factory)


@pytest.fixture(scope="session")
def reviews_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short reviews of unequal length in two alternating classes."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("text", "label"))
        writer.writeheader()
        writer.writerows(sample_row("text-classification", number) for number in range(60))
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
