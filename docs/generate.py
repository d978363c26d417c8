"""Generate docs/recipe.md, the reference of all recipe keys, from the schema.

python docs/generate.py
"""

from __future__ import annotations

import inspect
import json
import typing
from pathlib import Path
from typing import Any

from tunesmith import registry
from tunesmith.recipe import ALIASES, Data, Gain, Recipe, Train
from tunesmith.recipe_values import Augmentation, Generation

PAGE = Path(__file__).with_name("recipe.md")
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def kind(annotation: Any) -> str:
    """Return a type in the words of a user."""
    if annotation is type(None):
        return "`null`"
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return kind(typing.get_args(annotation)[0])
    if parts := typing.get_args(annotation):
        if typing.get_origin(annotation) in (list, dict):
            return "list" if typing.get_origin(annotation) is list else "mapping"
        return " or ".join(kind(part) for part in parts)
    return {"str": "text", "int": "whole number", "float": "number", "bool": "`true`, `false`"}.get(
        getattr(annotation, "__name__", ""), "section"
    )


def values(field: Any) -> str:
    """Return the type and the bounds of a field."""
    found = [
        f"{word} {getattr(bound, name)}"
        for bound in field.metadata
        for name, word in BOUNDS.items()
        if hasattr(bound, name)
    ]
    return f"{kind(field.annotation)}; {', '.join(found)}" if found else kind(field.annotation)


def table(model: Any) -> list[str]:
    """Return the table of a section's keys."""
    lines = ["| key | values | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "" if field.is_required() else f"`{json.dumps(field.default, ensure_ascii=False)}`"
        lines.append(f"| `{name}` | {values(field)} | {default} | {field.description} |")
    return [*lines, ""]


def page() -> str:
    """Return the page."""
    lines = [
        "# Recipe reference",
        "",
        "Generated from the schema by `python docs/generate.py`.",
        "",
    ]
    lines += [
        "A recipe is a YAML file, `KEY=VALUE` words (`train.epochs=1`), or keyword arguments in Python; later sources",
        "override earlier ones. Keys of `data` and `train` are also accepted at the top level. If a default is `null`,",
        "the run derives the value, and the run folder's `recipe.yaml` has the value that was used. Relative paths",
        "start at the working directory, also in the recipe of an earlier run. `tunesmith schema` prints a JSON schema",
        "for editors.",
        "",
    ]
    lines += ["| key | |", "|---|---|"]
    lines += [f"| `{name}` | {field.description} |" for name, field in Recipe.model_fields.items()]
    lines += [
        "",
        "If `model` is a run with an adapter, the adapter is merged once into that run's `model/`, and training starts",
        "from there. `technique: {name: lora, continue: true}` continues to train the adapter instead, with the same",
        "base model, technique, task and classes. This is the only way to continue an adapter that cannot be merged",
        "(`adapter`, `prompt`, `prefix`).",
        "",
    ]
    for title, model in (("data", Data), ("data.augment: items of the list", Augmentation), ("train", Train)):
        lines += [f"## {title}", "", *table(model)]
    stages = "Each recipe in the list `stages` starts from the run before it; `gain` measures what earlier stages gain"
    lines += ["## gain", "", f"{stages} ([concepts](concepts.md#stages)).", "", *table(Gain)]
    for group in ("task", "technique"):
        for name in registry.names(typing.cast(registry.Kind, group)):
            plugin = registry.get(typing.cast(registry.Kind, group), name)
            lines += [
                f"## {group}: {name}",
                "",
                f"{inspect.getdoc(plugin)} [Card]({group}s/{name}.md).",
                "",
                *table(plugin),
            ]
    lines += ["## generate: for tasks that generate text", "", *table(Generation)]
    lines += ["## Hugging Face names", "", "| alias | key |", "|---|---|"]
    lines += [f"| `{theirs}` | `{ours}` |" for theirs, (ours, _) in ALIASES.items()]
    lines += ["| `per_device_train_batch_size` x `gradient_accumulation_steps` x processes | `train.batch_size` |"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
