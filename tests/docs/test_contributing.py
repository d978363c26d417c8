"""The example plug-ins of CONTRIBUTING.md, installed like a third-party package."""

from __future__ import annotations

import csv
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunesmith
from tunesmith import registry
from tunesmith.console import Console
from tunesmith.errors import RecipeError
from tunesmith.testing import check, sample_row

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
MODULE = re.compile(r"^```python\n# (\S+\.py)\n(.*?)^```$", re.S | re.M)
SNIPPET = re.compile(r"^```python\n(from tunesmith\.testing.*?)^```$", re.S | re.M)
ENTRY_POINTS = re.compile(r"^```toml\n(.*?)^```$", re.S | re.M)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    site = tmp_path / "site"
    about = site / "my_package-0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 0.1\n", encoding="utf-8")
    groups = tomllib.loads("".join(ENTRY_POINTS.findall(PAGE)))["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    (about / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    for name, code in MODULE.findall(PAGE):
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    registry.get.cache_clear()
    yield
    registry.get.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def test_examples_are_registered(installed: None) -> None:
    assert "bias-only" in registry.names("technique")
    assert "text-share" in registry.names("task")
    assert ("bias-only", "Bias-only fine-tuning.", ["norms"]) in registry.about("technique")


def test_examples_pass_the_contract(installed: None) -> None:
    snippets = SNIPPET.findall(PAGE)
    assert len(snippets) == 2
    for code in snippets:
        exec(code, {})


def test_examples_train_and_predict(installed: None, tiny_bert: Path, tmp_path: Path) -> None:
    with (tmp_path / "shares.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "share"))
        for number in range(40):
            row = sample_row("text-classification", number)
            writer.writerow((row["text"], 0.9 if row["label"] == "positive" else 0.2))
    result = tunesmith.train(
        task="text-share",
        model=str(tiny_bert),
        technique="bias-only",
        data={"train": str(tmp_path / "shares.csv"), "validation": 0.2},
        train={"max_steps": 4, "batch_size": 8, "precision": "fp32", "device": "cpu"},
        output=str(tmp_path / "run"),
        console=Console(level=-1),
    )
    assert set(result["metrics"]["validation"]) >= {"rmse", "mae", "r2"}
    (answer,) = tunesmith.predict(result["run"], ["the film was great"])
    assert 0 < answer["value"] < 1


def test_a_model_without_biases_is_refused(installed: None) -> None:
    with pytest.raises(RecipeError, match="llama .*no biases; .*technique=lora"):
        check("bias-only", "text-classification", "llama")
