"""The recipe as written: keys from a file, a mapping and the command line, each with its place.

`read` reads the file once. `load` and `load_stages` build a recipe from the result, and `RecipeSource.locate` adds the
place of a key to an error that is raised later in the run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.errors import RecipeError, UserError, shorten
from tunesmith.recipe.aliases import ALIASES, BATCH_SIZE_FACTORS, STRATEGY_STEPS
from tunesmith.recipe.fields import local_path
from tunesmith.recipe.schema import Data, Recipe, Train
from tunesmith.recipe.validation import Leaves, place_of
from tunesmith.recipe.yaml import Key, Layer, read_file, read_mapping, read_words

E = TypeVar("E", bound=UserError)

SECTIONS = ("task", "data", "technique", "train")
LENGTH_KEYS: tuple[Key, Key] = (("train", "epochs"), ("train", "max_steps"))
"""Keys that exclude each other; a later layer that sets one drops the other."""


@dataclass(frozen=True)
class RecipeSource:
    """Layers of keys, later ones taking precedence; `path` is the recipe file among them, if any."""

    layers: tuple[Layer, ...]
    path: Path | None = None

    def on_file(self, path: Path) -> RecipeSource:
        """Return this source with the keys of a recipe file below its own."""
        return RecipeSource((read_file(path), *self.layers), path)

    def leaves(self) -> Leaves:
        """Return every leaf of the merged layers."""
        leaves: Leaves = {}
        for layer in self.layers:
            _merge(leaves, _flatten(layer))
        return leaves

    def split_stages(self) -> tuple[Leaves, list[Leaves]]:
        """Return the leaves outside `stages`, and those of each stage including what it inherits; [] without stages."""
        lists = (layer.values["stages"] for layer in self.layers if isinstance(layer.values.get("stages"), list))
        count = len(next(lists, []))
        shared: Leaves = {}
        stages: list[Leaves] = [{} for _ in range(count)]
        for values, place in self.layers:
            outside = _flatten(Layer({key: value for key, value in values.items() if key != "stages"}, place))
            _merge(shared, outside)
            own = _stages_by_number(values.get("stages"), count, place) if stages else {}
            for number, leaves in enumerate(stages, start=1):
                inherited = {
                    key: leaf
                    for key, leaf in outside.items()
                    if key[0] != "gain" and (number == 1 or key[0] != "model")
                }
                _merge(leaves, inherited)
                if number in own:
                    _merge(leaves, _flatten(Layer(own[number], partial(_place_in_stage, place, number))))
        return shared, stages

    def paths(self) -> tuple[list[Path], Path | None]:
        """Return the data paths of all stages and the output folder, before anything is validated."""
        shared, stages = self.split_stages()
        recipes = stages or [self.leaves()]
        data = [_path(leaves, ("data", split)) for leaves in recipes for split in ("train", "validation", "test")]
        return [path for path in data if path is not None], _path(shared if stages else recipes[0], ("output",))

    def locate(self, error: E) -> E:
        """Return a later error with the place at which the key that it names was written."""
        leaves = self.leaves()
        if error.stage is not None:
            _, stages = self.split_stages()
            leaves = stages[error.stage - 1] if stages else {}  # resumed: the stages are those of the run folder
        head, _, rest = error.what.partition(": ")
        candidates = [(head, f"{error.where}: {rest}" if error.where else rest)]
        if isinstance(error, RecipeError):  # elsewhere `where` is a file, even if its name is that of a key
            candidates.append((error.where, error.what))
        for name, what in candidates:
            key = tuple(name.split("."))
            if any(leaf[: len(key)] == key for leaf in leaves):
                return type(error)(what, where=place_of(leaves, key), hint=error.hint)
        return error


def read(
    source: str | Path | RecipeSource | None = None,
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
) -> RecipeSource:
    """Read a recipe file, then a mapping and `KEY=VALUE` words on top of it.

    Raises:
        RecipeError: the file cannot be read, or a layer is malformed.
    """
    if not isinstance(source, RecipeSource):
        source = RecipeSource(()) if source is None else RecipeSource((read_file(Path(source)),), Path(source))
    layers = [*source.layers]
    layers += [read_mapping(values)] if values else []
    layers += [read_words(words)] if (words := list(overrides)) else []
    return RecipeSource(tuple(layers), source.path)


def _path(leaves: Leaves, key: Key) -> Path | None:
    """The path at a key; None if there is none, or if validation will refuse it."""
    value, _ = leaves.get(key, (None, ""))
    with contextlib.suppress(ValueError):
        return Path(local_path(value)) if isinstance(value, str) else None
    return None


def _stages_by_number(value: Any, count: int, place: Callable[[Key], str]) -> dict[int, dict[str, Any]]:
    """Keys of the stages of one layer by number from 1: a list in a file, some numbers on the command line."""
    if value is None:
        return {}
    if not isinstance(value, list | dict):
        what = f"must be a list of recipes, one for each stage, not {shorten(value)}"
        raise RecipeError(what, where=place(("stages",)), hint="or set a key of one: stages.1.train.epochs=1")
    given = dict(enumerate(value, start=1)) if isinstance(value, list) else value
    stages: dict[int, dict[str, Any]] = {}
    for name, stage in given.items():
        key = ("stages", str(name))
        if not str(name).isdigit() or not 1 <= int(name) <= count:
            raise RecipeError(f"there is no stage {shorten(name)}", where=place(key), hint=f"use 1 to {count}")
        if not isinstance(stage, dict) or not stage:
            hint = "e.g. `- task: fill-mask`, with the keys of a recipe below"
            raise RecipeError(f"a stage must be a mapping of keys, not {shorten(stage)}", where=place(key), hint=hint)
        if "output" in stage or "output_dir" in stage:
            hint = "set output outside `stages`; each stage gets a subfolder"
            raise RecipeError("a stage has no output of its own", where=place((*key, "output")), hint=hint)
        stages[int(name)] = stage
    return stages


def _place_in_stage(place: Callable[[Key], str], number: int, key: Key) -> str:
    return place(("stages", str(number), *key))


def _flatten(layer: Layer) -> Leaves:
    """The leaves of a layer under our own keys; Hugging Face's batch-size factors become `train.batch_size`."""
    leaves: Leaves = {}
    factors: dict[str, tuple[Any, str]] = {}
    for key, value in _walk(layer.values):
        if key[-1] in ("bf16", "fp16") and value is False:  # the same as leaving it out
            continue
        place = layer.place(key)
        if key[-1] in BATCH_SIZE_FACTORS and key[:-1] in ((), ("train",)):
            factors[key[-1]] = (value, place)
            continue
        own, value = _own_key(key, value)
        if own in leaves:
            raise RecipeError("set twice under two names", where=place, hint="keep one")
        leaves[own] = (value, place)
    if factors:
        _, place = next(iter(factors.values()))
        if ("train", "batch_size") in leaves:
            hint = "keep train.batch_size, the examples per optimizer step"
            raise RecipeError("set twice under two names", where=place, hint=hint)
        leaves["train", "batch_size"] = (_batch_size(factors), place)
    return leaves


