"""Preparation of a run before its first step, in three parts that `plan`, `compare` and `hpo` also call:

read_data    read rows, targets and splits; fit the task to the training targets
load_base    resolve the source; load model and processor; find the anatomy
assemble     bind the task, apply the technique, set up fast paths, encode the splits, complete the recipe

Invalid input is refused here; faults of the data are reported before any model is downloaded.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.console import Console
from tunesmith.data.batches import Batches
from tunesmith.data.encoded import Encoded, fingerprint
from tunesmith.data.text import augment
from tunesmith.deploy import continue_adapter, merge
from tunesmith.deploy.back_translation import back_translate
from tunesmith.deploy.back_translation import fingerprints as translators
from tunesmith.errors import RecipeError, counted
from tunesmith.kernels.accelerate import accelerate, switched_off
from tunesmith.kernels.fast_path import FastPath
from tunesmith.models import added_tokens, sources
from tunesmith.models import load as models
from tunesmith.models.anatomy import Anatomy
from tunesmith.models.load import UNBOUNDED
from tunesmith.recipe import Recipe
from tunesmith.tasks import BoundTask, Task
from tunesmith.techniques import Technique, set_trainable
from tunesmith.training import dataset, evaluate, feature_cache, parallel
from tunesmith.training.augmented import Augmented
from tunesmith.training.machine import Machine, store_frozen
from tunesmith.training.notes import merge_notes
from tunesmith.training.task_model import load_task_model

MAX_LENGTH = 512
EPOCHS = 3.0


@dataclass(frozen=True)
class Base:
    """Base model before any technique is applied, with its processor and anatomy."""

    source: sources.Source
    processor: Any
    model: nn.Module
    anatomy: Anatomy


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs before its first step; `recipe` has every default filled in."""

    recipe: Recipe
    bound: BoundTask
    technique: Technique
    examples: dataset.Examples
    encoded: dict[str, Encoded]
    base: Base
    machine: Machine
    learned: tuple[str, ...]
    """Names of the trained parameters, and of the buffers that the technique added."""
    fast_path: FastPath
    augmented: Augmented | None
    """The augmented training examples, with `data.augment`."""
    continued: Path | None = None
    """The run whose adapter is trained further."""

    @property
    def task(self) -> Task:
        """The task with every key filled in."""
        task: Task = self.bound.task
        return task

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.base.model

    @property
    def anatomy(self) -> Anatomy:
        """The anatomy of the model."""
        return self.base.anatomy

    @property
    def head_warmup_steps(self) -> int:
        """The number of steps in which only a new head is trained."""
        return math.ceil(self.task.head_warmup_ratio * self.total_steps) if self.anatomy.new else 0

    def update_trainable(self, step: int) -> None:
        """Set the parameters that are trained after `step` steps: first only a new head, then all of the technique."""
        if self.head_warmup_steps:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self.learned)
        self.technique.update_trainable(self.model, self.anatomy, step / self.total_steps)
        if step < self.head_warmup_steps:
            set_trainable(self.model, self.anatomy.new)

    @property
    def batches(self) -> Batches:
        """This process's share of the training data."""
        train = self.recipe.train
        share = (parallel.rank(), parallel.world_size(), self.augmented)
        return Batches(self.encoded["train"], train.batch_size, train.seed, *share)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        train = self.recipe.train
        return train.max_steps or math.ceil((train.epochs or EPOCHS) * self.batches.steps_per_epoch)

    @property
    def draws(self) -> int | None:
        """Number of different random draws of the inputs; None where every epoch has its own."""
        return feature_cache.draws_of(self.bound, feature_cache.level_of(self.anatomy, self.learned))

    def cache_features(self, console: Console) -> float:
        """Cache the features of the frozen blocks if examples are used more than once; return the seconds taken."""
        began, features = time.perf_counter(), feature_cache.features_of(self.model)
        epochs, draws = self.total_steps / self.batches.steps_per_epoch, self.draws
        if features is None or draws is None or epochs <= draws or self.augmented:
            return 0.0
        home = sources.cache_home() / "features"
        base = models.base_hash(self.base.source), models.processor_hash(self.base.processor), self.machine.precision
        of_model = (*base, self.task.name, self.technique.model_dump(), sorted(features.blocks))
        seed = 0 if self.bound.deterministic_inputs else self.recipe.train.seed
        sets = [("train", seed, draw) for draw in range(draws)] + [("validation", 0, 0)]
        for name, seed, draw in sets:
            if (encoded := self.encoded.get(name)) is None:
                continue
            folder = home / fingerprint(encoded.key, of_model, seed, draw)
            with console.during(f"caching frozen features for {name}"), parallel.main_process_first():
                args = self.model, self.bound, encoded, self.machine, folder, console.say, seed, draw
                cached = feature_cache.cache_features(*args)
            # if one process lacks disk space, none caches
            if parallel.all_reduce_max(int(not cached), self.machine.device):
                break
        feature_cache.prune(home)
        return time.perf_counter() - began

    def identity(self) -> dict[str, Any]:
        """Return what must be equal in a resumed run: recipe and hashes of data, base and processor."""
        tree = self.recipe.dump()
        del tree["output"]
        hashes: dict[str, Any] = {
            "data_sha256": self.examples.fingerprints(),
            "base_sha256": models.base_hash(self.base.source),
            "processor_sha256": models.processor_hash(self.base.processor),
        }
        if self.recipe.data.augment:
            hashes["synonyms_sha256"] = augment.synonym_hashes(self.recipe.data.augment)
            hashes |= {"translators_sha256": runs} if (runs := translators(self.recipe.data.augment)) else {}
        return tree | hashes | {"world_size": parallel.world_size()}


