"""The model card of a run: the Hub's YAML head, what was done with what, scores, and lines that load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tunesmith.deploy import fingerprint as origin
from tunesmith.errors import counted
from tunesmith.metrics import MEANINGS, side_by_side
from tunesmith.models.load import auto_class
from tunesmith.recipe import Recipe, to_yaml
from tunesmith.recipe import load as load_recipe
from tunesmith.storage.files import atomic_write, read_json
from tunesmith.tasks import Task
from tunesmith.techniques import OWN_TYPE

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSeq2SeqLM": "translation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
"""What the Hub calls what a model of this class does."""

EXAMPLES = {"AutoModelForMaskedLM": "... [MASK] ..."}
"""What a model of this class is asked, where it is no text alone."""

CELL_CHARS = 400
"""Of a text that was written, as the card shows it."""

LICENSES = frozenset(
    "agpl-3.0 apache-2.0 bsd-2-clause bsd-3-clause bsl-1.0 cc-by-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-sa-4.0 cc0-1.0 "
    "gpl-2.0 gpl-3.0 isc lgpl-2.1 lgpl-3.0 mit mpl-2.0 openrail unlicense".split()
)
"""Those of the Hub's names that packages state too; the others are `other` with a name of their own."""


def write(folder: Path) -> None:
    """Write `README.md` of a finished run from its `recipe.yaml` and `run.json`."""
    recipe = load_recipe(folder / "recipe.yaml")
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    adapter = (folder / "adapter").exists()
    assert isinstance(recipe.task, Task)
    parts = [
        "---\n" + to_yaml(_head(recipe, run, adapter, adapter and _peft_loads(folder))) + "---\n",
        f"# {folder.resolve().name}\n",
        f"`{recipe.model}` adapted to {recipe.task.name} by `{run['technique']}` with tunesmith.\n",
        "## Scores\n",
        _scores(run["metrics"], recipe.task) if "merged" not in run else f"None yet: `tunesmith evaluate {folder}`.\n",
        *_samples(run.get("samples") or []),
        "## Load it\n",
        "With tunesmith:\n",
        f"```python\nimport tunesmith\n\nmodel = tunesmith.load({_quoted(folder)})\n"
        f'print(model.predict(["{EXAMPLES.get(recipe.task.auto_class, "...")}"]))\n```\n',
        _without_us(folder, auto_class(run["model"]["family"], recipe.task.auto_class), run["model"], adapter),
        "## How it was made\n",
        _merged(run["merged"]) if "merged" in run else _made(run),
        "```yaml\n" + to_yaml(recipe.dump()) + "```\n",
    ]
    atomic_write(folder / "README.md", "\n".join(parts))


def _head(recipe: Recipe, run: dict[str, Any], adapter: bool, peft: bool) -> dict[str, Any]:
    assert isinstance(recipe.task, Task)
    pipeline = PIPELINES.get(recipe.task.auto_class, recipe.task.name)
    head: dict[str, Any] = {"library_name": _library(adapter, peft), "pipeline_tag": pipeline}
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
        about = {"task": {"type": pipeline}, "dataset": {"name": name, "type": "file", "split": split}}
        head["model-index"] = [{"name": Path(recipe.output).resolve().name, "results": [about | {"metrics": results}]}]
    return head


def _library(adapter: bool, peft: bool) -> str:
    """What loads the run."""
    return "transformers" if not adapter else "peft" if peft else "tunesmith"


def _license(stated: str | None) -> dict[str, str]:
    """The base's licence as the Hub writes it; one it has no name for gets a name of the same letters."""
    if not stated:
        return {}
    name = re.sub(r"[^a-z0-9.]+", "-", stated.lower()).strip("-")
    name = "apache-2.0" if re.fullmatch(r"apache(-software)?(-licen[cs]e)?(-v?(ersion-)?2(\.0)?)?", name) else name
    name = re.sub(r"-licen[cs]e$", "", name)
    return {"license": name} if name in LICENSES | {"other"} else {"license": "other", "license_name": name}


def _hub_name(spec: str) -> str:
    return spec.removeprefix("hf:").partition("@")[0]


