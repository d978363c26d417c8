"""What a recipe may hold, for who writes one: a commented starter, and a JSON schema for editors."""

from __future__ import annotations

import json
from typing import Any

from tunesmith import registry
from tunesmith.recipe import Data, Gain, Recipe, Train
from tunesmith.registry import Keys

__all__ = ["schema", "starter"]


def starter(task: str, technique: str) -> str:
    """A recipe to begin with: what must be said, and every other key with its default as a comment."""
    chosen: dict[str, Any] = {"task": registry.get("task", task), "technique": registry.get("technique", technique)}
    lines = [
        "# yaml-language-server: $schema=tunesmith.schema.json",
        f"# tunesmith train THIS_FILE     a starter for {task} by {technique}; what is commented out is the default",
        "task:",
        f"  name: {task}",
        *_defaults(chosen["task"]),
        f"model: {chosen['task'].example_model}   # or a folder, org/name on the Hub, an earlier run",
        "data:",
        "  train: train.csv   # a file or folder in any format that the task reads; format and columns are recognised",
        *_defaults(Data, without=("train",)),
        "technique:",
        f"  name: {technique}",
        *_defaults(chosen["technique"]),
        "train:",
        "  seed: 0",
        *_defaults(Train, without=("seed",)),
        f"output: runs/{task}-{technique}",
    ]
    return "\n".join(lines) + "\n"


def _defaults(section: type[Keys], without: tuple[str, ...] = ()) -> list[str]:
    lines, unsaid = [], section.model_validate({})  # a default may follow from others
    for name, field in section.model_fields.items():
        if name not in without:
            value = json.dumps(getattr(unsaid, name), ensure_ascii=False)
            remark = f"   # {field.description}" if field.description else ""
            lines.append(f"  # {name}: {value}{remark}")
    return lines


def schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors: each task and technique with its own keys."""
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
    change = definitions["Augmentation"]
    definitions["Augmentation"] = {"anyOf": [{"enum": change["properties"]["name"]["enum"]}, change]}
    of_a_stage = {key: about for key, about in tree["properties"].items() if key != "output"}
    stage = {"type": "object", "properties": of_a_stage, "additionalProperties": False}
    tree["properties"] |= {"stages": {"type": "array", "items": stage}, "gain": Gain.model_json_schema()}
    tree["anyOf"] = [{"type": "object", "required": names} for names in (["task", "model"], ["stages"])]
    tree.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}
