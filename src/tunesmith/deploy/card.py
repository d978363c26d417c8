"""The model card of a run: YAML metadata for the Hub, scores, usage and training details."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tunesmith.deploy import fingerprint
from tunesmith.errors import counted
from tunesmith.metrics import MEANINGS, side_by_side
from tunesmith.models.load import auto_class
from tunesmith.recipe import Recipe, to_yaml
from tunesmith.storage.files import atomic_write, read_json
from tunesmith.storage.run_folder import samples_in
from tunesmith.tasks import Task
from tunesmith.techniques import OWN_TYPE

CELL_CHARS = 400
"""Maximum characters of a text in a table."""

LICENSES = frozenset(
    "agpl-3.0 apache-2.0 bsd-2-clause bsd-3-clause bsl-1.0 cc-by-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-sa-4.0 cc0-1.0 "
    "gpl-2.0 gpl-3.0 isc lgpl-2.1 lgpl-3.0 mit mpl-2.0 openrail unlicense".split()
)
"""Licenses that both the Hub and package metadata name; any other is `other` with its own `license_name`."""


def write(folder: Path, recipe: Recipe) -> None:
    """Write `README.md` of a finished run from its recipe and `run.json`."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    adapter = (folder / "adapter").exists()
    parts = [
        "---\n" + to_yaml(_head(recipe, run, adapter, adapter and _peft_loads(folder))) + "---\n",
        f"# {folder.resolve().name}\n",
        f"`{recipe.model}` fine-tuned for {recipe.task.name} with `{run['technique']}`, by tunesmith.\n",
        "## Scores\n",
        _scores(run["metrics"], recipe.task)
        if "merged" not in run
        else f"Not evaluated yet; run `tunesmith evaluate {folder}`.\n",
        *_samples(samples_in(run)),
        "## Usage\n",
        "With tunesmith:\n",
        f"```python\nimport tunesmith\n\nmodel = tunesmith.load({_quoted(folder)})\n"
        f'print(model.predict(["{recipe.task.example_input}"]))\n```\n',
        _without_tunesmith(folder, auto_class(run["model"]["family"], recipe.task.auto_class), run["model"], adapter),
        "## Training details\n",
        _merged(run["merged"]) if "merged" in run else _details(run),
        "```yaml\n" + to_yaml(recipe.dump()) + "```\n",
    ]
    atomic_write(folder / "README.md", "\n".join(parts))


def _head(recipe: Recipe, run: dict[str, Any], adapter: bool, peft: bool) -> dict[str, Any]:
    head: dict[str, Any] = {"library_name": _library(adapter, peft), "pipeline_tag": recipe.task.name}
    base = run["model"]
    if base["kind"] == "hub":
        head |= {"base_model": _hub_name(base["spec"]), "base_model_relation": "adapter" if adapter else "finetune"}
    head |= _license(base["license"] or base["package_license"])
    head["tags"] = ["tunesmith", run["technique"]]
    split = next((name for name in ("test", "validation") if name in run["metrics"]), None)
    if split is not None:
        scores = run["metrics"][split].items()
        results = [{"type": name, "value": round(value, 4)} for name, value in scores if isinstance(value, float)]
        file = getattr(recipe.data, split)
        name = Path(file if isinstance(file, str) else recipe.data.train or "").name
        about = {"task": {"type": recipe.task.name}, "dataset": {"name": name, "type": "file", "split": split}}
        head["model-index"] = [{"name": Path(recipe.output).resolve().name, "results": [about | {"metrics": results}]}]
    return head


def _library(adapter: bool, peft: bool) -> str:
    """Return the library that loads the run."""
    return "transformers" if not adapter else "peft" if peft else "tunesmith"


def _license(stated: str | None) -> dict[str, str]:
    """Return the base's license as Hub metadata; a license without a Hub name becomes `other` with a `license_name`."""
    if not stated:
        return {}
    name = re.sub(r"[^a-z0-9.]+", "-", stated.lower()).strip("-")
    name = "apache-2.0" if re.fullmatch(r"apache(-software)?(-licen[cs]e)?(-v?(ersion-)?2(\.0)?)?", name) else name
    name = re.sub(r"-licen[cs]e$", "", name)
    return {"license": name} if name in LICENSES | {"other"} else {"license": "other", "license_name": name}


def _hub_name(spec: str) -> str:
    return spec.removeprefix("hf:").partition("@")[0]


