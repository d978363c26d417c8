"""The data of `data check` and `data show`: a file, a folder or a recipe, opened as files with readers of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

from tunesmith import recipe as recipes
from tunesmith import registry
from tunesmith.data import columns as schema
from tunesmith.data.columns import inputs_of, predicts_text, reads_plain_text
from tunesmith.data.formats import Row, files_of, find_splits, holds_text, is_folder, read_raw
from tunesmith.data.formats.folders import data_files, files_in, no_train_error
from tunesmith.data.formats.parallel import sides_of
from tunesmith.data.formats.plain import texts_in
from tunesmith.data.formats.raw import BadRow, RawRow, Rows
from tunesmith.data.formats.recognize import format_of
from tunesmith.data.text.conversations import all_content, has_conversation_columns
from tunesmith.errors import DataError, RecipeError
from tunesmith.models import sources
from tunesmith.recipe import Data, Recipe, Stages
from tunesmith.run.record import STAGES
from tunesmith.tasks import Task
from tunesmith.training import dataset

SAMPLE_ROWS = 1000
Column = str | int


@dataclass
class File:
    """File that is read as one split. A good row has every value that the task requires."""

    name: str
    path: Path
    names: Sequence[Column]
    raw_rows: Rows
    parse_row: Callable[[RawRow | BadRow], Row | BadRow]
    columns: dict[str, Column]
    schema: schema.Columns
    """The task's columns, or TASKLESS_COLUMNS."""
    limit: int | None
    note: str | None = None
    named: Path | None = None
    """The path in the recipe, if `path` differs: for a parallel pair it shows both files."""
    rows: int = 0
    bad_rows: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, Any] = field(default_factory=dict)
    drawn: dict[str, int] = field(default_factory=dict)
    """Rows of the splits that the recipe draws from this file."""

    def good_rows(self) -> Iterator[Row]:
        """Return the rows that a run reads."""
        parsed = (self.parse_row(raw) for raw in self.raw_rows())
        return islice((row for row in parsed if isinstance(row, Row)), self.limit)

    def dump(self) -> dict[str, Any]:
        """Return the summary of the file as plain values."""
        about = {"file": str(self.path), "rows": self.rows, "bad_rows": self.bad_rows, "columns": self.columns}
        about |= {"classes": dict(self.classes.most_common()), "lengths": self.lengths}
        return about | ({"drawn": self.drawn} if self.drawn else {})


class ResolvedTarget(NamedTuple):
    """The recipe of the data to inspect. `guess` is True if its task is a guess; `model` is None if none is named."""

    recipe: Recipe
    guess: bool
    model: str | None
    note: str = ""


def resolve_target(
    target: str | None, overrides: Sequence[str], model: str | None, stage: int | None = None
) -> ResolvedTarget:
    """Resolve data, a recipe or a run folder, with `key=value` overrides.

    A recipe with stages is resolved to its last stage, or to number `stage` (from 1).

    Raises:
        RecipeError: the recipe is invalid, or there is no such stage.
    """
    recipes_of_run = (Path(target or "") / name for name in (STAGES, "recipe.yaml"))
    target = next((str(path) for path in recipes_of_run if target and path.exists()), target)
    if target is None or target.lower().endswith((".yaml", ".yml")):
        source = recipes.read(target, overrides)
        if (stages := recipes.load_stages(source)) is not None:
            resolved = _resolve_stage(stages, stage)
            return resolved if model is None else resolved._replace(model=model)
        _refuse_stage(stage)
        recipe = recipes.load(source)
        return ResolvedTarget(recipe, False, model or recipe.model)
    _refuse_stage(stage)
    given = {"task": "text-classification", "model": "none", "data": {"train": target, "validation": None}}
    recipe = recipes.load(None, overrides, given)
    guess = not any(word.startswith(("task=", "task.")) for word in overrides)
    return ResolvedTarget(recipe, guess, model or (recipe.model if recipe.model != "none" else None))


def _refuse_stage(stage: int | None) -> None:
    if stage is not None:
        raise RecipeError("--stage: the recipe has no stages", hint="remove --stage")


