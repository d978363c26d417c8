"""The notebook section of the quickstart: the code runs, the output is plain, an interrupted kernel can resume."""

from __future__ import annotations

import builtins
import io
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.data.batches import Batches
from tunesmith.errors import Interrupted, RecipeError
from tunesmith.recipe import to_yaml

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"
SECTION = PAGE.read_text(encoding="utf-8").partition("### In a notebook\n")[2].partition("\n## ")[0]
(CELL,) = re.findall(r"^```python\n(.*?)^```$", SECTION, re.S | re.M)


@pytest.fixture
def output(recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return `output(code)`, which runs code in a simulated notebook cell and returns the visible lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(builtins, "get_ipython", type("ZMQInteractiveShell", (), {}), raising=False)
    recipe = recipe_of("train.epochs=2", "technique=lora").model_copy(update={"output": "runs/notebook"})
    Path("recipe.yaml").write_text(to_yaml(recipe.dump()), encoding="utf-8")

    def run(code: str) -> list[str]:
        screen = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            patch.setattr(sys, "stderr", screen)
            exec(code, {})
        assert "\x1b" not in screen.getvalue(), "a cell shows no escape codes"
        return [re.sub(r"^.*\r", "", line) for line in screen.getvalue().rstrip("\n").split("\n")]

    return run


def test_a_cell_runs_and_shows_plain_lines(output: Any) -> None:
    lines = output(CELL)
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert sum(line.startswith("validation: ") for line in lines) == 1
    assert any(line.endswith("tunesmith train --resume runs/reviews-lora") for line in lines)
    assert len(lines) < 15
    assert tunesmith.load("runs/reviews-lora").predict(["the film was great"])[0]["label"] in ("negative", "positive")


def test_running_a_cell_twice_raises_a_one_line_error(output: Any) -> None:
    output(CELL)
    with pytest.raises(RecipeError, match="not empty; ") as caught:
        output(CELL)
    (line,) = caught.value._render_traceback_()
    assert line == f"RecipeError: {caught.value}" and "\n" not in line


def test_an_interrupted_kernel_resumes(output: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Batches.micro_batches

    def interrupted(batches: Batches, step: int, limits: Any) -> Any:
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return cut(batches, step, limits)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 8 of 12"):
        patch.setattr(Batches, "micro_batches", interrupted)
        output(CELL)
    lines = output('import tunesmith\nassert tunesmith.train(resume="runs/reviews-lora")["steps"] == 12')
    assert any(line == "resumed after step 8 of 12" for line in lines)
