"""Recipes from files, mappings and the command line: precedence, aliases, stages, schema, and refusals by line."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from messages import has_parts
from ruamel.yaml import YAML

from tunesmith import registry
from tunesmith.errors import CheckpointError, DataError, RecipeError, UserError
from tunesmith.recipe import Recipe, load, load_stages, read, to_yaml
from tunesmith.recipe.aliases import ALIASES, TECHNIQUE_SYNONYMS
from tunesmith.recipe.starter import schema, starter

HEAD = "task: text-classification\nmodel: tiny\n"


@pytest.fixture
def recipe_from(tmp_path: Path) -> Any:
    """`recipe_from(text, *overrides)`: load the recipe from a file with this text."""

    def of(text: str, *overrides: str) -> Recipe:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return load(tmp_path / "recipe.yaml", overrides)

    return of


def _refusal(recipe_from: Any, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe_from(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "where"),
    (
        ("lr: 1e-3\ntrain:\n  learning_rate: 2e-3\n", "recipe.yaml:5: train.learning_rate"),
        ("train:\n  learning_rate: 2e-3\nlr: 1e-3\n", "recipe.yaml:5: lr"),
        ("batch_size: 8\nper_device_train_batch_size: 4\n", "recipe.yaml:4: per_device_train_batch_size"),
        ("per_device_train_batch_size: 4\nbatch_size: 8\n", "recipe.yaml:3: per_device_train_batch_size"),
        ("bf16: true\nfp16: true\n", "recipe.yaml:4: fp16"),
        ("output_dir: a\noutput: b\n", "recipe.yaml:4: output"),
    ),
)
def test_duplicate_keys_under_an_alias(text: str, where: str, recipe_from: Any) -> None:
    assert f"{where}: " in _refusal(recipe_from, HEAD + text)


@pytest.mark.parametrize(
    ("text", "said"),
    (
        ("train: 5\n", "3: train: must be a mapping .*'5'; "),
        ("data: a.csv\n", "3: data: must be a mapping .*'a.csv'; "),
        ("technique: {name: lroa}\n", "3: technique: .*'lroa'; did you mean 'lora'"),
        ("\nouptut: x\n", "4: ouptut: unknown key; did you mean 'output'"),
        (
            "gradient_accumulation_steps: 4\n",
            "3: gradient_accumulation_steps: .*per_device_train_batch_size; ",
        ),
        (
            "per_device_train_batch_size: 0\n",
            "3: per_device_train_batch_size: .*at least 1.*'0'",
        ),
    ),
)
def test_an_invalid_recipe_is_refused_with_its_line(text: str, said: str, recipe_from: Any, tmp_path: Path) -> None:
    assert re.match(f"{tmp_path}/recipe.yaml:{said}", _refusal(recipe_from, HEAD + text))


def test_yaml_tags_create_no_objects(recipe_from: Any) -> None:
    assert "recipe.yaml:3: output: must be a string" in _refusal(
        recipe_from, f"{HEAD}output: !!python/object/apply:os.getcwd []\n"
    )


def test_a_recursive_list_is_refused(recipe_from: Any) -> None:
    assert "recipe.yaml:3: x: " in _refusal(recipe_from, f"{HEAD}x: &a [*a]\n")


@pytest.mark.parametrize(
    ("missing", "said"), (("task", "task: missing; known: fill-mask, text-class"), ("model", "model: missing; "))
)
def test_required_keys(missing: str, said: str, recipe_from: Any) -> None:
    kept = "".join(line for line in HEAD.splitlines(keepends=True) if not line.startswith(missing))
    assert _refusal(recipe_from, kept).startswith(said)


@pytest.mark.parametrize("word", ("lr", "=3", "--lr=3=", "lr=[1", "train.sede=1", "nonsense=1"))
def test_errors_on_the_command_line(word: str, recipe_from: Any) -> None:
    assert _refusal(recipe_from, HEAD, word).startswith("command line: ")


ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
VALUES: dict[str, Any] = {
    "train.epochs": 2.0,
    "train.learning_rate": 3e-4,
    "train.schedule": "cosine",
    "train.optimizer": "sgd",
    "train.evaluate_every": 7,
    "train.save_every": 7,
    "train.keep_checkpoints": 5,
    "train.metric": "ece",
    "train.label_smoothing": 0.1,
    "train.early_stopping_patience": 4,
    "model": "org/name",
    "output": "runs/there",
    "data.train": "a.csv",
    "data.validation": "b.csv",
    "data.test": "c.csv",
    "data.max_length": 128,
    "data.limit": 100,
    "technique.r": 4,
    "technique.alpha": 12.0,
    "technique.dropout": 0.1,
    "technique.target_modules": ["key"],
    "technique.rslora": True,
    "technique.dora": True,
    "technique.init": "pissa",
    "technique.lora_plus_ratio": 8.0,
}
"""Our key -> a value that is not its default."""
SPECIAL = {"bf16": (True, "bf16"), "fp16": (True, "fp16")}


def _value(recipe: Recipe, key: str) -> Any:
    found: Any = recipe
    for part in key.split("."):
        found = getattr(found, part)
    return found


def test_the_documented_aliases_are_complete() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").partition("## Aliases")[2]
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|$", page, re.M)
    assert dict(rows) == {theirs: ours for theirs, (ours, _) in ALIASES.items()}


@pytest.mark.parametrize("theirs", ALIASES)
def test_an_alias_sets_our_key(theirs: str, recipe_from: Any) -> None:
    ours = ALIASES[theirs][0]
    given, meant = SPECIAL.get(theirs) or (VALUES[ours], VALUES[ours])
    written = json.dumps(given)
    plain = {"task": "text-classification"} | ({} if ours == "model" else {"model": "tiny"})
    head = to_yaml(plain)
    forms = [
        recipe_from(f"{head}{theirs}: {written}\n"),
        recipe_from(head, f"{theirs}={written}"),
        load(None, (), plain | {theirs: given}),
    ]
    if section := ours.rpartition(".")[0]:
        forms += [
            recipe_from(f"{head}{section}: {{{theirs}: {written}}}\n"),
            recipe_from(head, f"{section}.{theirs}={written}"),
        ]
    assert [_value(form, ours) for form in forms] == [meant] * len(forms)


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    (
        ("optim: adamw_torch_fused\n", "train.optimizer", "adamw"),
        ("lr_scheduler_type: constant_with_warmup\n", "train.schedule", "constant"),
        ("eval_strategy: steps\neval_steps: 50\n", "train.evaluate_every", 50),
        ("train: {save_strategy: steps, save_steps: 50}\n", "train.save_every", 50),
        ("eval_strategy: epoch\n", "train.evaluate_every", "epoch"),
        ("evaluation_strategy: steps\neval_steps: 50\n", "train.evaluate_every", 50),
        ("eval_strategy: 'no'\n", "train.evaluate_every", 10**9),
        ("save_strategy: best\n", "train.save_every", "epoch"),
        ("init_lora_weights: pissa\n", "technique.init", "pissa"),
        ("init_lora_weights: true\n", "technique.init", "default"),
        ("bf16: false\nfp16: false\n", "train.precision", "auto"),
        ("fp16: false\nbf16: true\n", "train.precision", "bf16"),
        ("lora_target: all\n", "technique.target_modules", "all-linear"),
        ("lora_target: q_proj,v_proj\n", "technique.target_modules", ["q_proj", "v_proj"]),
        ("lora_alpha: 32\nlora_r: 16\n", "technique.alpha", 32.0),
        ("per_device_train_batch_size: 4\ngradient_accumulation_steps: 8\n", "train.batch_size", 32),
        ("train: {per_device_train_batch_size: 4}\n", "train.batch_size", 4),
    ),
)
def test_alias_values_are_converted(text: str, key: str, meant: Any, recipe_from: Any) -> None:
    assert _value(recipe_from(HEAD + text), key) == meant


def test_a_strategy_without_its_interval_is_refused(recipe_from: Any) -> None:
    said = _refusal(recipe_from, f"{HEAD}eval_strategy: steps\n")
    assert said.endswith(":3: eval_strategy: must be an integer or 'epoch', not 'steps'")


def test_per_device_batch_size_is_multiplied_by_processes(recipe_from: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert recipe_from(f"{HEAD}per_device_train_batch_size: 8\n").train.batch_size == 32
    assert recipe_from(f"{HEAD}batch_size: 8\n").train.batch_size == 8


def test_precedence(recipe_from: Any) -> None:
    text = f"{HEAD}train: {{epochs: 1, seed: 5}}\ntechnique: {{name: lora, r: 4, dora: true}}\n"
    found = recipe_from(text, "lr=1e-3", "train.epochs=2", "technique.r=16", "train.epochs=3")
    assert (found.train.epochs, found.train.seed, found.train.learning_rate) == (3.0, 5, 1e-3)
    assert (found.technique.r, found.technique.dora, found.train.batch_size) == (16, True, 16)


@pytest.mark.parametrize("word", ("technique=full", "technique.name=full", "technique={name: full}"))
def test_another_technique_drops_the_keys_of_the_first(word: str, recipe_from: Any) -> None:
    text = f"{HEAD}technique: {{name: lora, r: 4}}\n"
    assert recipe_from(text, word).dump()["technique"] == {"name": "full", "layer_lr_decay": 1.0}


@pytest.mark.parametrize("words", list(itertools.permutations(("lora_r=4", "technique={0}", "lora_dropout=0.1"))))
def test_a_key_of_another_technique_is_refused_in_any_order(words: tuple[str, ...], recipe_from: Any) -> None:
    found = recipe_from(HEAD, *(word.format("lora") for word in words)).technique
    assert (found.r, found.dropout) == (4, 0.1)
    said = _refusal(recipe_from, HEAD, *(word.format("full") for word in words))
    assert "command line: lora_r: unknown key; " in said and "technique=lora" in said


@pytest.mark.parametrize("name", TECHNIQUE_SYNONYMS)
def test_synonyms_of_techniques_are_suggested(name: str, recipe_from: Any) -> None:
    said = _refusal(recipe_from, HEAD, f"technique={name}")
    assert has_parts(said, "command line: technique: ", f"'{name}'; ")
    assert said.endswith(f"technique={shlex.quote(TECHNIQUE_SYNONYMS[name])}")
    assert recipe_from(HEAD, f"technique={TECHNIQUE_SYNONYMS[name]}").technique.name in TECHNIQUE_SYNONYMS[name]


def test_batch_size_factors_on_the_command_line(recipe_from: Any) -> None:
    words = ("gradient_accumulation_steps=2", "per_device_train_batch_size=4")
    assert recipe_from(HEAD, *words).train.batch_size == 8 == recipe_from(HEAD, *words[::-1]).train.batch_size


def test_null_on_the_command_line_unsets_a_key(recipe_from: Any) -> None:
    assert recipe_from(f"{HEAD}train: {{max_steps: 5}}\n", "max_steps=null", "epochs=2").train.max_steps is None


def test_the_later_of_epochs_and_max_steps_takes_precedence(recipe_from: Any) -> None:
    assert recipe_from(f"{HEAD}train: {{max_steps: 5}}\n", "epochs=2").train.max_steps is None
    assert recipe_from(f"{HEAD}train: {{epochs: 5}}\n", "max_steps=2").train.epochs is None
    assert "epochs and max_steps" in _refusal(recipe_from, f"{HEAD}train: {{epochs: 5, max_steps: 2}}\n")


@pytest.mark.parametrize("words", ((), ("technique=lora",), ("technique={name: freeze, last_n_blocks: 1}",)))
def test_a_dumped_recipe_round_trips(words: tuple[str, ...], recipe_from: Any) -> None:
    data = "{train: '1:30', columns: {text: 'no'}, test: b.csv}"
    text = f"{HEAD}train: {{learning_rate: 2e-5, seed: 7}}\ndata: {data}\n"
    first = recipe_from(text, "output='2024-01-02'", *words)
    assert recipe_from(to_yaml(first.dump())) == first


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_schema_accepts_our_recipes(path: Path) -> None:
    found = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    staged = load_stages(path)
    assert _fits(found, schema())
    assert all(_fits(one.dump(), schema()) for one in (staged.recipes if staged else [load(path)]))


@pytest.mark.parametrize("name", registry.names("technique"))
def test_the_schema_accepts_a_starter_with_all_defaults(name: str, recipe_from: Any) -> None:
    text = starter("text-classification", name)
    spelled_out = re.sub(r"^  # (\w+: )", r"  \1", text, flags=re.M)
    assert spelled_out.count("\n  ") > text.count("\n  ") - text.count("\n  # ") > 0
    assert recipe_from(spelled_out) == recipe_from(text) and _fits(YAML(typ="safe").load(spelled_out), schema())


@pytest.mark.parametrize(
    "change",
    (
        {"colour": 1},
        {"train": {"colour": 1}},
        {"data": {"colour": 1}},
        {"task": {"name": "text-classification", "colour": 1}},
        {"technique": {"name": "lora", "layer_lr_decay": 0.5}},
        {"technique": "lroa"},
        {"technique": {"r": 4}},
        {"train": {"seed": -1}},
        {"train": {"save_every": 0}},
        {"train": {"schedule": "linaer"}},
        {"train": {"learning_rate": "1e-4"}},
        {"train": {"batch_size": True}},
        {"model": None},
    ),
    ids=str,
)
def test_the_schema_refuses_invalid_recipes(change: dict[str, Any]) -> None:
    sound = {"task": "text-classification", "model": "tiny"}
    assert _fits(sound, schema()) and not _fits(sound | change, schema())


@pytest.fixture
def reads_max_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task fill-mask reads no other key of its own in `data`."""
    monkeypatch.setattr(registry.get("task", "fill-mask"), "data_keys", frozenset({"max_length"}), raising=False)


