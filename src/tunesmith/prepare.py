"""What a run needs before its first step: data, then model, then technique, and a recipe with every value filled in.

What can be refused is refused here, and what needs no model before anything is fetched.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.data import augment
from tunesmith.data.batches import Batches
from tunesmith.data.encoded import Encoded, fingerprint
from tunesmith.deploy import continuing, merging
from tunesmith.deploy.back_translation import fingerprints as translators
from tunesmith.deploy.back_translation import translated_back
from tunesmith.errors import RecipeError, counted
from tunesmith.kernels.accelerate import accelerate, switched_off
from tunesmith.kernels.fast_path import FastPath
from tunesmith.models import added_tokens, sources
from tunesmith.models import load as models
from tunesmith.models.anatomy import Anatomy
from tunesmith.recipe import Recipe
from tunesmith.talk import Talk
from tunesmith.tasks import Task, WritingTask
from tunesmith.techniques import Technique, learn_only
from tunesmith.training import evaluate, examples, feature_cache, machine, parallel
from tunesmith.training.examples import Augmented
from tunesmith.training.machine import Machine
from tunesmith.training.task_model import load_task_model

MAX_LENGTH = 512
EPOCHS = 3.0


@dataclass(frozen=True)
class Prepared:
    """All that a run needs before its first step; `recipe` holds every value that will be used."""

    recipe: Recipe
    task: Task
    technique: Technique
    examples: examples.Examples
    encoded: dict[str, Encoded]
    source: sources.Source
    processor: Any
    model: nn.Module
    anatomy: Anatomy
    machine: Machine
    learned: tuple[str, ...]
    """Names of what the run keeps: what learns, and the buffers that the technique added."""
    fast_path: FastPath
    augmented: Augmented | None
    """The training examples as they are in an epoch, where the recipe changes them."""
    continued: Path | None = None
    """The run whose adapter is gone on with."""

    @property
    def head_alone_steps(self) -> int:
        """For how many steps a new head learns alone."""
        return math.ceil(self.task.head_alone() * self.total_steps) if self.anatomy.new else 0

    def thaw(self, step: int) -> None:
        """After `step` steps, let learn what is to learn now: at first a new head alone, then as the technique says."""
        if self.head_alone_steps:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self.learned)
        self.technique.thaw(self.model, self.anatomy, step / self.total_steps)
        if step < self.head_alone_steps:
            learn_only(self.model, self.anatomy.new)

    @property
    def batches(self) -> Batches:
        """This process's share of the training data."""
        train = self.recipe.train
        share = (parallel.rank(), parallel.world_size(), self.augmented)
        return Batches(self.encoded["train"], train.batch_size, train.seed, *share)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        train = self.recipe.train
        return train.max_steps or math.ceil((train.epochs or EPOCHS) * self.batches.steps_per_epoch)

    def keep_features(self, talk: Talk) -> float:
        """Compute once what the frozen lower blocks give, where examples are read again; the seconds it took."""
        began, again = time.perf_counter(), self.total_steps > self.batches.steps_per_epoch
        features: Any = getattr(self.model, "frozen_features", None)
        if features is None or not again or self.augmented or type(self.task).draw is not Task.draw:
            return 0.0
        home = sources.cache_home() / "features"
        base = models.base_hash(self.source), models.processor_hash(self.processor), self.machine.precision
        of_model = (*base, self.task.name, self.technique.model_dump(), features.level)
        for name in ("train", "validation"):
            if (encoded := self.encoded.get(name)) is None:
                continue
            folder = home / fingerprint(encoded.folder.name, of_model)
            with talk.during(f"computing once what the frozen blocks give for {name}"), parallel.first_alone():
                kept = feature_cache.keep_features(self.model, self.task, encoded, self.machine, folder, talk.say)
            if parallel.largest(int(not kept), self.machine.device):  # what one has no room for, none goes on with
                break
        feature_cache.prune(home)
        return time.perf_counter() - began

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it continues."""
        tree = self.recipe.dump()
        del tree["output"]
        hashes: dict[str, Any] = {
            "data_sha256": self.examples.fingerprints(),
            "base_sha256": models.base_hash(self.source),
            "processor_sha256": models.processor_hash(self.processor),
        }
        if self.recipe.data.augment:
            hashes["synonyms_sha256"] = augment.fingerprints(self.recipe.data.augment)
            hashes |= {"translators_sha256": found} if (found := translators(self.recipe.data.augment)) else {}
        return tree | hashes | {"world_size": parallel.world_size()}


def prepare(recipe: Recipe, found: Machine, *, offline: bool, allow_pickle: bool, talk: Talk) -> Prepared:
    """Data, then model, then technique: what can be refused is refused before anything is fetched."""
    recipe, run = continuing.earlier(recipe) if recipe.continues else (recipe, None)
    task, technique = recipe.task, recipe.technique
    assert isinstance(task, Task) and isinstance(technique, Technique)
    missing = task.fetch(talk.say, offline=offline)
    with talk.during(f"reading {recipe.data.train}"):
        read = examples.read(task, recipe.data, recipe.train.seed)
    read = replace(read, notes=[*missing, *read.notes])
    for note in read.notes:
        talk.warn(note)
    if recipe.train.early_stopping_patience and "validation" not in read.splits:
        what = "train.early_stopping_patience: there is no validation split to watch"
        raise RecipeError(what, hint="data.validation=0.1, or leave the key out")
    if run is None:
        _fold_adapter(recipe.model, offline, allow_pickle, talk)
    else:
        talk.say(f"goes on with the adapter of {run}")
    with parallel.first_alone():  # it fetches and converts, the others find what it left
        source = sources.resolve(recipe.model, offline=offline, allow_pickle=allow_pickle, on_fetch=talk.say)
    dress = source if run is None else continuing.dressed(source, run)
    processor = models.load_processor(dress, read.task.model_class, read.task.added_tokens)
    config = models.load_config(source, read.task.model_class, processor)
    read = replace(read, task=read.task.for_processor(processor, config))
    model, anatomy = load_task_model(read.task, source, processor, recipe.train.seed)
    before = {name for name, _ in model.named_buffers()}
    torch.manual_seed(recipe.train.seed)
    models.check_vocabulary(model, processor, recipe.model)
    longest = max_length(read.data.max_length, model, processor, technique)
    technique.apply(model, anatomy, processor)
    if run is not None:
        continuing.put_back(model, read.task, technique, source, run)
    learned = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    kept = model.state_dict().keys()
    learned += tuple(name for name, _ in model.named_buffers() if name not in before and name in kept)
    machine.store_frozen(model, found.autocast_dtype)
    model.to(found.device)
    fast_path = _accelerate(model, anatomy, recipe, found, longest)
    feature_cache.use_features(model, anatomy, feature_cache.level_of(anatomy, learned))
    read = replace(read, data=read.data.model_copy(update={"max_length": longest}))
    encoded = _encode(read, processor, talk)
    changed = _augmented(read, processor, recipe, offline, talk) if read.data.augment else None
    _check_metric(recipe.train.metric, read.task, encoded)
    resolved = _resolve(recipe, read, technique, anatomy, found)
    return Prepared(
        resolved,
        read.task,
        technique,
        read,
        encoded,
        source,
        processor,
        model,
        anatomy,
        found,
        learned,
        fast_path,
        changed,
        run,
    )


def _check_metric(metric: str | None, task: Task, encoded: dict[str, Encoded]) -> None:
    """Refuse a metric that no score will have."""
    if metric is None or "validation" not in encoded:
        return
    if not (isinstance(task, WritingTask) and metric in task.text_scores):
        evaluate.pick(evaluate.random_scores(task, encoded["train"], encoded["validation"]), metric)
    elif not task.rows_written(encoded["validation"]):
        raise RecipeError(f"train.metric: {metric} is of texts, and none are written", hint="task.generate={}")


def _fold_adapter(model: str, offline: bool, allow_pickle: bool, talk: Talk) -> None:
    """A run that left an adapter gets a `model/`, once, before another starts from it."""
    run = Path(model).expanduser()
    if (run / "adapter" / "adapter_config.json").exists() and not (run / "model").exists():
        with parallel.first_alone():
            if not (run / "model").exists():
                merging.fold(run, offline=offline, allow_pickle=allow_pickle)
                talk.say(f"merged the adapter of {run} into {run / 'model'}")


def _accelerate(model: nn.Module, anatomy: Anatomy, recipe: Recipe, found: Machine, longest: int) -> FastPath:
    if recipe.train.fast_path == "off":
        return switched_off("train.fast_path: off")
    return accelerate(
        model,
        anatomy,
        device=found.device,
        autocast_dtype=found.autocast_dtype,
        max_tokens=longest,
        world_size=parallel.world_size(),
    )


def _encode(read: examples.Examples, processor: Any, talk: Talk) -> dict[str, Encoded]:
    cache = sources.cache_home() / "encoded"
    processor_hash = models.processor_hash(processor)
    rows = counted(sum(read.rows.values()), "row")
    with talk.during(f"encoding {rows}"), parallel.first_alone():  # it encodes, the others open what it wrote
        encoded = examples.encode_splits(read, processor, processor_hash, cache)
    notes = ((name, f": {note}") for name, split in encoded.items() for note in read.task.notes(split, processor))
    for note in examples.said_once(notes):
        talk.warn(note)
    return encoded


def _augmented(read: examples.Examples, processor: Any, recipe: Recipe, offline: bool, talk: Talk) -> Augmented:
    cache, steps = sources.cache_home(), read.data.augment or []
    with parallel.first_alone():  # it translates, the others read what it wrote
        texts, device = augment.texts_of(read.splits["train"].rows()), recipe.train.device
        kept = cache / "translated-back"
        otherwise = translated_back(texts, steps, kept, device=device, offline=offline, say=talk.say)
    return Augmented(read, processor, recipe.train.seed, cache / "encoded", otherwise)


def max_length(asked: int | None, model: nn.Module, processor: Any, technique: Technique) -> int:
    """How many tokens of a text are read: what the recipe asks for, else what the model takes, at most MAX_LENGTH.

    Raises:
        RecipeError: more than the model takes is asked for, or virtual tokens leave no room.
    """
    reads = models.length_limit(model, processor)
    limit = reads - technique.virtual_tokens
    if limit <= processor.num_special_tokens_to_add():
        what = f"{technique.virtual_tokens} virtual positions leave no room for a text in a model that reads {reads}"
        raise RecipeError(what, where="technique.num_virtual_tokens", hint="give fewer")
    if asked is not None and asked > limit:
        raise RecipeError(
            f"data.max_length: {asked} tokens, but this model reads at most {limit}", hint=f"at most {limit}"
        )
    return asked or min(limit, MAX_LENGTH)


def _resolve(recipe: Recipe, read: examples.Examples, technique: Technique, anatomy: Anatomy, found: Machine) -> Recipe:
    """The recipe with every default that depends on data, model and machine filled in."""
    train = recipe.train
    metric = train.metric or read.task.metric()
    rate = train.learning_rate or technique.learning_rate(anatomy)
    of_head = technique.head_learning_rate(rate)
    of_head = max(of_head, added_tokens.LEARNING_RATE) if anatomy.added else of_head
    update = {
        "epochs": train.epochs or (None if train.max_steps else EPOCHS),
        "learning_rate": rate,
        "head_learning_rate": train.head_learning_rate
        or (max(of_head, added_tokens.LEARNING_RATE) if anatomy.added else of_head),
        "metric": metric,
        "precision": found.precision,
        "device": found.device.type,
    }
    train = train.model_copy(update=update)
    return recipe.model_copy(update={"task": read.task, "data": read.data, "train": train})