def prepare(recipe: Recipe, machine: Machine, *, offline: bool, allow_pickle: bool, console: Console) -> Prepared:
    """Prepare a run: first the data, then the model, then the technique."""
    recipe, run = continue_adapter.resolve(recipe) if recipe.continues else (recipe, None)
    read = read_data(recipe, offline=offline, console=console)
    base = load_base(recipe, read.task, run, offline=offline, allow_pickle=allow_pickle, console=console)
    return assemble(recipe, read, base, machine, run, offline=offline, console=console)


def read_data(recipe: Recipe, *, offline: bool, console: Console) -> dataset.Examples:
    """Read rows and targets, fit the task to the training targets, and draw the splits."""
    task = recipe.task
    missing = task.fetch(console.say, offline=offline)
    with console.during(f"reading {recipe.data.train}"):
        read = dataset.read(task, recipe.data, recipe.train.seed)
    read = replace(read, notes=[*missing, *read.notes])
    for note in read.notes:
        console.warn(note)
    if recipe.train.early_stopping_patience and "validation" not in read.splits:
        what = "train.early_stopping_patience: needs a validation split"
        raise RecipeError(what, hint="set data.validation=0.1, or leave the key out")
    return read


def load_base(
    recipe: Recipe, task: Task, run: Path | None, *, offline: bool, allow_pickle: bool, console: Console
) -> Base:
    """Load model and processor of the recipe; `run` is the run whose adapter is trained further."""
    if run is None:
        _merge_earlier_adapter(recipe.model, offline, allow_pickle, console)
    else:
        console.say(f"continuing the adapter of {run}")
    with parallel.main_process_first():  # rank 0 downloads and converts; the others use the result
        source = sources.resolve(recipe.model, offline=offline, allow_pickle=allow_pickle, on_fetch=console.say)
    snapshot = source if run is None else continue_adapter.with_snapshot(source, run)
    processor = models.load_processor(snapshot, task.auto_class, task.added_tokens, kind=task.processor)
    model, anatomy = load_task_model(task, source, processor, recipe.train.seed)
    if task.processor == "tokenizer":
        models.check_vocabulary(model, processor, recipe.model)
    return Base(source, processor, model, anatomy)


def assemble(
    recipe: Recipe,
    read: dataset.Examples,
    base: Base,
    machine: Machine,
    run: Path | None = None,
    *,
    offline: bool,
    console: Console,
) -> Prepared:
    """Bind the task, apply the technique to the base's model (in place), accelerate it, and encode the splits."""
    technique, model, anatomy, processor = recipe.technique, base.model, base.anatomy, base.processor
    base_buffers = {name for name, _ in model.named_buffers()}
    torch.manual_seed(recipe.train.seed)
    longest = max_length(read.data.max_length, model, processor, technique, read.task)
    data = read.data.model_copy(update={"max_length": longest})
    bound = read.task.bind(processor, model.config, data, recipe.train.label_smoothing)
    read = replace(read, task=bound.task, data=data)
    technique.apply(model, anatomy, processor)
    if run is not None:
        continue_adapter.load_trained(model, read.task, technique, base.source, run)
    learned = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    saved = model.state_dict().keys()
    learned += tuple(name for name, _ in model.named_buffers() if name not in base_buffers and name in saved)
    store_frozen(model, machine.autocast_dtype)
    model.to(machine.device)
    fast_path = _accelerate(model, anatomy, recipe, machine, longest or UNBOUNDED)
    feature_cache.use_features(model, anatomy, feature_cache.level_of(anatomy, learned))
    encoded = _encode(read, bound, console)
    augmented = _augment(read, bound, recipe, offline, console) if data.augment else None
    _check_metric(recipe.train.metric, bound, encoded)
    resolved = _resolve(recipe, read, bound, technique, anatomy, machine)
    return Prepared(resolved, bound, technique, read, encoded, base, machine, learned, fast_path, augmented, run)


