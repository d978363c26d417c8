"""Base models of three families, a finished run, and a check that nothing is written to disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.console import Console
from tunesmith.testing import tiny_model, tiny_tokenizer

PRETRAINED = {"bert": "AutoModelForMaskedLM", "gpt2": "AutoModelForCausalLM", "llama": "AutoModelForCausalLM"}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder of a base model: without a task head, GPT-2 and LLaMA without a padding token."""
    folders = {}
    for family, kind in PRETRAINED.items():
        folders[family] = tmp_path_factory.mktemp("bases") / family
        own = {} if family == "bert" else {"pad_token_id": None}
        tiny_model(family, kind, **own).save_pretrained(folders[family])
        tiny_tokenizer().save_pretrained(folders[family])
    return folders


@pytest.fixture
def finish(recipe_of: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`finish("technique=lora", ...)`: train six steps with a test split in tmp_path/run; return the result."""

    def run(*overrides: str, **values: Any) -> dict[str, Any]:
        recipe = recipe_of("data.test=0.25", "train.learning_rate=5e-3", *overrides, **values)
        return tunesmith.train(recipe, console=Console(level=-1))

    return run


_written: list[str] | None = None
"""Paths opened for writing, created or renamed while recording; None: not recording."""


def _note(event: str, args: tuple[Any, ...]) -> None:
    if _written is None or event not in ("open", "os.mkdir", "os.rename"):
        return
    if event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        _written.append(str(args[0]))


@pytest.fixture(scope="session")
def no_writes() -> Callable[..., Any]:
    """`with no_writes(home):` asserts that nothing is written to disk and no cache folder is created."""
    sys.addaudithook(_note)  # it cannot be removed

    @contextmanager
    def watch(home: Path) -> Iterator[None]:
        global _written
        assert not home.exists()
        written = _written = []
        try:
            yield
        finally:
            _written = None
        assert written == [] and not home.exists()

    return watch
