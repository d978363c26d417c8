"""The recipe: all settings of a run, read from YAML 1.2 and `KEY=VALUE` words and validated before any download."""

from tunesmith.recipe.load import load, paths_needed
from tunesmith.recipe.schema import Data, Gain, Recipe, Train
from tunesmith.recipe.source import RecipeSource, read
from tunesmith.recipe.stages import Stages, load_stages
from tunesmith.recipe.yaml import to_yaml

__all__ = [
    "Data",
    "Gain",
    "Recipe",
    "RecipeSource",
    "Stages",
    "Train",
    "load",
    "load_stages",
    "paths_needed",
    "read",
    "to_yaml",
]