def _scores(metrics: dict[str, Any], task: Task) -> str:
    """Return a table of metrics by split with the baseline, and the definition of each metric."""
    columns = side_by_side(metrics)
    if "baseline" not in metrics:
        return "No rows were held out, so there are no scores.\n"
    baseline = metrics["baseline"]
    names = [name for name, value in columns[-1][1].items() if isinstance(value, float)]
    baseline_title = f"{task.baseline_name} ({baseline['split']})"
    lines = [
        f"| | {' | '.join(title for title, _ in columns)} | {baseline_title} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name in names:
        cells = " | ".join(f"{scores[name]:.4f}" if name in scores else "" for _, scores in columns)
        lines.append(f"| {name} | {cells} | {baseline[name]:.4f} |" if name in baseline else f"| {name} | {cells} | |")
    lines += ["", *(f"- {name}: {MEANINGS[name]}" for name in names if name in MEANINGS)]
    return "\n".join(lines) + "\n"


def _samples(samples: list[dict[str, str]]) -> Iterator[str]:
    """Yield a table of generated answers before and after training."""
    if samples:
        yield "## Answers before and after\n"
        names = ("prompt", "reference", "before", "after")
        lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += [f"| {' | '.join(_cell(sample[name]) for name in names)} |" for sample in samples]
        yield "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Return a text for a table cell: truncated, with Markdown and HTML escaped."""
    cut = text if len(text) <= CELL_CHARS else f"{text[: CELL_CHARS - 1]}…"
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", cut).replace("\r", "").replace("\n", "<br>")


def _without_tunesmith(folder: Path, auto: str, base: dict[str, Any], adapter: bool) -> str:
    if adapter and not _peft_loads(folder):
        return "It cannot be loaded without tunesmith: PEFT has no such adapter for this model.\n"
    how = "transformers and PEFT" if adapter else "transformers"
    return f"Without tunesmith ({how}):\n\n```python\n{_loading_lines(folder, auto, base, adapter)}```\n"


def _peft_loads(folder: Path) -> bool:
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    return not str(config["peft_type"]).startswith(OWN_TYPE)


def _loading_lines(folder: Path, auto: str, base: dict[str, Any], adapter: bool) -> str:
    """Return Python code that loads the run without tunesmith."""
    if not adapter:
        return (
            f"from transformers import AutoTokenizer, {auto}\n\n"
            f"model = {auto}.from_pretrained({_quoted(folder / 'model')})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({_quoted(folder / 'model')})\n"
        )
    imports = f"from peft import PeftModel\nfrom transformers import AutoConfig, AutoTokenizer, {auto}\n"
    where, revision = _quoted(Path(base["spec"]).expanduser()), ""
    if base["kind"] == "hub":
        where, revision = _quoted(_hub_name(base["spec"])), f", revision={_quoted(base['revision'])}"
    elif base["kind"] == "run":
        where = _quoted(Path(base["spec"]).expanduser() / "model")
    elif base["kind"] in ("pypi", "gguf"):
        imports = f"import subprocess\nimport sys\n\n{imports}"
        words = ", ".join(_quoted(word) for word in ("-m", "tunesmith", "models", "path", base["spec"]))
        where = f"subprocess.check_output([sys.executable, {words}], text=True).strip()"
    quantization = read_json(folder / "adapter" / fingerprint.FILE).get("quantization") or {}
    if quantization:
        imports = imports.replace("AutoTokenizer, ", "AutoTokenizer, BitsAndBytesConfig, ")
        fields = ", ".join(f"{name}={value!r}" for name, value in quantization.items())
        revision += f", quantization_config=BitsAndBytesConfig({fields})"
    return (
        f"{imports}\n"
        f"base = {where}\n"
        f"config = AutoConfig.from_pretrained({_quoted(folder / 'base')})\n"
        f"model = {auto}.from_pretrained(base, config=config{revision})\n{_resize_embeddings(folder)}"
        f"model = PeftModel.from_pretrained(model, {_quoted(folder / 'adapter')})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(folder / 'base')})\n"
    )


def _resize_embeddings(folder: Path) -> str:
    """Return the line that adds embedding rows for the run's added tokens."""
    rows = read_json(folder / "adapter" / "adapter_config.json").get("trainable_token_indices") or {}
    size = max((max(ids) + 1 for ids in rows.values()), default=0)
    has = AutoConfig.from_pretrained(folder / "base").get_text_config().vocab_size if size else 0
    return f"model.resize_token_embeddings({size}, mean_resizing=False)\n" if size > has else ""


def _quoted(text: object) -> str:
    """Return a Python string literal."""
    return json.dumps(str(text), ensure_ascii=False)


def _merged(how: dict[str, Any]) -> str:
    """Return the training details of a merged model."""
    parts = "".join(f"- {weight:g} x `{run}`\n" for run, weight in zip(how["runs"], how["weights"], strict=True))
    kept = "" if how["method"] == "linear" else f", {how['density']:.0%} of entries kept, seed {how['seed']}"
    return (
        f"Merged ({how['method']}{kept}): the base plus a weighted sum of the changes of these runs:\n\n{parts}\n"
        "Recipe of the first run:\n"
    )


def _details(run: dict[str, Any]) -> str:
    rows = ", ".join(f"{name} {count:,}" for name, count in run["data"]["rows"].items())
    hardware, base = run["hardware"], run["model"]
    stated = {"the base model": base["license"], "its package": base["package_license"]}
    license_ = "".join(f"- license of {of}: {name}\n" for of, name in stated.items() if name)
    return (
        f"- rows: {rows}\n"
        f"- trainable parameters: {run['trainable_parameters']:,} of {run['total_parameters']:,}\n"
        f"- training: {counted(run['steps'], 'step')}, {run['seconds']:.0f} s "
        f"on {hardware['name']} ({hardware['device']}, {hardware['precision']})\n"
        f"- seed {run['seed']}; versions: {', '.join(f'{name} {number}' for name, number in run['versions'].items())}\n"
        f"- command: `{run['command']}`\n{license_}" + "".join(f"- note: {note}\n" for note in run["data"]["notes"])
    )
