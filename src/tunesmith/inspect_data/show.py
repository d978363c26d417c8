"""Model inputs of single rows, token by token, with the loss targets: `tunesmith data show PATH|RECIPE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from tunesmith.data.batches import Ragged, collate
from tunesmith.data.encoded import Fields, encode_in_memory
from tunesmith.data.formats import Row
from tunesmith.data.preview import Preview
from tunesmith.data.text.augment import Augmenter, texts_of
from tunesmith.deploy.back_translation import back_translate
from tunesmith.errors import CONTROL, RecipeError, counted
from tunesmith.inspect_data.files import find_files, guess_task, resolve_target, source_of
from tunesmith.models import load as models
from tunesmith.models import sources
from tunesmith.run.prepare import max_length
from tunesmith.tasks import BoundTask
from tunesmith.training import dataset
from tunesmith.training.augmented import check_augmentable

SHOWN_EPOCHS = 3

_PAGE = Path(__file__).with_name("show.html.jinja")


@dataclass(frozen=True)
class EncodedRow:
    """Place and preview of one encoded row."""

    place: str
    preview: Preview

    def dump(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return {"place": self.place, **self.preview.dump()}


def show(
    target: str | None,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    split: str = "train",
    rows: int = 5,
    row: int | None = None,
    augmented: bool = False,
    stage: int | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
) -> list[EncodedRow]:
    """Encode the first `rows` of a split, or the row with number `row` (from 1), as for training.

    With `augmented`, each row is followed by its augmented forms in the first SHOWN_EPOCHS epochs.

    Raises:
        RecipeError: no model is named, or there is no such split or row.
        DataError: the data cannot be read.
    """
    recipe, guess, spec, _ = resolve_target(target, overrides, model, stage)
    if spec is None:
        raise RecipeError("model: missing; data show needs its tokenizer", hint="set --model NAME, or give a recipe")
    data, named, _ = find_files(recipe.data, recipe.task, guess=guess)
    guessed = guess_task(recipe.task, next(iter(named.values())), data)[0] if guess else None
    read = dataset.read(guessed or recipe.task, data, recipe.train.seed)
    if split not in read.splits:
        raise RecipeError(
            f"there is no {split} split", where="--split", hint=f"known: {', '.join(sorted(read.splits))}"
        )
    source = source_of(spec, offline=offline, allow_pickle=allow_pickle)
    task = read.task
    processor = models.load_processor(source, task.auto_class, task.added_tokens, kind=task.processor)
    shape = models.load_shape(source, task.auto_class, processor)
    longest = max_length(read.data.max_length, shape, processor, recipe.technique, task)
    data = read.data.model_copy(update={"max_length": longest})
    bound = task.bind(processor, shape.config, data, recipe.train.label_smoothing)
    first = 0 if row is None else row - 1
    chunks = bound.chunks(read.splits[split].rows())
    numbered = list(islice(enumerate(chunks), first, first + (rows if row is None else 1)))
    if row is not None and not numbered:
        raise RecipeError(f"--row: {split} has no row {row}", hint=f"it has {counted(read.rows[split], 'row')} of data")
    seed = recipe.train.seed
    if not augmented:
        return encode_rows(numbered, bound, seed if split == "train" else 0)
    if not data.augment or split != "train":
        what = "only train is augmented" if data.augment else "data.augment is not set"
        hint = "set data.augment='[{name: word-dropout, probability: 0.1}]' and --split train"
        raise RecipeError(f"--augmented: {what}", hint=hint)
    check_augmentable(read, bound)
    texts = texts_of((chunk for _, chunk in numbered), task.columns)
    cache = sources.cache_home() / "translated-back"
    paraphrases = back_translate(texts, data.augment, cache, offline=offline, say=lambda _: None)
    augmenter = Augmenter.of(data.augment, seed, task.columns, paraphrases)
    changed = []
    for index, chunk in numbered:
        changed.append((index, chunk))
        for epoch in range(SHOWN_EPOCHS):
            values = augmenter.row(chunk, epoch, index).values
            changed.append((index, Row(f"{chunk.place} in epoch {epoch + 1}", values)))
    return encode_rows(changed, bound, seed)


def encode_rows(rows: Sequence[tuple[int, Row]], bound: BoundTask, seed: int) -> list[EncodedRow]:
    """Encode numbered rows, with the random draws of the first epoch."""
    encoded = bound.encode([row for _, row in rows])
    return [
        EncodedRow(row.place, bound.preview(_transformed(index, fields, bound, seed)))
        for (index, row), fields in zip(rows, encoded, strict=True)
    ]


def _transformed(index: int, fields: Fields, bound: BoundTask, seed: int) -> Fields:
    """Return the fields of one example after `BoundTask.transform`."""
    if bound.deterministic_inputs:
        return fields
    batch = collate(encode_in_memory([fields], lambda rows: rows), np.zeros(1, dtype=np.int64))
    batch = bound.transform(batch, np.array([index]), seed)
    return {
        name: value.values.tolist() if isinstance(value, Ragged) else value[0].tolist()
        for name, value in batch.fields.items()
    }


def page(rows: Sequence[EncodedRow], title: str) -> str:
    """Render encoded rows as a static HTML page without scripts."""

    def printable(value: object) -> object:
        return CONTROL.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else value

    template = Environment(autoescape=True, finalize=printable).from_string(_PAGE.read_text(encoding="utf-8"))
    return template.render(rows=rows, title=title)
