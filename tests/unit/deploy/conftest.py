"""Base models of three families on disk, and the run folder that one of them leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.console import Talk
from tunesmith.testing import tiny_model, tiny_tokenizer

PRETRAINED = {"bert": "AutoModelForMaskedLM", "gpt2": "AutoModelForCausalLM", "llama": "AutoModelForCausalLM"}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> a folder as its makers leave it: without a task's head, GPT-2 and LLaMA without a padding token."""
    folders = {}
    for family, kind in PRETRAINED.items():
        folders[family] = tmp_path_factory.mktemp("bases") / family
        own = {} if family == "bert" else {"pad_token_id": None}
        tiny_model(family, kind, **own).save_pretrained(folders[family])
        tiny_tokenizer().save_pretrained(folders[family])
    return folders


@pytest.fixture
def finish(recipe_of: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`finish("technique=lora", ...)`: the result of a run of six steps, with a test split, in tmp_path/run."""

    def run(*overrides: str, **values: Any) -> dict[str, Any]:
        recipe = recipe_of("data.test=0.25", "train.learning_rate=5e-3", *overrides, **values)
        return tunesmith.train(recipe, talk=Talk(level=-1))

    return run
