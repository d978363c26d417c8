"""A recipe says what it means in YAML 1.2, or is refused with the line, the value and the way out."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tunesmith import registry
from tunesmith.errors import CheckpointError, DataError, RecipeError, UserError
from tunesmith.recipe import ALIASES, Recipe, load, load_stages, located, to_yaml
from tunesmith.recipe.aliases import KIN
from tunesmith.recipe.starter import schema, starter

HEAD = "task: text-classification\nmodel: tiny\n"


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """`read(text, *overrides)`: a recipe of that text."""

    def of(text: str, *overrides: str) -> Recipe:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return load(tmp_path / "recipe.yaml", overrides)

    return of


def _refusal(read: Any, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
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
def test_the_same_under_two_names(text: str, where: str, read: Any) -> None:
    assert f"{where}: given twice under two names; keep one" in _refusal(read, HEAD + text)


@pytest.mark.parametrize(
    ("text", "said"),
    (
        ("train: 5\n", "3: train: must be a section of keys, not '5'; e.g. train: {epochs: 3}"),
        ("data: a.csv\n", "3: data: must be a section of keys, not 'a.csv'; e.g. data: {train: reviews.csv}"),
        ("technique: {name: lroa}\n", "3: technique: no technique is called 'lroa'; did you mean 'lora'?"),
        ("\nouptut: x\n", "4: ouptut: unknown key; did you mean 'output'?"),
        (
            "gradient_accumulation_steps: 4\n",
            "3: gradient_accumulation_steps: says nothing by itself; train.batch_size",
        ),
        (
            "per_device_train_batch_size: 0\n",
            "3: per_device_train_batch_size: must be a whole number of at least 1, not '0'",
        ),
    ),
)
def test_what_no_recipe_can_be_made_of_is_refused_by_its_line(text: str, said: str, read: Any, tmp_path: Path) -> None:
    assert _refusal(read, HEAD + text).startswith(f"{tmp_path}/recipe.yaml:{said}")


def test_tags_make_no_objects(read: Any) -> None:
    assert "recipe.yaml:3: output: must be a text" in _refusal(
        read, f"{HEAD}output: !!python/object/apply:os.getcwd []\n"
    )


def test_a_list_that_holds_itself_is_no_value(read: Any) -> None:
    assert "recipe.yaml:3: x: " in _refusal(read, f"{HEAD}x: &a [*a]\n")


@pytest.mark.parametrize(
    ("missing", "said"), (("task", "task: missing; known: fill-mask, text-class"), ("model", "model: missing; "))
)
def test_what_must_be_said(missing: str, said: str, read: Any) -> None:
    kept = "".join(line for line in HEAD.splitlines(keepends=True) if not line.startswith(missing))
    assert _refusal(read, kept).startswith(said)


@pytest.mark.parametrize("word", ("lr", "=3", "--lr=3=", "lr=[1", "train.sede=1", "nonsense=1"))
def test_mistakes_on_the_command_line(word: str, read: Any) -> None:
    assert _refusal(read, HEAD, word).startswith("command line: ")


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


def _value(read: Recipe, key: str) -> Any:
    found: Any = read
    for part in key.split("."):
        found = getattr(found, part)
    return found


def test_the_aliases_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").partition("## Names of others")[2]
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|$", page, re.M)
    assert dict(rows) == {theirs: ours for theirs, (ours, _) in ALIASES.items()}


@pytest.mark.parametrize("theirs", ALIASES)
def test_a_name_of_others_is_ours(theirs: str, read: Any) -> None:
    ours = ALIASES[theirs][0]
    given, meant = SPECIAL.get(theirs) or (VALUES[ours], VALUES[ours])
    written = json.dumps(given)
    plain = {"task": "text-classification"} | ({} if ours == "model" else {"model": "tiny"})
    head = to_yaml(plain)
    forms = [
        read(f"{head}{theirs}: {written}\n"),
        read(head, f"{theirs}={written}"),
        load(None, (), plain | {theirs: given}),
    ]
    if section := ours.rpartition(".")[0]:
        forms += [read(f"{head}{section}: {{{theirs}: {written}}}\n"), read(head, f"{section}.{theirs}={written}")]
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
def test_what_others_mean_by_a_value(text: str, key: str, meant: Any, read: Any) -> None:
    assert _value(read(HEAD + text), key) == meant


def test_a_strategy_without_its_steps_is_refused(read: Any) -> None:
    said = _refusal(read, f"{HEAD}eval_strategy: steps\n")
    assert said.endswith(":3: eval_strategy: must be a whole number or 'epoch', not 'steps'")


def test_a_size_per_device_counts_the_processes(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert read(f"{HEAD}per_device_train_batch_size: 8\n").train.batch_size == 32
    assert read(f"{HEAD}batch_size: 8\n").train.batch_size == 8


def test_the_command_line_beats_the_file_and_the_file_the_defaults(read: Any) -> None:
    text = f"{HEAD}train: {{epochs: 1, seed: 5}}\ntechnique: {{name: lora, r: 4, dora: true}}\n"
    found = read(text, "lr=1e-3", "train.epochs=2", "technique.r=16", "train.epochs=3")
    assert (found.train.epochs, found.train.seed, found.train.learning_rate) == (3.0, 5, 1e-3)
    assert (found.technique.r, found.technique.dora, found.train.batch_size) == (16, True, 16)


@pytest.mark.parametrize("word", ("technique=full", "technique.name=full", "technique={name: full}"))
def test_another_technique_leaves_no_key_of_the_first_behind(word: str, read: Any) -> None:
    text = f"{HEAD}technique: {{name: lora, r: 4}}\n"
    assert read(text, word).dump()["technique"] == {"name": "full", "layer_lr_decay": 1.0}


@pytest.mark.parametrize("words", list(itertools.permutations(("lora_r=4", "technique={0}", "lora_dropout=0.1"))))
def test_a_key_of_another_technique_is_refused_in_any_order(words: tuple[str, ...], read: Any) -> None:
    found = read(HEAD, *(word.format("lora") for word in words)).technique
    assert (found.r, found.dropout) == (4, 0.1)
    said = _refusal(read, HEAD, *(word.format("full") for word in words))
    assert "command line: lora_r: unknown key; it is one of lora, not of full: technique=lora, or leave it out" in said


@pytest.mark.parametrize("name", KIN)
def test_what_a_technique_is_called_elsewhere_is_known(name: str, read: Any) -> None:
    said = _refusal(read, HEAD, f"technique={name}")
    assert said == f"command line: technique: no technique is called '{name}'; technique={shlex.quote(KIN[name])}"
    assert read(HEAD, f"technique={KIN[name]}").technique.name in KIN[name]


def test_a_size_per_device_may_be_two_words(read: Any) -> None:
    words = ("gradient_accumulation_steps=2", "per_device_train_batch_size=4")
    assert read(HEAD, *words).train.batch_size == 8 == read(HEAD, *words[::-1]).train.batch_size


def test_null_on_the_command_line_takes_a_key_back(read: Any) -> None:
    assert read(f"{HEAD}train: {{max_steps: 5}}\n", "max_steps=null", "epochs=2").train.max_steps is None


def test_how_long_is_said_last_holds(read: Any) -> None:
    assert read(f"{HEAD}train: {{max_steps: 5}}\n", "epochs=2").train.max_steps is None
    assert read(f"{HEAD}train: {{epochs: 5}}\n", "max_steps=2").train.epochs is None
    assert "both say how long" in _refusal(read, f"{HEAD}train: {{epochs: 5, max_steps: 2}}\n")


@pytest.mark.parametrize("words", ((), ("technique=lora",), ("technique={name: freeze, last_n_blocks: 1}",)))
def test_what_is_written_is_read_back(words: tuple[str, ...], read: Any) -> None:
    data = "{train: '1:30', columns: {text: 'no'}, test: b.csv}"
    text = f"{HEAD}train: {{learning_rate: 2e-5, seed: 7}}\ndata: {data}\n"
    first = read(text, "output='2024-01-02'", *words)
    assert read(to_yaml(first.dump())) == first


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_schema_takes_the_recipes_of_the_house(path: Path) -> None:
    found = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    staged = load_stages(path)
    assert _fits(found, schema())
    assert all(_fits(one.dump(), schema()) for one in (staged.recipes if staged else [load(path)]))


@pytest.mark.parametrize("name", registry.names("technique"))
def test_the_schema_takes_a_starter_with_every_default_written_out(name: str, read: Any) -> None:
    text = starter("text-classification", name)
    spelled_out = re.sub(r"^  # (\w+: )", r"  \1", text, flags=re.M)
    assert spelled_out.count("\n  ") > text.count("\n  ") - text.count("\n  # ") > 0
    assert read(spelled_out) == read(text) and _fits(YAML(typ="safe").load(spelled_out), schema())


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
def test_the_schema_refuses_what_the_recipe_does(change: dict[str, Any]) -> None:
    sound = {"task": "text-classification", "model": "tiny"}
    assert _fits(sound, schema()) and not _fits(sound | change, schema())


def test_the_schema_asks_for_task_and_model() -> None:
    assert not _fits({"task": "text-classification"}, schema()) and not _fits({"model": "tiny"}, schema())


TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


def _fits(value: Any, wanted: dict[str, Any], root: dict[str, Any] | None = None) -> bool:
    """Whether a value is one of a JSON schema, as far as ours use the language."""
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
def test_a_later_refusal_names_the_place_of_its_key(error: UserError, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{HEAD}train:\n  precision: fp16\ntechnique:\n  lora_r: 4\n")
    found = located(error, path, ["data.test=0.1"])
    assert str(found) == said.format(file=path) and type(found) is type(error)
