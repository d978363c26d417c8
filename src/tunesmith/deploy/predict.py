"""A fine-tuned model loaded for prediction from the artifact on disk, in the dtype of the base's checkpoint."""

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
from tunesmith.deploy import artifact, fingerprint
from tunesmith.errors import CheckpointError, RecipeError, UserError, shorten
from tunesmith.models import load as models
from tunesmith.models import sources
from tunesmith.models.anatomy import Anatomy
from tunesmith.recipe import Data, Recipe
from tunesmith.recipe import load as load_recipe
from tunesmith.storage.run_folder import check_run
from tunesmith.tasks import BoundTask, Task
from tunesmith.training import evaluate, machine
from tunesmith.training.dataset import encode_rows
from tunesmith.training.machine import Machine
from tunesmith.training.task_model import load_task_model

PLAIN_VALUES: dict[Kind, type] = {"text": str}
"""Kind of a column -> type of its values in Python."""


@dataclass(frozen=True)
class FineTunedModel:
    """Fine-tuned model with its task, ready to predict."""

    model: nn.Module
    bound: BoundTask
    anatomy: Anatomy
    recipe: Recipe
    machine: Machine

    def __repr__(self) -> str:
        return f"<{self.task.name} with {self.recipe.technique.name}, run {self.recipe.output}>"

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
        """True where answers are generated texts."""
        return self.bound.generator is not None

    @property
    def data(self) -> Data:
        """The data keys of the run."""
        return self.recipe.data

    def predict(
        self, inputs: str | Mapping[str, object] | Iterable[str | Mapping[str, object]]
    ) -> list[dict[str, Any]]:
        """Return one answer for each input, in their order: a text, or a mapping with the task's columns.

        Example:
            >>> tunesmith.load("runs/reviews").predict(["A lovely film."])  # doctest: +SKIP
            [{'label': 'positive', 'score': 0.98, 'probabilities': {...}}]
        """
        return self.predict_rows(self._rows([inputs] if isinstance(inputs, str | Mapping) else inputs))

    def stream(self, given: str | Mapping[str, object], say: Callable[[str], None]) -> str:
        """Generate the text for one input, pass it to `say` piece by piece, and return it.

        Raises:
            UserError: the task does not generate texts.
        """
        if self.bound.generator is None:
            raise UserError(f"stream: {self.task.name} does not generate texts", hint="use predict")
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
                raise UserError(f"input {number}: no {main.name}", hint=hint)
            rows.append(Row(f"input {number}", values))
        return rows

    def predict_rows(self, rows: Iterable[Row]) -> list[dict[str, Any]]:
        """Return one answer for each row, in their order. Nothing is written to disk."""
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
) -> FineTunedModel:
    """Load the model of a finished run; `allow_pickle` permits `.bin` weights in an adapter's base (weights_only).

    `base` is the new location of an adapter's base, if it has moved. `to_merge` loads the base unquantized where the
    run used a quantized base.

    Raises:
        RecipeError: the folder contains no finished run.
        CheckpointError: the adapter is damaged, or the base differs from training.
    """
    folder, target = Path(run), machine.find(device, named="--device")
    check_run(folder)
    target.select()
    recipe = load_recipe(folder / "recipe.yaml")
    if to_merge:
        recipe = recipe.model_copy(update={"technique": recipe.technique.for_merge()})
    if (folder / "adapter" / "adapter_config.json").exists():
        source = sources.resolve(str(base or recipe.model), offline=offline, allow_pickle=allow_pickle)
        tuned = _load_model(recipe, source, folder / "adapter", target.device)
    elif (folder / "model" / "config.json").exists():
        tuned = _load_model(recipe, sources.resolve(str(folder / "model"), offline=True), None, target.device)
    else:
        hint = f"finish it with `{command('train', '--resume', folder)}`"
        raise RecipeError("the run is not finished", where=str(folder), hint=hint)
    if not to_merge:
        machine.store_for_inference(tuned.model, tuned.machine)
    return tuned


def _load_model(recipe: Recipe, source: sources.Source, adapter: Path | None, device: torch.device) -> FineTunedModel:
    task, technique = recipe.task, recipe.technique
    tensors = None if adapter is None else read_adapter(adapter, source, task.processor)
    snapshot = source if adapter is None else replace(source, folder=adapter.parent / "base")
    processor = models.load_processor(snapshot, kind=task.processor)
    model, anatomy = load_task_model(task, source, processor, recipe.train.seed, folded=adapter is None)
    bound = task.bind(processor, model.config, recipe.data)
    if tensors is not None:
        technique.apply(model, anatomy, processor)
        technique.load_adapter(model, tensors)
    model.to(device).eval()
    return FineTunedModel(model, bound, anatomy, recipe.model_copy(update={"task": bound.task}), Machine(device, None))


def read_adapter(adapter: Path, source: sources.Source, kind: models.ProcessorKind) -> dict[str, Tensor]:
    """Return the tensors of an adapter, if this is the base that it was trained on.

    Raises:
        CheckpointError: it is another base, or the adapter is damaged.
    """
    with _reading(adapter / fingerprint.FILE) as file:
        known = fingerprint.read(file)
    fingerprint.check(known, source, adapter.parent / "base", adapter, kind)
    with _reading(adapter / "adapter_model.safetensors") as file:
        return artifact.own_names(load_file(file))


def base_of(tuned: FineTunedModel, source: sources.Source) -> tuple[nn.Module, Anatomy]:
    """Load the base of a run as it was before training, on the device of the run's model."""
    model, anatomy = load_task_model(tuned.task, source, tuned.processor, tuned.recipe.train.seed)
    model.to(tuned.machine.device)
    machine.store_for_inference(model, tuned.machine)
    return model, anatomy


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """Raise `CheckpointError` where an adapter file is damaged or missing."""
    try:
        yield file
    except (OSError, ValueError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or shorten(str(error), 120)[1:-1]
        again = f"write it again with `{command('train', '--resume', file.parents[1])}`"
        raise CheckpointError(f"cannot be read ({reason})", where=str(file), hint=again) from error


def predict(run: str | Path, inputs: Iterable[str | Mapping[str, object]], **options: Any) -> list[dict[str, Any]]:
    """Load a run and return its answers; options are those of `load`, which avoids loading the run for each call."""
    return load(run, **options).predict(inputs)