def _check_metric(metric: str | None, bound: BoundTask, encoded: dict[str, Encoded]) -> None:
    """Refuse a metric that the task does not compute."""
    if metric is None or "validation" not in encoded:
        return
    metrics = bound.metrics()
    if metric not in metrics.of_answers:
        evaluate.pick(evaluate.random_scores(bound, encoded["train"], encoded["validation"]), metric)
    elif not metrics.answers_needed(encoded["validation"]):
        raise RecipeError(
            f"train.metric: {metric} needs generated texts, and none are generated", hint="set task.generate={}"
        )


def _merge_earlier_adapter(model: str, offline: bool, allow_pickle: bool, console: Console) -> None:
    """Merge the adapter of an earlier run into its `model/`, once, so that this run can start from it."""
    run = Path(model).expanduser()
    if (run / "adapter" / "adapter_config.json").exists() and not (run / "model").exists():
        with parallel.main_process_first():
            if not (run / "model").exists():
                merge.merge_adapter(run, offline=offline, allow_pickle=allow_pickle)
                console.say(f"merged the adapter of {run} into {run / 'model'}")


def _accelerate(model: nn.Module, anatomy: Anatomy, recipe: Recipe, machine: Machine, longest: int) -> FastPath:
    if recipe.train.fast_path == "off":
        return switched_off("train.fast_path: off")
    return accelerate(
        model,
        anatomy,
        device=machine.device,
        autocast_dtype=machine.autocast_dtype,
        max_tokens=longest,
        world_size=parallel.world_size(),
    )


def _encode(read: dataset.Examples, bound: BoundTask, console: Console) -> dict[str, Encoded]:
    cache = sources.cache_home() / "encoded"
    processor_hash = models.processor_hash(bound.processor)
    rows = counted(sum(read.rows.values()), "row")
    with console.during(f"encoding {rows}"), parallel.main_process_first():  # rank 0 encodes
        encoded = dataset.encode_splits(read, bound, processor_hash, cache)
    notes = ((name, f": {note}") for name, split in encoded.items() for note in bound.notes(split))
    for note in merge_notes(notes):
        console.warn(note)
    return encoded


def _augment(read: dataset.Examples, bound: BoundTask, recipe: Recipe, offline: bool, console: Console) -> Augmented:
    cache, steps = sources.cache_home(), read.data.augment or []
    with parallel.main_process_first():  # rank 0 translates; the others read the file
        texts, device = augment.texts_of(read.splits["train"].rows(), read.task.columns), recipe.train.device
        folder = cache / "translated-back"
        translations = back_translate(texts, steps, folder, device=device, offline=offline, say=console.say)
    return Augmented(read, bound, recipe.train.seed, cache / "encoded", translations)


def max_length(given: int | None, model: nn.Module, processor: Any, technique: Technique, task: Task) -> int | None:
    """Return the maximum tokens per text: `given` by the recipe, else the model's limit, at most `MAX_LENGTH`.

    None for a task without texts.

    Raises:
        RecipeError: `given` exceeds the model's limit, or virtual tokens leave no room for a text.
    """
    if "max_length" not in task.data_keys:
        return None
    model_limit = models.length_limit(model, processor)
    limit = model_limit - technique.virtual_tokens
    if limit <= processor.num_special_tokens_to_add():
        what = (
            f"{technique.virtual_tokens} virtual tokens leave no room for a text (the model's limit is {model_limit})"
        )
        raise RecipeError(what, where="technique.num_virtual_tokens", hint="use fewer")
    if given is not None and given > limit:
        what = f"data.max_length: {given} tokens, but this model reads at most {limit}"
        raise RecipeError(what, hint=f"use at most {limit}")
    return given or min(limit, MAX_LENGTH)


def _resolve(
    recipe: Recipe,
    read: dataset.Examples,
    bound: BoundTask,
    technique: Technique,
    anatomy: Anatomy,
    machine: Machine,
) -> Recipe:
    """Return the recipe with every default filled in that depends on data, model or machine."""
    train = recipe.train
    metric = train.metric or bound.metrics().primary
    rate = train.learning_rate or technique.learning_rate(anatomy)
    head_rate = technique.head_learning_rate(rate)
    head_rate = max(head_rate, added_tokens.LEARNING_RATE) if anatomy.added else head_rate
    update = {
        "epochs": train.epochs or (None if train.max_steps else EPOCHS),
        "learning_rate": rate,
        "head_learning_rate": train.head_learning_rate or head_rate,
        "metric": metric,
        "precision": machine.precision,
        "device": machine.device.type,
    }
    train = train.model_copy(update=update)
    return recipe.model_copy(update={"task": read.task, "data": read.data, "train": train})