def _resolve_stage(stages: Stages, stage: int | None) -> ResolvedTarget:
    """Resolve one stage; its model is the run of the previous stage if it exists, else that stage's model."""
    count = len(stages.recipes)
    number = stage or count
    if number > count:
        raise RecipeError(f"--stage: there is no stage {number}", hint=f"1 to {count}")
    recipe = stages.recipes[number - 1]
    base = number - 1
    while base and stages.recipes[base].model == stages.recipes[base - 1].output and not _model_exists(stages, base):
        base -= 1
    note = f"inspecting stage {number} of {count} ({recipe.task.name}); set --stage N for another"
    return ResolvedTarget(recipe, False, stages.recipes[base].model, note if count > 1 else "")


def _model_exists(stages: Stages, index: int) -> bool:
    """Return whether the model of a stage is a run that exists."""
    return (Path(stages.recipes[index].model) / "run.json").exists()


def source_of(spec: str, *, offline: bool, allow_pickle: bool) -> sources.Source:
    """Return the source of a model's tokenizer and config; for a run with an adapter it is the `base/` folder."""
    base_snapshot = Path(spec).expanduser() / "base"
    if (base_snapshot / "config.json").exists():
        return sources.Source(spec, "run", base_snapshot)
    return sources.resolve(spec, offline=offline, allow_pickle=allow_pickle)


def find_files(data: Data, task: Task, *, guess: bool = False) -> tuple[Data, dict[str, Path], bool]:
    """Return the data keys with the files filled in, name -> file (train first), and True if these are splits.

    If the task is a `guess`, parallel files of two languages are accepted too.

    Raises:
        DataError: the file or folder does not exist, or has no readable data.
    """
    if data.train is None:
        raise RecipeError("data.train: missing", hint="give a file, a folder or a recipe")
    named, pairs = {"train": Path(data.train)}, guess or predicts_text(task.columns)
    plain = reads_plain_text(task.columns)
    of_texts = is_folder(data.train) and (holds_text(Path(data.train)) if guess else plain)
    if is_folder(data.train) and not (named := find_splits(data.train, pairs=pairs)):
        files = data_files(data.train)
        if of_texts and texts_in(Path(data.train)):
            files = [Path(data.train)]
        if not files:
            raise no_train_error(data.train)
        if len(files) > 1:
            return data, {path.name: path for path in files}, False
        named = {"train": files[0]}
        data = data.model_copy(update={"train": str(files[0])})
    for name, value in (("validation", data.validation), ("test", data.test)):
        if isinstance(value, str):
            named[name] = Path(value)
    return data, {name: named[name] for name in ("train", "validation", "test") if name in named}, True


def skipped_files(folder: Path, named: Mapping[str, Path]) -> list[str]:
    """Return the names of the files of a folder that are not read."""
    read = {file for path in named.values() for file in files_of(path)}
    return [path.name for path in files_in(folder) if path not in read]


def fit_error(task: Task, path: Path, data: Data) -> DataError | None:
    """Return why a file does not fit a task, or None if it fits."""
    try:
        dataset.open_split(path, task, data)
    except DataError as error:
        return error
    return None


def guess_task(task: Task, path: Path, data: Data) -> tuple[Task | None, DataError | None]:
    """Return the first task that fits a file, or None and the error of the given task.

    Besides the given task, these are tried: translation (parallel files), fill-mask (plain text), text-generation
    (conversations) and token-classification. CoNLL files could also be read as texts with classes, so
    token-classification is tried first for them.
    """
    if data.columns:
        return task, None
    if not path.exists() and len(sides := list(sides_of(path))) == 2:
        keys = dict(zip(("source_lang", "target_lang"), sides, strict=True))
        return _task("translation", **keys), None
    if holds_text(path):
        return _task("fill-mask"), None
    tagged = _task("token-classification")
    misfit = fit_error(task, path, data)
    if misfit is not None and _holds_conversations(path, data):
        return _task("text-generation"), None
    first_tagged = misfit is not None or format_of(path, tagged=True) == "conll"
    if first_tagged and fit_error(tagged, path, data) is None:
        return tagged, None
    return (task, None) if misfit is None else (None, misfit)


