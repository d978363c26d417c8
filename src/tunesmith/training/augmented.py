"""Data augmentation: the training split of each epoch, with its texts changed and encoded again."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

from tunesmith.data.columns import inputs_of, of_kind
from tunesmith.data.encoded import Encoded, Fields, encode
from tunesmith.data.formats import Row
from tunesmith.data.text.augment import Augmenter
from tunesmith.errors import DataError, RecipeError
from tunesmith.tasks import BoundTask
from tunesmith.training.dataset import Examples


def check_augmentable(examples: Examples, bound: BoundTask) -> None:
    """Refuse augmentation of rows that have no text, or no tagged words.

    Raises:
        RecipeError: `data.augment` has nothing to change.
    """
    task, columns = examples.task, examples.splits["train"].table.columns
    words = of_kind(task.columns, "words")
    texts = [column.name for column in inputs_of(task.columns) if column.kind == "text"]
    if words is not None and words.name not in columns:
        what = f"data.augment: {task.name} augments tagged words, and this data has none"
        raise RecipeError(what, hint="`tunesmith data convert` converts spans to tagged words; or leave the key out")
    if words is None and not any(name in columns for name in texts):
        what = f"data.augment: {task.name} augments single texts, and this data has none"
        raise RecipeError(what, hint="leave the key out")
    if not bound.rows_are_examples:
        raise RecipeError("data.augment: blocks of raw text are not augmented", hint="leave the key out")


class Augmented:
    """The training split of an epoch, with changed texts. One epoch is on disk at a time, in a temporary folder."""

    def __init__(
        self,
        examples: Examples,
        bound: BoundTask,
        seed: int,
        cache: Path,
        back_translations: Mapping[str, str] | None = None,
    ) -> None:
        check_augmentable(examples, bound)
        self._split, self._bound, self._cache = examples.splits["train"], bound, cache
        steps = examples.data.augment or ()
        self._augmenter = Augmenter.of(steps, seed, examples.task.columns, back_translations)
        self._current: tuple[int, Encoded] | None = None

    def __call__(self, epoch: int) -> Encoded:
        """Return the encoded examples of an epoch, counted from 0."""
        if self._current is None or self._current[0] != epoch:
            self._current = None  # deletes the folder of the epoch before
            self._cache.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=".augmented-", dir=self._cache))
            rows = enumerate(self._split.rows())
            try:
                encoded = encode(rows, lambda chunk: self._encode(chunk, epoch), folder / "train", self._bound.costs)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            weakref.finalize(encoded, shutil.rmtree, folder, ignore_errors=True)
            self._current = epoch, encoded
        return self._current[1]

    def _encode(self, rows: list[tuple[int, Row]], epoch: int) -> list[Fields]:
        augmented = [self._augmenter.row(row, epoch, index) for index, row in rows]
        try:
            return self._bound.encode(augmented)
        except DataError:  # an augmented text without tokens: such a row keeps its original text
            return [self._encode_row(new, row) for new, (_, row) in zip(augmented, rows, strict=True)]

    def _encode_row(self, augmented: Row, original: Row) -> Fields:
        try:
            return self._bound.encode([augmented])[0]
        except DataError:
            return self._bound.encode([original])[0]
