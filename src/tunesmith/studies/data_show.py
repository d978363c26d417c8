"""What a model sees of a row, token by token, and what of it carries loss: `tunesmith data show PATH|RECIPE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from tokenizers.decoders import ByteLevel

from tunesmith.data.augment import Augmenter, texts_of
from tunesmith.data.batches import Batch, Ragged
from tunesmith.data.formats import Row
from tunesmith.deploy.back_translation import translated_back
from tunesmith.errors import CONTROL, RecipeError, counted
from tunesmith.models import load as models
from tunesmith.models import sources
from tunesmith.prepare import max_length
from tunesmith.recipe import Data
from tunesmith.studies.data_files import asked, find_files, guessed_task, source_of
from tunesmith.tasks import Task
from tunesmith.techniques import Technique
from tunesmith.training import examples

IGNORED = -100
EPOCHS = 3
MAX_BYTES = 4
"""Of a character in UTF-8."""

_PAGE = Path(__file__).with_name("data_show.html.jinja")


@dataclass(frozen=True)
class Token:
    """One token as the model reads it. `target`: what is to be said at this token; None where no loss is."""

    text: str
    special: bool
    target: str | None = None


@dataclass(frozen=True)
class Shown:
    """One row: its windows of tokens, whether words were cut off, and the target of the whole row, if it has one."""

    place: str
    target: str | None
    cut: bool
    windows: list[list[Token]]

    def dump(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


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
) -> list[Shown]:
    """The first `rows` of a split, or the one numbered `row` (from 1), as they are encoded for a run.

    With `augmented` each row is followed by what `data.augment` makes of it in the first EPOCHS epochs.

    Raises:
        RecipeError: no model is named, or there is no such split or row.
        DataError: the data cannot be read.
    """
    recipe, guess, spec, _ = asked(target, overrides, model, stage)
    if spec is None:
        raise RecipeError("a model is needed: its tokenizer says what it sees", hint="--model NAME, or name a recipe")
    assert isinstance(recipe.task, Task) and isinstance(recipe.technique, Technique)
    data, named, _ = find_files(recipe.data, recipe.task, guess=guess)
    wanted = guessed_task(recipe.task, next(iter(named.values())), data)[0] if guess else None
    read = examples.read(wanted or recipe.task, data, recipe.train.seed)
    if split not in read.splits:
        raise RecipeError(
            f"there is no {split} split", where="--split", hint=f"there is {', '.join(sorted(read.splits))}"
        )
    source = source_of(spec, offline=offline, allow_pickle=allow_pickle)
    processor = models.load_processor(source, read.task.model_class, read.task.added_tokens)
    shape = models.load_shape(source, read.task.model_class, processor)
    longest = max_length(read.data.max_length, shape, processor, recipe.technique)
    task, data = read.task.for_processor(processor, shape.config), read.data.model_copy(update={"max_length": longest})
    first = 0 if row is None else row - 1
    pieces = task.pieces(read.splits[split].rows(), processor, data)
    numbered = list(islice(enumerate(pieces), first, first + (rows if row is None else 1)))
    if row is not None and not numbered:
        raise RecipeError(
            f"--row: {split} has no row {row}", hint=f"it is made of {counted(read.rows[split], 'row')} of data"
        )
    seed = recipe.train.seed
    if not augmented:
        return encoded(numbered, task, processor, data, seed if split == "train" else 0)
    if not data.augment or split != "train":
        what = "only train is changed" if data.augment else "data.augment is not given"
        raise RecipeError(f"--augmented: {what}", hint="data.augment='[{name: word-dropout, probability: 0.1}]'")
    examples.check_changeable(read)
    texts = texts_of(one for _, one in numbered)
    kept = sources.cache_home() / "translated-back"
    otherwise = translated_back(texts, data.augment, kept, offline=offline, say=lambda _: None)
    augmenter = Augmenter.of(data.augment, seed, otherwise)
    changed = []
    for index, one in numbered:
        changed.append((index, one))
        for epoch in range(EPOCHS):
            values = augmenter.row(one, epoch, index).values
            changed.append((index, Row(f"{one.place} in epoch {epoch + 1}", values)))
    return encoded(changed, task, processor, data, seed)


def encoded(rows: Sequence[tuple[int, Row]], task: Task, processor: Any, data: Data, seed: int) -> list[Shown]:
    """Rows and their numbers as they are after encoding, with what chance decides in the first epoch."""
    fields = task.encode([row for _, row in rows], processor, data)
    return [
        _shown(row, _drawn(index, one, task, seed), task, processor)
        for (index, row), one in zip(rows, fields, strict=True)
    ]


def _drawn(index: int, fields: dict[str, Any], task: Task, seed: int) -> dict[str, Any]:
    """The fields of one example as `Task.draw` gives them."""
    parts: dict[str, Ragged | torch.Tensor] = {
        name: Ragged(torch.tensor(value), torch.tensor([0, len(value)]))
        if isinstance(value, list)
        else torch.tensor([value])
        for name, value in fields.items()
    }
    batch = task.draw(Batch(parts, 1, len(fields["input_ids"])), np.array([index]), seed)
    if batch.fields is parts:
        return fields
    return {
        name: value.values.tolist() if isinstance(value, Ragged) else value.tolist()[0]
        for name, value in batch.fields.items()
    }


def _shown(row: Row, fields: dict[str, Any], task: Task, processor: Any) -> Shown:
    ids = fields["input_ids"]
    special = set(processor.all_special_ids)
    pair = "target" in task.columns and "label" in fields  # an encoder reads the one, a decoder writes the other
    targets = None if pair else _targets_of_tokens(fields, task, processor)
    tokens = [
        Token(text, code in special, target)
        for text, code, target in zip(spelled(ids, processor), ids, targets or [None] * len(ids), strict=True)
    ]
    windows, start = [], 0
    for length in fields.get("windows") or [len(ids)]:
        windows.append(tokens[start : start + length])
        start += length
    if pair:
        said = zip(spelled(fields["label"], processor), fields["label"], strict=True)
        windows.append([Token(text, code in special, text) for text, code in said])
        return Shown(row.place, None, bool(fields["cut"] or fields["cut_target"]), windows)
    whole = None if targets is not None or "label" not in row.values else _said(task.target(row))
    return Shown(row.place, whole, bool(fields.get("cut")), windows)


def spelled(ids: Sequence[int], processor: Any) -> list[str]:
    """Tokens as a person reads them: where a tokenizer spells bytes, a character that several tokens make stands at
    the last of them, and `…` at the others.
    """
    names: list[str] = processor.convert_ids_to_tokens(list(ids))
    if all(name.isascii() for name in names) or not isinstance(
        getattr(getattr(processor, "backend_tokenizer", None), "decoder", None), ByteLevel
    ):
        return names
    found, waiting = list[str](), list[str]()
    for name in names:
        waiting.append(name)
        text = processor.convert_tokens_to_string(waiting)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(waiting) < MAX_BYTES:
            found.append("…")
            continue
        found.append(text if not text.isascii() and text.strip() == text else name)
        waiting = []
    return found


def _targets_of_tokens(fields: dict[str, Any], task: Task, processor: Any) -> list[str | None] | None:
    """What is to be said at each token, None where nothing is; None where the task has one target for all of them."""
    ids = fields["input_ids"]
    if "learned" in fields:  # some positions: what is to be said is the token itself
        learned = set(fields["learned"])
        return [text if place in learned else None for place, text in enumerate(spelled(ids, processor))]
    if "masked" in fields:  # some positions, and what stood there
        hidden = dict(zip(fields["masked"], spelled(fields["label"], processor), strict=True))
        return [hidden.get(place) for place in range(len(ids))]
    if "first" in fields and "tags" in fields:  # the places of words, and the tag of each
        names = task.head_config()["id2label"]
        tags = dict(zip(fields["first"], fields["tags"], strict=True))
        tags |= dict(zip(fields.get("rest", ()), fields.get("rest_tags", ()), strict=True))
        return [names[tags[place]] if place in tags else None for place in range(len(ids))]
    codes = next(
        (value for name, value in fields.items() if name.startswith("label") and _is_per_token(value, ids)), None
    )
    if codes is None:
        return None
    names = task.head_config().get("id2label") or {}
    return [None if code == IGNORED else str(names.get(code, code)) for code in codes]


def _is_per_token(value: Any, ids: Sequence[int]) -> bool:
    """Whether a field has a whole number for each token; a target of several labels has fractions."""
    return isinstance(value, list) and len(value) == len(ids) and all(isinstance(one, int) for one in value)


def _said(target: Any) -> str:
    return ", ".join(target) or "none" if isinstance(target, tuple) else str(target)


def page(rows: Sequence[Shown], title: str) -> str:
    """The same as one static page of HTML, without scripts."""

    def printable(value: object) -> object:
        return CONTROL.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else value

    template = Environment(autoescape=True, finalize=printable).from_string(_PAGE.read_text(encoding="utf-8"))
    return template.render(rows=rows, title=title)
