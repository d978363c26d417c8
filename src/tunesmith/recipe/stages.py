"""Recipes with `stages`: several runs, each starting from the one before it.

Keys outside `stages` hold for every stage; `stages.2.train.epochs=1` on the command line sets one of the second. Every
stage but the first starts from the run before it, unless it names a model itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.recipe.fields import local_path
from tunesmith.recipe.load import build
from tunesmith.recipe.schema import Gain, Recipe
from tunesmith.recipe.source import RecipeSource, read
from tunesmith.recipe.validation import validate


@dataclass(frozen=True)
class Stages:
    """Several runs in one output folder, each starting from the one before it."""

    recipes: list[Recipe]
    gain: Gain | None
    output: str

    def dump(self) -> dict[str, Any]:
        """Return plain values that `load_stages` reads back as these stages."""
        parts = [{key: value for key, value in recipe.dump().items() if key != "output"} for recipe in self.recipes]
        return {"stages": parts, "gain": self.gain.model_dump() if self.gain else None, "output": self.output}


def load_stages(
    source: str | Path | RecipeSource | None = None,
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
    output: str | None = None,
) -> Stages | None:
    """Return the stages of a recipe, or None if it is a single run; `output` replaces the output that is written.

    Raises:
        RecipeError: as `load`.
    """
    source = read(source, overrides, values)
    shared, stages = source.split_stages()
    if not stages:
        return None
    keys = {key[1]: value for key, (value, _) in shared.items() if key[0] == "gain" and len(key) == 2}
    off = shared.get(("gain",), (None, ""))[0] is None and not keys
    gain = None if off else validate(Gain, keys, ("gain",), shared)
    folder = output or str(shared.get(("output",), (f"runs/{Path(source.path or 'stages').stem}", ""))[0])
    recipes: list[Recipe] = []
    for number, leaves in enumerate(stages, start=1):
        if recipes:
            leaves.setdefault(("model",), (recipes[-1].output, "stages"))
        leaves["output",] = (folder, "output")
        recipe = build(leaves)
        recipes.append(recipe.model_copy(update={"output": f"{recipe.output}/{number}-{recipe.task.name}"}))
    return Stages(recipes, gain, local_path(folder))