def _scores(metrics: dict[str, Any], task: Task) -> str:
    """A table: metric by split, beside the baseline; and the meaning of each metric."""
    columns = side_by_side(metrics)
    if "baseline" not in metrics:
        return "No rows were held out, so there is no score.\n"
    baseline = metrics["baseline"]
    names = [name for name, value in columns[-1][1].items() if isinstance(value, float)]
    known = f"{task.baseline_name} ({baseline['split']})"
    lines = [
        f"| | {' | '.join(title for title, _ in columns)} | {known} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name in names:
        cells = " | ".join(f"{scores[name]:.4f}" if name in scores else "" for _, scores in columns)
        lines.append(f"| {name} | {cells} | {baseline[name]:.4f} |" if name in baseline else f"| {name} | {cells} | |")
    lines += ["", *(f"- {name}: {MEANINGS[name]}" for name in names if name in MEANINGS)]
    return "\n".join(lines) + "\n"


def _samples(samples: list[dict[str, str]]) -> Iterator[str]:
    """What was written before and after, side by side."""
    if samples:
        yield "## Answers before and after\n"
        names = ("asked", "meant", "before", "after")
        lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += [f"| {' | '.join(_cell(sample[name]) for name in names)} |" for sample in samples]
        yield "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text in a cell of a table: cut, without what Markdown or HTML would read."""
    cut = text if len(text) <= CELL_CHARS else f"{text[: CELL_CHARS - 1]}…"
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", cut).replace("\r", "").replace("\n", "<br>")


def _without_us(folder: Path, auto: str, base: dict[str, Any], adapter: bool) -> str:
    if adapter and not _peft_loads(folder):
        return "Without it it cannot be loaded: PEFT has no such adapter for this kind of model.\n"
    how = "transformers and PEFT" if adapter else "transformers"
    return f"Without it ({how}):\n\n```python\n{_loading_lines(folder, auto, base, adapter)}```\n"


def _peft_loads(folder: Path) -> bool:
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    return not str(config["peft_type"]).startswith(OWN_TYPE)


def _loading_lines(folder: Path, auto: str, base: dict[str, Any], adapter: bool) -> str:
    """Python that loads the run without tunesmith."""
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
    kept = read_json(folder / "adapter" / origin.FILE).get("quantization") or {}
    if kept:
        imports = imports.replace("AutoTokenizer, ", "AutoTokenizer, BitsAndBytesConfig, ")
        fields = ", ".join(f"{name}={value!r}" for name, value in kept.items())
        revision += f", quantization_config=BitsAndBytesConfig({fields})"
    return (
        f"{imports}\n"
        f"base = {where}\n"
        f"config = AutoConfig.from_pretrained({_quoted(folder / 'base')})\n"
        f"model = {auto}.from_pretrained(base, config=config{revision})\n{_room_for_tokens(folder)}"
        f"model = PeftModel.from_pretrained(model, {_quoted(folder / 'adapter')})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(folder / 'base')})\n"
    )


def _room_for_tokens(folder: Path) -> str:
    """The line that gives the base rows for tokens which the run has added."""
    rows = read_json(folder / "adapter" / "adapter_config.json").get("trainable_token_indices") or {}
    size = max((max(ids) + 1 for ids in rows.values()), default=0)
    has = AutoConfig.from_pretrained(folder / "base").get_text_config().vocab_size if size else 0
    return f"model.resize_token_embeddings({size}, mean_resizing=False)\n" if size > has else ""


def _quoted(text: object) -> str:
    """As Python reads it."""
    return json.dumps(str(text), ensure_ascii=False)


def _merged(how: dict[str, Any]) -> str:
    """What a merged model is the sum of."""
    parts = "".join(f"- {weight:g} x `{run}`\n" for run, weight in zip(how["runs"], how["weights"], strict=True))
    kept = "" if how["method"] == "linear" else f", {how['density']:.0%} of its entries kept, seed {how['seed']}"
    return (
        f"Sum ({how['method']}{kept}) of what these runs have added to the base:\n\n{parts}\nThe recipe of the first:\n"
    )


def _made(run: dict[str, Any]) -> str:
    rows = ", ".join(f"{name} {count:,}" for name, count in run["data"]["rows"].items())
    hardware, base = run["hardware"], run["model"]
    stated = {"base model": base["license"], "package that it came in": base["package_license"]}
    license_ = "".join(f"- licence of the {of}: {name}\n" for of, name in stated.items() if name)
    return (
        f"- rows: {rows}\n"
        f"- {run['trainable_parameters']:,} of {run['total_parameters']:,} parameters learned, "
        f"{counted(run['steps'], 'step')}, {run['seconds']:.0f} s "
        f"on {hardware['name']} ({hardware['device']}, {hardware['precision']})\n"
        f"- seed {run['seed']}; versions: {', '.join(f'{name} {number}' for name, number in run['versions'].items())}\n"
        f"- command: `{run['command']}`\n{license_}" + "".join(f"- note: {note}\n" for note in run["data"]["notes"])
    )