def test_a_data_key_that_the_task_does_not_read_is_refused(reads_max_length: None, recipe_from: Any) -> None:
    head = "task: fill-mask\nmodel: tiny\n"
    said = _refusal(recipe_from, f"{head}data:\n  max_length: 16\n  class_weights: balanced\n")
    assert ".yaml:5: data.class_weights: fill-mask " in said and said.count("\n") == 0
    assert ".yaml:3: data.class_weights: fill-mask " in _refusal(recipe_from, f"{head}class_weights: {{a: 2.0}}\n")
    assert _refusal(recipe_from, head, "data.augment=[typos]").startswith("command line: data.augment: fill-mask ")
    common = "{train: a.txt, validation: 0.2, test: 0.1, columns: {text: 0}, limit: 4, on_bad_row: skip, group: id}"
    text = f"{head}data: {common}\nclass_weights: null\nmax_seq_length: 16\n"
    recipe = recipe_from(text)
    assert recipe.data.max_length == 16 and recipe_from(to_yaml(recipe.dump())) == recipe


def test_schema_and_starter_respect_data_keys(reads_max_length: None) -> None:
    text = starter("fill-mask", "lora")
    assert "# max_length: " in text and "class_weights" not in text and "augment" not in text
    rules = {rule["if"]["properties"]["task"]["anyOf"][0]["const"]: rule["then"] for rule in schema()["allOf"]}
    assert rules["fill-mask"]["properties"]["data"]["properties"] == {
        "augment": {"type": "null"},
        "class_weights": {"type": "null"},
    }