def _task(name: str, **keys: Any) -> Task:
    """Return a task by name, with these recipe keys."""
    return cast(Task, registry.get("task", name)(**keys))


def _holds_conversations(path: Path, data: Data) -> bool:
    """Return whether a file has columns for messages, or for questions and answers."""
    chats = _task("text-generation")
    try:
        names = dataset.open_split(path, chats, data).table.columns
    except DataError:
        return False
    return has_conversation_columns(names)


def open_file(name: str, path: Path, task: Task | None, data: Data) -> File:
    """Open a file as rows of a task, or as rows without a task.

    Raises:
        DataError: the file cannot be read.
    """
    if task is None:
        return _open_without_task(name, path, data)
    table = dataset.open_split(path, task, data).table
    names: Sequence[Column] = list(table.columns.values())
    if table.format not in ("text", "conll", "parallel"):
        names, _ = read_raw(path, header=all(isinstance(column, str) for column in names))
    return File(
        name,
        table.display_path,
        names,
        table.raw_rows,
        table.parse_row,
        dict(table.columns),
        task.columns,
        data.limit,
        table.note,
        path,
    )


TASKLESS_COLUMNS = (schema.Column("text", "text", required=False), schema.Column("rest", "value", required=False))
"""The columns of rows without a task."""


def _open_without_task(name: str, path: Path, data: Data) -> File:
    names, rows = read_raw(path)
    text_columns = _text_columns(rows)

    def parse_row(raw: RawRow | BadRow) -> Row | BadRow:
        return _taskless_row(path, raw, text_columns)

    return File(name, path, names, rows, parse_row, {}, TASKLESS_COLUMNS, data.limit)


def _text_columns(rows: Rows) -> frozenset[Column]:
    """Return the columns of longer texts that mostly differ from row to row."""
    sample = [raw.values for raw in islice(rows(), SAMPLE_ROWS) if isinstance(raw, RawRow)]
    text_columns = set()
    for name in {name for values in sample for name in values}:
        texts = [_as_text(values[name]) for values in sample if values.get(name)]
        long_enough = sum(map(len, texts)) >= 4 * len(texts)
        if long_enough and len(set(texts)) >= 0.2 * len(texts) and not all(text.isdigit() for text in texts):
            text_columns.add(name)
    return frozenset(text_columns)


def _as_text(value: object) -> str:
    return str(value) if isinstance(value, str | list | dict) else ""


def _taskless_row(path: Path, raw: RawRow | BadRow, text_columns: frozenset[Column]) -> Row | BadRow:
    """Convert a row without a task: its text columns are joined into `text`, all others into `rest`."""
    if isinstance(raw, BadRow):
        return raw
    text = "\n".join(part for name, value in raw.values.items() if name in text_columns and (part := _as_text(value)))
    others = (value for name, value in raw.values.items() if name not in text_columns and value is not None)
    rest = " | ".join(map(str, others))
    if not text.strip() and not rest.strip(" |"):
        return BadRow(raw.line, "empty row", "remove the row", "empty row")
    return Row(f"{path}:{raw.line}", {role: value for role, value in (("text", text), ("rest", rest)) if value})


def row_texts(row: Row, columns: schema.Columns) -> list[str]:
    """Return the inputs of a row as texts."""
    words = schema.of_kind(columns, "words")
    if words is not None and isinstance(tokens := row.values.get(words.name), list):
        return [" ".join(map(str, tokens))]
    if schema.of_kind(columns, "messages") is not None and (content := all_content(row)) is not None:
        return [content]
    names = (column.name for column in inputs_of(columns) if column.kind == "text")
    return [str(row.values[name]) for name in names if name in row.values]


def row_text(row: Row, columns: schema.Columns) -> str:
    """Return the inputs of a row as one text."""
    return "\n".join(row_texts(row, columns))


def display_text(row: Row, columns: schema.Columns) -> str:
    """Return the inputs of a row as one text, or all its values if it has no text."""
    return row_text(row, columns) or " | ".join(str(value) for value in row.values.values())
