"""Help for writing a recipe: a commented starter, and a JSON schema for editors."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from tunesmith import registry
from tunesmith.recipe.load import unread_data_keys
from tunesmith.recipe.schema import Data, Gain, Recipe, Train
from tunesmith.registry import Keys

__all__ = ["schema", "starter"]


def starter(task: str, technique: str) -> str:
    """Return a recipe with the required keys set, and every other key with its default as a comment."""
    chosen: dict[str, Any] = {"task": registry.get("task", task), "technique": registry.get("technique", technique)}
    lines = [
        "# yaml-language-server: $schema=tunesmith.schema.json",
        f"# Starter recipe for {task} with {technique}. A commented key shows its default.",
        "# To train: tunesmith train THIS_FILE",
        "task:",
        f"  name: {task}",
        *_defaults(chosen["task"]),
        f"model: {chosen['task'].example_model}   # or a folder, org/name on the Hub, or an earlier run",
        "data:",
        "  train: train.csv   # a file or folder in any format that the task reads; format and columns are detected",
        *_defaults(Data, without={"train", *unread_data_keys(chosen["task"])}),
        "technique:",
        f"  name: {technique}",
        *_defaults(chosen["technique"]),
        "train:",
        "  seed: 0",
        *_defaults(Train, without={"seed"}),
        f"output: runs/{task}-{technique}",
    ]
    return "\n".join(lines) + "\n"


def _defaults(section: type[Keys], without: Collection[str] = ()) -> list[str]:
    lines, defaults = [], section.model_validate({})  # a default may depend on others
    for name, field in section.model_fields.items():
        if name not in without:
            value = json.dumps(getattr(defaults, name), ensure_ascii=False)
            comment = f"   # {field.description}" if field.description else ""
            lines.append(f"  # {name}: {value}{comment}")
    return lines


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe for editors, with the keys of each task and technique."""
    tree = Recipe.model_json_schema()
    definitions = tree.setdefault("$defs", {})
    for kind in ("task", "technique"):
        options: list[dict[str, Any]] = [{"enum": registry.names(kind)}]
        for name in registry.names(kind):
            plugin = registry.get(kind, name).model_json_schema()
            definitions.update(plugin.pop("$defs", {}))
            plugin["properties"] = {"name": {"const": name}, **plugin.get("properties", {})}
            plugin["properties"] |= {"continue": {"type": "boolean"}} if kind == "technique" else {}
            plugin["required"] = ["name", *plugin.get("required", [])]
            options.append(plugin)
        tree["properties"][kind] = {"oneOf": options}
    definitions.pop("Plugin", None)
    full_form = definitions["Augmentation"]
    definitions["Augmentation"] = {"anyOf": [{"enum": full_form["properties"]["name"]["enum"]}, full_form]}
    in_stage = {key: value for key, value in tree["properties"].items() if key != "output"}
    stage = {"type": "object", "properties": in_stage, "additionalProperties": False}
    tree["properties"] |= {"stages": {"type": "array", "items": stage}, "gain": Gain.model_json_schema()}
    tree["allOf"] = [_unread_are_null(name) for name in registry.names("task")]
    tree["anyOf"] = [{"type": "object", "required": names} for names in (["task", "model"], ["stages"])]
    tree.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}


def _unread_are_null(task: str) -> dict[str, Any]:
    """The condition that a recipe of this task leaves the `data` keys that it does not read unset."""
    name = {"const": task}
    chosen = {"anyOf": [name, {"type": "object", "properties": {"name": name}, "required": ["name"]}]}
    unread = {key: {"type": "null"} for key in sorted(unread_data_keys(registry.get("task", task)))}
    return {
        "if": {"properties": {"task": chosen}, "required": ["task"]},
        "then": {"properties": {"data": {"properties": unread}}},
    }
