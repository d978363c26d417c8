"""Fixtures of the tests of data files: what a file is read as, and what the command line says when it refuses one."""

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
    """`write("text,label...", "train.csv")`: a file of this text or of these bytes."""

    def file(content: Content, name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return file


@pytest.fixture
def read(write: Write) -> Callable[..., Examples]:
    """`read(content)`: the file as `train` reads it, all of it as training rows unless keys of `data` say otherwise."""

    def of(content: Content | Path, *, labels: Any = "auto", name: str = "train.csv", **data: Any) -> Examples:
        path = content if isinstance(content, Path) else write(content, name)
        given = {"train": str(path), "validation": None} | data
        return dataset.read(TextClassification(labels=labels), Data(**given), seed=0)

    return of


@pytest.fixture
def refuse(command: Any, write: Write, tmp_path: Path) -> Callable[..., str]:
    """`refuse(content)`: what `tunesmith train` says when it stops at this file: one line, with exit code 3.

    No model is there to be loaded: bad data is refused before one is sought.
    """

    def said(content: Content | Path, *words: str, name: str = "train.csv") -> str:
        path = content if isinstance(content, Path) else write(content, name)
        given = ("task=text-classification", "model=./none", f"data.train={path}", "device=cpu")
        code, out, err = command("train", *given, f"output={tmp_path / 'run'}", *words)
        line = err.splitlines()[-1].removeprefix("error: ")
        assert code == 3 and out == "" and "error: " not in line, err
        assert len(line.replace(str(tmp_path), "")) < 330, f"values are shortened: {line}"
        assert "; " in line, f"no way out: {line}"
        return line.replace(f"{tmp_path}/", "")

    return said
