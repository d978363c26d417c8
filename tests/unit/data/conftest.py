"""Fixtures for data files: write one, read it as `train` does, and get the error when it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.recipe import Data
from tunesmith.tasks.text_classification import TextClassification
from tunesmith.training import dataset
from tunesmith.training.dataset import Examples

Content = str | bytes
Write = Callable[[Content, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write("text,label...", "train.csv")`: write the text or bytes to a file and return its path."""

    def file(content: Content, name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return file


@pytest.fixture
def read(write: Write) -> Callable[..., Examples]:
    """`read(content)`: read the file as `train` does; all rows are training rows unless `data` keys are given."""

    def of(content: Content | Path, *, labels: Any = "auto", name: str = "train.csv", **data: Any) -> Examples:
        path = content if isinstance(content, Path) else write(content, name)
        given = {"train": str(path), "validation": None} | data
        return dataset.read(TextClassification(labels=labels), Data(**given), seed=0)

    return of


@pytest.fixture
def refuse(command: Any, write: Write, tmp_path: Path) -> Callable[..., str]:
    """`refuse(content)`: return the one-line error of `tunesmith train` for this file (exit code 3).

    The model does not exist: bad data is refused before the model is resolved.
    """

    def said(content: Content | Path, *words: str, name: str = "train.csv") -> str:
        path = content if isinstance(content, Path) else write(content, name)
        given = ("task=text-classification", "model=./none", f"data.train={path}", "device=cpu")
        code, out, err = command("train", *given, f"output={tmp_path / 'run'}", *words)
        line = err.splitlines()[-1].removeprefix("error: ")
        assert code == 3 and out == "" and "error: " not in line, err
        assert len(line.replace(str(tmp_path), "")) < 330, f"values are shortened: {line}"
        assert "; " in line, f"no fix: {line}"
        return line.replace(f"{tmp_path}/", "")

    return said
