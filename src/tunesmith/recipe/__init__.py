"""The recipe: all settings of a run, read from YAML 1.2 and `KEY=VALUE` words and validated before any download."""

from tunesmith.recipe.aliases import ALIASES
from tunesmith.recipe.load import (
    Data,
    Gain,
    Recipe,
    Stages,
    Train,
    load,
    load_stages,
    located,
    paths_named,
    paths_needed,
    to_yaml,
)

__all__ = [
    "ALIASES",
    "Data",
    "Gain",
    "Recipe",
    "Stages",
    "Train",
    "load",
    "load_stages",
    "located",
    "paths_named",
    "paths_needed",
    "to_yaml",
]
