"""A run, loaded to answer: the artefact as it lies on disk, in the base's stored number format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tunesmith.console import command
from tunesmith.data.batches import collate
from tunesmith.data.columns import Kind, inputs_of
from tunesmith.data.formats import Row
from tunesmith.deploy import artifact as artefact
from tunesmith.deploy import fingerprint as origin
from tunesmith.errors import CheckpointError, RecipeError, UserError, shorten
from tunesmith.models import load as models
from tunesmith.models import sources
from tunesmith.models.anatomy import Anatomy
from tunesmith.recipe import Data, Recipe
from tunesmith.recipe import load as load_recipe
from tunesmith.storage.run_folder import check_run
from tunesmith.tasks import BoundTask, Task
from tunesmith.techniques import Technique
from tunesmith.training import evaluate, machine
from tunesmith.training.dataset import encode_rows
from tunesmith.training.machine import Machine
from tunesmith.training.task_model import load_task_model

PLAIN_VALUES: dict[Kind, type] = {"text": str}
"""Kind of a column -> the type of its values in Python."""


@dataclass(frozen=True)
class Tuned:
    """A tuned model with all that is needed to ask it."""

    model: nn.Module
    bound: BoundTask
    anatomy: Anatomy
    recipe: Recipe
    machine: Machine

    def __repr__(self) -> str:
        return f"<{self.task.name} by {self.recipe.technique.name}, run {self.recipe.output}>"

    @property
    def task(self) -> Task:
        """The task of the run."""
        task: Task = self.bound.task
        return task

    @property
    def processor(self) -> Any:
        """The tokenizer or image processor."""
        return self.bound.processor

    @property
    def generates(self) -> bool:
        """Whether its answers are generated texts."""
        return self.bound.generator is not None

    @property
    def data(self) -> Data:
        """The data keys of the run."""
        return self.recipe.data

    def predict(
        self, inputs: str | Mapping[str, object] | Iterable[str | Mapping[str, object]]
    ) -> list[dict[str, Any]]:
        """One answer for each text, or each mapping with the task's columns, in their order; a text alone is one.

        Example:
            >>> tunesmith.load("runs/reviews").predict(["A lovely film."])  # doctest: +SKIP
            [{'label': 'positive', 'score': 0.98, 'probabilities': {...}}]
        """
        return self.predict_rows(self._rows([inputs] if isinstance(inputs, str | Mapping) else inputs))

    def stream(self, given: str | Mapping[str, object], say: Callable[[str], None]) -> str:
        """The text that the model generates for one input, passed to `say` piece by piece.

        Raises:
            UserError: the task of this run generates no texts.
        """
        if self.bound.generator is None:
            raise UserError(f"stream: {self.task.name} generates no texts", hint="predict answers")
        prompt = [self.bound.as_prompt(row) for row in self._rows([given])]
        batch = collate(encode_rows(prompt, self.bound), np.zeros(1, dtype=np.int64)).to(self.machine.device)
        with torch.inference_mode():
            return self.bound.generator.stream(self.model, batch, say)

    def _rows(self, inputs: Iterable[str | Mapping[str, object]]) -> list[Row]:
        columns = inputs_of(self.task.columns)
        main, others = columns[0], {column.name for column in columns[1:]}
        rows = []
        for number, given in enumerate(inputs, start=1):
            values: dict[str, object] = dict(given) if isinstance(given, Mapping) else {main.name: given}
            wanted = main.required or main.name in values or not others & values.keys()
            value = values.get(main.name)
            if wanted and (value is None or not isinstance(value, PLAIN_VALUES.get(main.kind, object))):
                hint = f"give a text, or a mapping with '{main.name}'"
                raise UserError(f"input {number} has no {main.name}", hint=hint)
            rows.append(Row(f"input {number}", values))
        return rows

    def predict_rows(self, rows: Iterable[Row]) -> list[dict[str, Any]]:
        """One answer for each row, in their order. Nothing is written to disk."""
        prompts = [self.bound.as_prompt(row) for row in rows]
        answers = evaluate.answers(self.model, self.bound, encode_rows(prompts, self.bound), self.machine)
        return [self.bound.postprocess(answer, row) for answer, row in zip(answers, prompts, strict=True)]


def load(
    run: str | Path,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    offline: bool = False,
    allow_pickle: bool = False,
    to_merge: bool = False,
) -> Tuned:
    """The model of a finished run; `allow_pickle` reads `.bin` weights of the base of an adapter (weights_only).

    `base` says where the base of an adapter is now, if it has moved; `to_merge` asks for its weights as they are
    stored, where the run has learned over others (in 4 or 8 bits).

    Raises:
        RecipeError: there is no finished run in that folder.
        CheckpointError: the adapter is damaged, or the base is not the one that it was trained on.
    """
    folder, found = Path(run), machine.find(device, named="--device")
    check_run(folder)
    found.select()
    recipe = load_recipe(folder / "recipe.yaml")
    if to_merge:
        assert isinstance(recipe.technique, Technique)
        recipe = recipe.model_copy(update={"technique": recipe.technique.for_merge()})
    if (folder / "adapter" / "adapter_config.json").exists():
        source = sources.resolve(str(base or recipe.model), offline=offline, allow_pickle=allow_pickle)
        tuned = _ready(recipe, source, folder / "adapter", found.device)
    elif (folder / "model" / "config.json").exists():
        tuned = _ready(recipe, sources.resolve(str(folder / "model"), offline=True), None, found.device)
    else:
        hint = f"`{command('train', '--resume', folder)}`"
        raise RecipeError("the run is not finished", where=str(folder), hint=hint)
    if not to_merge:
        machine.store_for_inference(tuned.model, tuned.machine)
    return tuned


def _ready(recipe: Recipe, source: sources.Source, adapter: Path | None, device: torch.device) -> Tuned:
    task, technique = recipe.task, recipe.technique
    assert isinstance(task, Task) and isinstance(technique, Technique)
    tensors = None if adapter is None else read_adapter(adapter, source, task.processor)
    snapshot = source if adapter is None else replace(source, folder=adapter.parent / "base")
    processor = models.load_processor(snapshot, kind=task.processor)
    model, anatomy = load_task_model(task, source, processor, recipe.train.seed, folded=adapter is None)
    bound = task.bind(processor, model.config, recipe.data)
    if tensors is not None:
        technique.apply(model, anatomy, processor)
        technique.load_adapter(model, tensors)
    model.to(device).eval()
    return Tuned(model, bound, anatomy, recipe.model_copy(update={"task": bound.task}), Machine(device, None))


def read_adapter(adapter: Path, source: sources.Source, kind: models.ProcessorKind) -> dict[str, Tensor]:
    """What an adapter holds, if this is the base that it belongs to.

    Raises:
        CheckpointError: it is not, or the adapter is damaged.
    """
    with _reading(adapter / origin.FILE) as file:
        known = origin.read(file)
    origin.check(known, source, adapter.parent / "base", adapter, kind)
    with _reading(adapter / "adapter_model.safetensors") as file:
        return artefact.own_names(load_file(file))


def base_of(tuned: Tuned, source: sources.Source) -> tuple[nn.Module, Anatomy]:
    """A base as it was before a run, where the run's model is."""
    model, anatomy = load_task_model(tuned.task, source, tuned.processor, tuned.recipe.train.seed)
    model.to(tuned.machine.device)
    machine.store_for_inference(model, tuned.machine)
    return model, anatomy


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """A file of the adapter that is damaged or gone, as the user's error."""
    try:
        yield file
    except (OSError, ValueError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or shorten(str(error), 120)[1:-1]
        again = f"`{command('train', '--resume', file.parents[1])}` writes it anew"
        raise CheckpointError(f"cannot be read ({reason})", where=str(file), hint=again) from error


def predict(run: str | Path, inputs: Iterable[str | Mapping[str, object]], **options: Any) -> list[dict[str, Any]]:
    """Load a run and ask it once; `load` keeps it for more. Options are those of `load`."""
    return load(run, **options).predict(inputs)
