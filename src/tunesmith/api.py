"""The front door of training: read a recipe once, then train one run or the stages that it lists."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tunesmith.console import Console
from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.recipe import Recipe, RecipeSource, load, load_stages, read
from tunesmith.run import train as run
from tunesmith.storage.run_folder import RECIPES, runs_in
from tunesmith.studies import stages as study


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe | RecipeSource | None = None,
    *overrides: str,
    resume: str | Path | None = None,
    overwrite: bool = False,
    override: Collection[str] = (),
    console: Console | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    **values: Any,
) -> dict[str, Any]:
    """Train a recipe and return the object that `tunesmith train --json` prints.

    For a recipe with stages that is the last stage's result, with `stages`, the results of all, and `gain`.

    `overrides` are `KEY=VALUE` words such as `"train.epochs=1"`; they take precedence over `values`, and `values` over
    the recipe. `resume` is the folder of an earlier run to continue, whose recipe holds if none is given; finished
    stages are not run again. `override` names keys that may differ from the resumed run, e.g. `train.epochs` or
    `stages.2.train.epochs`. `overwrite` replaces the run in the output folder.

    Raises:
        UserError: what the user can fix, with its exit code.
    """
    if override and resume is None:
        raise RecipeError("--override: applies to a resumed run only", hint="add --resume RUN")
    source = _read(recipe, overrides, values, resume)
    options: dict[str, Any] = {
        "resume": resume,
        "overwrite": overwrite,
        "override": override,
        "console": console,
        "offline": offline,
        "allow_pickle": allow_pickle,
        "recipe_file": source.path,
    }
    stages = load_stages(source, output=None if resume is None else str(resume))
    return run.train(load(source), **options) if stages is None else study.train(stages, **options)


def _read(given: Any, overrides: Collection[str], values: Mapping[str, Any], resume: str | Path | None) -> RecipeSource:
    if isinstance(given, Recipe):
        given = given.dump()
    if isinstance(given, Mapping):
        return read(None, overrides, {**given, **values})
    source = read(given, overrides, values)
    if resume is None or source.path is not None:
        return source
    kept = next((file for name in RECIPES if (file := Path(resume) / name).exists()), None)
    if kept is None and not source.layers:
        hint = runs_in(Path(resume)) or "leave --resume out"
        raise CheckpointError("no run to resume in this folder", where=str(resume), hint=hint)
    return source if kept is None else source.on_file(kept)  # a run that was killed before it wrote one starts again
