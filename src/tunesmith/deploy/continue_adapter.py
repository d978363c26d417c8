"""Continued training of an earlier run's adapter, without merging it: `technique: {..., continue: true}`."""

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


def resolve(recipe: Recipe) -> tuple[Recipe, Path]:
    """Return the recipe with base and technique of the run that `model` names, and the folder of that run.

    Raises:
        RecipeError: the run has no adapter, or one with another technique or other technique keys.
    """
    run, technique = Path(recipe.model).expanduser(), recipe.technique
    if not (run / "adapter" / "adapter_config.json").exists():
        hint = "set model to a run with an adapter; a run with a whole model needs no continue"
        raise RecipeError("technique.continue: no run with an adapter in this folder", where=str(run), hint=hint)
    before = load_recipe(run / "recipe.yaml")
    if technique.name != before.technique.name:
        what = f"technique.continue: the run used {before.technique.name}, not {technique.name}"
        raise RecipeError(what, where=str(run), hint=f"technique={{name: {before.technique.name}, continue: true}}")
    fields = type(technique).model_fields
    defaults = type(technique)(**{key: getattr(technique, key) for key, field in fields.items() if field.is_required()})
    for key in fields:
        value, was = getattr(technique, key), getattr(before.technique, key)
        if value not in (was, getattr(defaults, key)):
            what = f"technique.continue: {key} was {was}, not {value}"
            hint = f"leave technique.{key} out: a continued adapter keeps its keys"
            raise RecipeError(what, where=str(run), hint=hint)
    return recipe.over(before.model, before.technique), run


def with_snapshot(source: Source, run: Path) -> Source:
    """Return the source with the base snapshot of a run (config, tokenizer) as its folder."""
    return replace(source, folder=run / "base")


def load_trained(model: nn.Module, task: Task, technique: Technique, source: Source, run: Path) -> None:
    """Load the adapter of a run into a model to which the technique has been applied.

    Raises:
        RecipeError: the run has another head.
        CheckpointError: the adapter is damaged, or does not fit.
    """
    before = load_recipe(run / "recipe.yaml").task
    if before.name != task.name or before.head_config() != task.head_config():
        what = f"technique.continue: the run's head ({before.name}) does not fit {task.name} on this data"
        raise RecipeError(what, where=str(run), hint="leave continue out: the adapter is merged and the head is new")
    technique.load_adapter(model, predict.read_adapter(run / "adapter", source, task.processor))