def _walk(tree: dict[str, Any], above: Key = ()) -> Iterable[tuple[Key, Any]]:
    """Keys and values of the leaves of a tree; an empty mapping is a leaf."""
    for part, value in tree.items():
        if value == "steps" and STRATEGY_STEPS.get(part) in tree:  # the interval is the value of that key
            continue
        if isinstance(value, dict) and value:
            yield from _walk(value, (*above, part))
        else:
            yield (*above, part), value


def _batch_size(factors: dict[str, tuple[Any, str]]) -> int:
    """Hugging Face's per-device batch size x gradient accumulation steps x processes."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    for value, place in factors.values():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(f"must be an integer of at least 1, not {shorten(value)}", where=place)
        size *= value
    per_device = BATCH_SIZE_FACTORS[0]
    if per_device not in factors:
        hint = f"set {per_device} too, or train.batch_size, the examples per optimizer step"
        raise RecipeError(f"has no effect without {per_device}", where=next(iter(factors.values()))[1], hint=hint)
    return size


def _own_key(key: Key, value: Any) -> tuple[Key, Any]:
    """Our key and value for an alias, a plug-in's short form, or a key of `train` or `data` at the top level."""
    name, convert = ALIASES.get(key[-1], ("", None))
    own = tuple(name.split("."))
    if convert and key[:-1] in ((), own[:-1]) and key != own:
        return own, convert(value)
    if key in (("task",), ("technique",)) and not (value is None or value == {}):
        return (*key, "name"), value
    for section, model in (("train", Train), ("data", Data)):
        if key[0] not in Recipe.model_fields and key[0] in model.model_fields:
            return (section, *key), value
    return key, value


def _merge(leaves: Leaves, later: Leaves) -> None:
    """Put a later layer on top: another plug-in name drops the keys of the earlier plug-in."""
    for key in later:
        replaced = key[:-1] if key[-1] == "name" and key[0] in ("task", "technique") else key
        for old in [old for old in leaves if old[: len(replaced)] == replaced or replaced[: len(old)] == old]:
            del leaves[old]
    for one, other in (LENGTH_KEYS, LENGTH_KEYS[::-1]):
        if later.get(one, (None, ""))[0] is not None:
            leaves.pop(other, None)
    leaves.update(later)
