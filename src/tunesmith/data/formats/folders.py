"""What a folder holds: which files are data, by their endings or by what is in them, and which is which split."""

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
_TEXTS = (".csv", ".tsv", ".txt", ".jsonl", ".json", ".ndjson", ".conll", ".bio", ".iob", ".iob2", ".bioes")
SUFFIXES = (".parquet", *_TEXTS, *(f"{suffix}.gz" for suffix in _TEXTS))
MAX_NAMES = 6


def is_folder(path: str | Path) -> bool:
    """Whether this is a folder.

    Raises:
        DataError: it cannot be seen.
    """
    try:
        return stat.S_ISDIR(Path(path).stat().st_mode)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise unreachable_error(Path(path), error) from None


def holds_text(path: Path) -> bool:
    """Whether a file is plain text, or a folder holds such and no other data, as far as that can be seen without
    knowing what it is for; what is named a table is none.
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
    """The files right in a folder but hidden ones and those that tell about it, such as a readme.

    Raises:
        DataError: it cannot be read.
    """
    try:
        paths = sorted(Path(folder).iterdir())
    except OSError as error:
        raise unreachable_error(Path(folder), error) from None
    return [path for path in paths if path.is_file() and not plain.is_documentation(path, within=Path(folder))]


def data_files(folder: str | Path) -> list[Path]:
    """Those that can be read: by their ending, else by what is in them, if that is no prose."""
    return [path for path in files_in(folder) if path.name.lower().endswith(SUFFIXES) or _is_table(path)]


def _is_table(path: Path) -> bool:
    """Whether there are rows in it for all its ending says: words with tags, objects, or columns."""
    try:
        if format_of(path, tagged=True) not in ("csv", "tsv"):
            return True
        with open_text(path) as file:
            return looks_like_table(file.read(SAMPLE_CHARS))
    except DataError:
        return False


def find_splits(folder: str | Path, *, pairs: bool = False) -> dict[str, Path]:
    """The files of a folder that are named train, validation (valid, val, dev, eval) and test; with `pairs` also files
    of several languages, under what they share, which may go on behind the split's name (`test_2016_flickr`). Where no
    file is named so, one of these words in the name counts, if each file has one of its own.

    Raises:
        DataError: two files claim to be the same split.
    """
    files = files_in(folder)
    named = {path: path.name.lower().partition(".")[0] for path in files if path.name.lower().endswith(SUFFIXES)}
    stems = parallel.stems_in(Path(folder)) if pairs else ()
    named |= {Path(folder, stem): re.split(r"[._-]", stem.lower())[0] for stem in stems}
    found: dict[str, Path] = {}
    for path, stem in named.items():
        for split in _splits_of([stem]):
            if split in found:
                what = f"both {found[split].name} and {path.name} are {split}"
                raise DataError(what, where=str(folder), hint="name the one to use")
            found[split] = path
    return found or _by_words_in_names(data_files(folder))


def _by_words_in_names(files: Collection[Path]) -> dict[str, Path]:
    """As in `wnut17train.conll`, `emerging.dev.conll`, `weiboNER_2nd_conll.test`; nothing where that is not clear of
    all: a contract about training is not meant.
    """
    claims = [(split, path) for path in files for split in _splits_of(re.findall("[a-z]+", path.name.lower()))]
    found = dict(claims)
    clear = len(claims) == len(found) == len(set(found.values())) == len(files)
    return found if clear and "train" in found and len(files) > 1 else {}


def _splits_of(words: Collection[str]) -> list[str]:
    return [split for split, names in SPLIT_NAMES.items() if not set(names).isdisjoint(words)]


def no_train_error(folder: str | Path) -> DataError:
    """What to say of a folder in which no file is known to be train."""
    readable = data_files(folder)
    names = [path.name for path in readable or files_in(folder)]
    listed = f"{', '.join(names[:MAX_NAMES])}{' ...' if len(names) > MAX_NAMES else ''}"
    what = "no train file in this folder"
    if not names:
        return DataError(what, where=str(folder), hint="name it train.csv, or give the file")
    if not readable:
        hint = "task=translation reads files of two languages" if parallel.stems_in(Path(folder)) else "give a table"
        return DataError(f"{what}, and nothing else to be read: {listed}", where=str(folder), hint=hint)
    ways = f"call one train{readable[0].suffix}, others validation and test, or data.train={readable[0]}"
    return DataError(f"{what}, but {listed}", where=str(folder), hint=ways)
