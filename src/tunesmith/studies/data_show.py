"""What a model sees of a row, token by token, and what of it carries loss: `tunesmith data show PATH|RECIPE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment

from tunesmith.data.augment import Augmenter
from tunesmith.data.formats import Row
from tunesmith.errors import CONTROL, RecipeError
from tunesmith.models import load as models
from tunesmith.models import sources
from tunesmith.prepare import max_length
from tunesmith.recipe import Data
from tunesmith.studies.data_files import asked, find_files
from tunesmith.tasks import Task
from tunesmith.techniques import Technique
from tunesmith.training import examples

IGNORED = -100
EPOCHS = 3
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
    offline: bool = False,
) -> list[Shown]:
    """The first `rows` of a split, or the one numbered `row` (from 1), as they are encoded for a run.

    With `augmented` each row is followed by what `data.augment` makes of it in the first EPOCHS epochs.

    Raises:
        RecipeError: no model is named, or there is no such split or row.
        DataError: the data cannot be read.
    """
    recipe, _, spec = asked(target, overrides, model)
    if spec is None:
        raise RecipeError("a model is needed: its tokenizer says what it sees", hint="--model NAME, or name a recipe")
    assert isinstance(recipe.task, Task) and isinstance(recipe.technique, Technique)
    data, _, _ = find_files(recipe.data)
    read = examples.read(recipe.task, data, recipe.train.seed)
    if split not in read.splits:
        raise RecipeError(
            f"there is no {split} split", where="--split", hint=f"there is {', '.join(sorted(read.splits))}"
        )
    first = 0 if row is None else row - 1
    chosen = list(islice(read.splits[split].rows(), first, first + (rows if row is None else 1)))
    if row is not None and not chosen:
        raise RecipeError(f"--row: {split} has {read.rows[split]:,} rows", hint="rows are counted from 1")
    if augmented:
        if not read.data.augment or split != "train":
            what = "only train is changed" if read.data.augment else "data.augment is not given"
            hint = "data.augment='[{name: word-dropout, probability: 0.1}]'"
            raise RecipeError(f"--augmented: {what}", hint=hint)
        augmenter = Augmenter.of(read.data.augment, recipe.train.seed)
        chosen = [
            Row(f"{one.place} in epoch {epoch + 1}", augmenter.row(one, epoch, index).values) if epoch >= 0 else one
            for index, one in enumerate(chosen, start=first)
            for epoch in range(-1, EPOCHS)
        ]
    source = sources.resolve(spec, offline=offline)
    processor = models.load_processor(source, recipe.task.model_class)
    shape = models.load_shape(source, recipe.task.model_class, processor)
    longest = max_length(read.data.max_length, shape, processor, recipe.technique)
    return encoded(chosen, read.task, processor, read.data.model_copy(update={"max_length": longest}))


def encoded(rows: Sequence[Row], task: Task, processor: Any, data: Data) -> list[Shown]:
    """Rows as they are after encoding."""
    return [
        _shown(row, fields, task, processor)
        for row, fields in zip(rows, task.encode(rows, processor, data), strict=True)
    ]


def _shown(row: Row, fields: dict[str, Any], task: Task, processor: Any) -> Shown:
    ids = fields["input_ids"]
    special = set(processor.all_special_ids)
    names = task.head_config().get("id2label") or {}
    each = next(
        (value for name, value in fields.items() if name.startswith("label") and _is_per_token(value, ids)), None
    )
    targets = [None if code == IGNORED else str(names.get(code, code)) for code in each or [IGNORED] * len(ids)]
    tokens = [
        Token(text, code in special, target)
        for text, code, target in zip(processor.convert_ids_to_tokens(ids), ids, targets, strict=True)
    ]
    windows, start = [], 0
    for length in fields.get("windows") or [len(ids)]:
        windows.append(tokens[start : start + length])
        start += length
    whole = None if each is not None or "label" not in row.values else _said(task.target(row))
    return Shown(row.place, whole, bool(fields.get("cut")), windows)


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