def test_a_source_reads_its_file_once(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("model: x\nstages:\n  - task: fill-mask\n  - {task: text-classification, data: {train: a.csv}}\n")
    source = read(path, ["stages.2.train.seed=3"])
    path.unlink()
    staged = load_stages(source)
    assert staged is not None and [one.train.seed for one in staged.recipes] == [0, 3]
    assert source.paths() == ([Path("a.csv")], None) and staged.output == "runs/two"
    error = RecipeError("data.train: no such file")
    error.stage = 2
    assert str(source.locate(error)).startswith(f"{path}:4: stages.2.data.train: ")
    assert str(read(None, ["lr=1"]).locate(error)) == str(error), "a resumed recipe is not among the layers"


def test_layers_of_a_source(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{HEAD}train: {{seed: 1, epochs: 2}}\n", encoding="utf-8")
    source = read(None, ["train.seed=2"]).on_file(tmp_path / "recipe.yaml")
    assert (load(source).train.seed, load(source, ["seed=3"]).train.seed) == (2, 3)
    assert load(source, ["seed=3"], {"train": {"epochs": 4}}).train.epochs == 4


def test_the_schema_requires_task_and_model() -> None:
    assert not _fits({"task": "text-classification"}, schema()) and not _fits({"model": "tiny"}, schema())


TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


def _fits(value: Any, wanted: dict[str, Any], root: dict[str, Any] | None = None) -> bool:
    """Return whether a value is valid by a JSON schema, for the keywords that ours use."""
    root = root or wanted
    if "$ref" in wanted:
        return _fits(value, root["$defs"][wanted["$ref"].removeprefix("#/$defs/")], root)
    for word, enough in (("anyOf", any), ("oneOf", lambda fits: sum(fits) == 1)):
        if word in wanted and not enough([_fits(value, option, root) for option in wanted[word]]):  # type: ignore[operator]
            return False
    if value not in wanted.get("enum", [value]) or value != wanted.get("const", value):
        return False
    kind = wanted.get("type")
    if kind is not None and (value is not None if kind == "null" else not _is_a(value, kind)):
        return False
    low, high = wanted.get("minimum", -1e99), wanted.get("maximum", 1e99)
    above, below = wanted.get("exclusiveMinimum", -1e99), wanted.get("exclusiveMaximum", 1e99)
    if kind in ("integer", "number") and not (low <= value <= high and above < value < below):
        return False
    if isinstance(value, list):
        items = wanted.get("items", {})
        return len(value) >= wanted.get("minItems", 0) and all(_fits(one, items, root) for one in value)
    if not isinstance(value, dict) or kind != "object":
        return True
    known, other = wanted.get("properties", {}), wanted.get("additionalProperties", {})
    inside = all(
        _fits(one, known.get(key, other if isinstance(other, dict) else {}), root) for key, one in value.items()
    )
    return inside and (other is not False or set(value) <= set(known)) and set(wanted.get("required", ())) <= set(value)


def _is_a(value: Any, kind: str) -> bool:
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


@pytest.mark.parametrize(
    ("error", "said"),
    (
        (RecipeError("train.precision: no", hint="go"), "{file}:4: train.precision: no; go"),
        (RecipeError("is none", where="technique.r", hint="go"), "{file}:6: technique.lora_r: is none; go"),
        (RecipeError("cannot", where="technique"), "{file}:6: technique: cannot"),
        (RecipeError("model: not there", where="tiny"), "{file}:2: model: tiny: not there"),
        (DataError("data.test: too few"), "command line: data.test: too few"),
        (DataError("no train file", where="train"), "train: no train file"),
        (CheckpointError("train: nothing is saved: it is late"), "{file}:4: train: nothing is saved: it is late"),
        (RecipeError("task: missing"), "{file}:1: task: missing"),
        (RecipeError("odd: what is not a key"), "odd: what is not a key"),
    ),
    ids=str,
)
def test_a_later_error_names_the_place_of_its_key(error: UserError, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{HEAD}train:\n  precision: fp16\ntechnique:\n  lora_r: 4\n")
    found = read(path, ["data.test=0.1"]).locate(error)
    assert str(found) == said.format(file=path) and type(found) is type(error)
