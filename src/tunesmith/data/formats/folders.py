"""Data files of a folder, recognized by suffix or content, and their splits, recognized by file name."""

from __future__ import annotations

import re
import stat
from collections.abc import Collection
from pathlib import Path

from tunesmith.data.columns import Column
from tunesmith.data.formats import parallel, plain
from tunesmith.data.formats.columns import COMMON_NAMES
from tunesmith.data.formats.delimited import SAMPLE_CHARS, looks_like_table
from tunesmith.data.formats.raw import open_text
from tunesmith.data.formats.recognize import format_of, unreachable_error
from tunesmith.errors import DataError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel", "eval"),
    "test": ("test", "testing"),
}
_TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".json", ".ndjson", ".conll", ".bio", ".iob", ".iob2", ".bioes")
SUFFIXES = (".parquet", *_TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in _TEXT_SUFFIXES))
MAX_NAMES = 6
"""Maximum file names in an error message."""


def is_folder(path: str | Path) -> bool:
    """Return whether the path is a folder.

    Raises:
        DataError: the path cannot be accessed.
    """
    try:
        return stat.S_ISDIR(Path(path).stat().st_mode)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise unreachable_error(Path(path), error) from None


def holds_text(path: Path) -> bool:
    """Return whether a file is plain text, or a folder contains plain text and no other data.

    The answer does not depend on the task. Files named .csv or .tsv count as tables.
    """
    if is_folder(path):
        return bool(plain.texts_in(path)) and all(holds_text(file) for file in data_files(path))
    if path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        return False
    try:
        return format_of(path, tagged=True) in ("csv", "tsv") and plain.is_plain_text(
            path, [Column(name, "value") for name in COMMON_NAMES]
        )
    except DataError:
        return False


def files_in(folder: str | Path) -> list[Path]:
    """Return the files of a folder except hidden files and documentation such as a readme; subfolders are not searched.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        paths = sorted(Path(folder).iterdir())
    except OSError as error:
        raise unreachable_error(Path(folder), error) from None
    return [path for path in paths if path.is_file() and not plain.is_documentation(path, within=Path(folder))]


def data_files(folder: str | Path) -> list[Path]:
    """Return the files of a folder that have a known suffix or contain a table."""
    return [path for path in files_in(folder) if path.name.lower().endswith(SUFFIXES) or _is_table(path)]


def _is_table(path: Path) -> bool:
    """Return whether a file contains a table: CoNLL, JSON objects, Parquet, or delimited columns."""
    try:
        if format_of(path, tagged=True) not in ("csv", "tsv"):
            return True
        with open_text(path) as file:
            return looks_like_table(file.read(SAMPLE_CHARS))
    except DataError:
        return False


def find_splits(folder: str | Path, *, pairs: bool = False) -> dict[str, Path]:
    """Return split -> file for the files of a folder that are named train, validation (valid, val, dev, eval) or test.

    With `pairs`, the stem of parallel files counts too; it may have more words after the split (`test_2016_flickr`). If
    no file has such a name, a split's name inside a longer file name counts, as long as it is unambiguous.

    Raises:
        DataError: two files match the same split.
    """
    files = files_in(folder)
    named = {path: path.name.lower().partition(".")[0] for path in files if path.name.lower().endswith(SUFFIXES)}
    stems = parallel.stems_in(Path(folder)) if pairs else ()
    named |= {Path(folder, stem): re.split(r"[._-]", stem.lower())[0] for stem in stems}
    splits: dict[str, Path] = {}
    for path, stem in named.items():
        for split in _splits_of([stem]):
            if split in splits:
                what = f"both {splits[split].name} and {path.name} are named {split}"
                raise DataError(what, where=str(folder), hint=f"set data.{split} to the one to use")
            splits[split] = path
    return splits or _splits_inside_names(data_files(folder))


def _splits_inside_names(files: Collection[Path]) -> dict[str, Path]:
    """Return split -> file for names such as `wnut17train.conll`, `emerging.dev.conll`, `weiboNER_2nd_conll.test`.

    The result is empty unless each file matches exactly one split and no two files match the same.
    """
    matches = [(split, path) for path in files for split in _splits_of(re.findall("[a-z]+", path.name.lower()))]
    splits = dict(matches)
    unambiguous = len(matches) == len(splits) == len(set(splits.values())) == len(files)
    return splits if unambiguous and "train" in splits and len(files) > 1 else {}


def _splits_of(words: Collection[str]) -> list[str]:
    """Return the splits named by any of the words."""
    return [split for split, names in SPLIT_NAMES.items() if not set(names).isdisjoint(words)]


def no_train_error(folder: str | Path) -> DataError:
    """Return the error for a folder without a train file."""
    readable = data_files(folder)
    names = [path.name for path in readable or files_in(folder)]
    name_list = f"{', '.join(names[:MAX_NAMES])}{' ...' if len(names) > MAX_NAMES else ''}"
    what = "no train file in this folder"
    if not names:
        return DataError(what, where=str(folder), hint="name the file train.csv, or set data.train to a file")
    if not readable:
        parallel_hint = "set task=translation to read files of two languages"
        hint = parallel_hint if parallel.stems_in(Path(folder)) else "add a table (CSV, JSONL, Parquet)"
        return DataError(f"{what}, and no readable data: {name_list}", where=str(folder), hint=hint)
    hint = f"name one train{readable[0].suffix} (others validation and test), or set data.train={readable[0]}"
    return DataError(f"{what}, only {name_list}", where=str(folder), hint=hint)
