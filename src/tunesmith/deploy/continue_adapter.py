"""Goes on with the adapter that a run left, instead of folding it into its base: `technique: {..., continue: true}`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from tunesmith.deploy import predict
from tunesmith.errors import RecipeError
from tunesmith.models.sources import Source
from tunesmith.recipe import Recipe
from tunesmith.recipe import load as load_recipe
from tunesmith.tasks import Task
from tunesmith.techniques import Technique


def earlier(recipe: Recipe) -> tuple[Recipe, Path]:
    """The recipe over the base of the run that it names as its model, by that run's technique; and the run.

    Raises:
        RecipeError: it is no run that left an adapter, or one by another technique or with other keys.
    """
    run, technique = Path(recipe.model).expanduser(), recipe.technique
    if not (run / "adapter" / "adapter_config.json").exists():
        hint = "model=RUN names one that did; a whole model is gone on with by model=RUN alone"
        raise RecipeError("technique.continue: no run that left an adapter", where=str(run), hint=hint)
    before = load_recipe(run / "recipe.yaml")
    if technique.name != before.technique.name:
        what = f"technique.continue: that run learned by {before.technique.name}, not by {technique.name}"
        raise RecipeError(what, where=str(run), hint=f"technique={{name: {before.technique.name}, continue: true}}")
    fields = type(technique).model_fields
    unsaid = type(technique)(**{key: getattr(technique, key) for key, field in fields.items() if field.is_required()})
    for key in fields:
        asked, was = getattr(technique, key), getattr(before.technique, key)
        if asked not in (was, getattr(unsaid, key)):
            what = f"technique.continue: {key} was {was}, not {asked}"
            raise RecipeError(what, where=str(run), hint="leave it out: the adapter is gone on with as it is")
    return recipe.over(before.model, before.technique), run


def dressed(source: Source, run: Path) -> Source:
    """The base in the tokenizer that the run left it in."""
    return replace(source, folder=run / "base")


def put_back(model: nn.Module, task: Task, technique: Technique, source: Source, run: Path) -> None:
    """Give a model that the technique has prepared what the run has learned.

    Raises:
        RecipeError: the run had another head.
        CheckpointError: the adapter is damaged, or does not fit.
    """
    before = load_recipe(run / "recipe.yaml").task
    assert isinstance(before, Task)
    if before.name != task.name or before.head_config() != task.head_config():
        what = f"technique.continue: that run's head ({before.name}) does not fit {task.name} on this data"
        raise RecipeError(what, where=str(run), hint="leave continue out: what was learned is merged, the head is new")
    technique.load_adapter(model, predict.read_adapter(run / "adapter", source, task.processor))
