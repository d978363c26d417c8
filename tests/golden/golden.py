"""The first ten losses of each recipe, shrunk: a tiny random model, made-up rows, fp32, no dropout.

    python tests/golden/golden.py        # rewrites tests/golden/losses.json, ten seconds

What only moves code leaves them as they are to 1e-4. What changes them on purpose rewrites them and says why. The
rate is one for all: default rates are measured, and a tiny model wants others.
"""

from __future__ import annotations

import json
import os
import runpy
import tempfile
from pathlib import Path

import tunesmith
from tunesmith import recipe as recipes
from tunesmith.console import Console
from tunesmith.testing import tiny_model, tiny_tokenizer

FILE = Path(__file__).with_name("losses.json")
TESTS = Path(__file__).parents[1]
FOLDERS = (TESTS.parent / "recipes", TESTS / "golden")
RECIPES = [path for folder in FOLDERS for path in sorted(folder.glob("*.yaml")) if recipes.load_stages(path) is None]
"""A stage is an ordinary run."""

BASES = {"AutoModelForCausalLM": "llama", "AutoModelForSeq2SeqLM": "marian"}
"""Auto class of a task -> family of the tiny model for its recipes; the default is BERT."""

TRAIN = "epochs=null max_steps=10 batch_size=4 learning_rate=1e-3 head_learning_rate=1e-3 precision=fp32 device=cpu"
SHRUNK = tuple(f"train.{word}" for word in TRAIN.split())


def losses(recipe: Path, work: Path) -> list[float]:
    """Return the losses of ten steps; `work`, an empty folder, becomes the current folder."""
    os.chdir(work)
    for name, (head, row) in runpy.run_path(str(TESTS / "docs" / "test_recipes.py"))["DATA"].items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("\n".join([*head, *(row(number) for number in range(48))]) + "\n", encoding="utf-8")
    given = recipes.load(recipe)
    kind = given.task.auto_class  # type: ignore[attr-defined]
    base = tiny_model(BASES[kind], kind) if kind in BASES else tiny_model("bert", "AutoModelForMaskedLM")
    base.save_pretrained("tiny")
    tiny_tokenizer().save_pretrained("tiny")
    longest = 48 if kind == "AutoModelForCausalLM" else 16  # a conversation is longer than its texts
    shrunk = [*SHRUNK, "model=tiny", f"data.max_length={min(given.data.max_length or 16, longest)}"]
    shrunk += ["technique.dropout=0.0"] if "dropout" in given.dump()["technique"] else []
    result = tunesmith.train(recipe, *shrunk, console=Console(level=-1))
    lines = [json.loads(line) for line in Path(result["run"], "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    """Compute all losses and write the file."""
    found = {}
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory(prefix="tunesmith-") as work:
            os.environ["TUNESMITH_HOME"] = str(Path(work, "home"))
            found[recipe.stem] = [round(loss, 6) for loss in losses(recipe, Path(work))]
            os.chdir(TESTS)
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
