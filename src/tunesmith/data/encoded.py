"""Encoded examples as memory-mapped flat arrays with offsets.

One mechanism gives the cache (a folder named by a hash of its content), data larger than memory, and resuming at any
example. A folder is complete or absent: it is written beside and renamed, and one that a power cut has emptied since
is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

CHUNK_ROWS = 1024
SCHEMA = 2
Array = NDArray[Any]
RowT = TypeVar("RowT")


class Encoded:
    """A read-only set of encoded examples. `fields` maps a name to whether it is ragged (varies in length)."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "fields.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.size: int = about["size"]
        self.fields: dict[str, bool] = {name: field["ragged"] for name, field in about["fields"].items()}
        self._values: dict[str, Array] = {}
        self._offsets: dict[str, Array] = {}
        for name, field in about["fields"].items():
            self._values[name] = _map(folder / f"{name}.values", field["dtype"])
            if field["ragged"]:
                self._offsets[name] = _map(folder / f"{name}.offsets", "int64")

    def __len__(self) -> int:
        return self.size

    @cached_property
    def lengths(self) -> Array:
        """Tokens of each example: what `length` says, else the lengths of the first ragged field."""  # (examples,)
        if "length" in self.fields:
            return np.asarray(self._values["length"], dtype=np.int64)
        for name, ragged in self.fields.items():
            if ragged:
                return np.diff(self._offsets[name])
        return np.ones(self.size, dtype=np.int64)

    def column(self, name: str) -> Array:
        """All values of a field, flat."""
        return self._values[name]

    def offsets(self, name: str) -> Array:
        """Where the examples begin in a ragged field, and where it ends."""  # (examples + 1,)
        return self._offsets[name]

    def take(self, indices: Sequence[int] | Array) -> dict[str, tuple[Array, Array | None]]:
        """The examples at `indices`: field -> (flat values, offsets starting at 0; None where not ragged)."""
        taken: dict[str, tuple[Array, Array | None]] = {}
        for name, ragged in self.fields.items():
            values = self._values[name]
            if not ragged:
                taken[name] = (values[indices], None)
                continue
            offsets = self._offsets[name]
            parts = [values[offsets[i] : offsets[i + 1]] for i in indices]
            flat = np.concatenate([values[:0], *parts])
            taken[name] = (flat, np.cumsum([0, *(len(part) for part in parts)]))
        return taken


def _map(path: Path, dtype: str) -> Array:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # the subclass costs a microsecond a slice


def encode(rows: Iterable[RowT], encode_rows: Callable[[list[RowT]], list[dict[str, Any]]], folder: Path) -> Encoded:
    """Encode `rows` in chunks into `folder`, or open the folder where it is there already."""
    if not _is_whole(folder):
        writing = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        try:
            _write(_chunks(rows, encode_rows), writing)
            _put_in_place(writing, folder)
        finally:
            shutil.rmtree(writing, ignore_errors=True)
    return Encoded(folder)


def _is_whole(folder: Path) -> bool:
    """Whether all files are there in the sizes that were written."""
    try:
        sizes = json.loads((folder / "fields.json").read_text(encoding="utf-8"))["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _put_in_place(writing: Path, folder: Path) -> None:
    if _is_whole(folder):  # another process was faster
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        writing.rename(folder)
    except OSError:
        if not _is_whole(folder):
            raise


def _chunks(
    rows: Iterable[RowT], encode_rows: Callable[[list[RowT]], list[dict[str, Any]]]
) -> Iterator[list[dict[str, Any]]]:
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield encode_rows(chunk)


def _write(chunks: Iterable[list[dict[str, Any]]], folder: Path) -> None:
    fields: dict[str, dict[str, Any]] = {}
    ends: dict[str, int] = {}
    size = 0
    for chunk in chunks:
        for name, value in chunk[0].items() if not fields else ():
            fields[name] = {"ragged": np.ndim(value) == 1, "dtype": _dtype([row[name] for row in chunk])}
            if fields[name]["ragged"]:
                _append(folder / f"{name}.offsets", np.zeros(1, dtype=np.int64))
        for name, field in fields.items():
            column = [row[name] for row in chunk]
            flat = np.concatenate([np.asarray(value) for value in column]) if field["ragged"] else np.asarray(column)
            assert field["dtype"] == _dtype(column) or field["dtype"] == "float32", f"{name} has fractions only now"
            _append(folder / f"{name}.values", flat.astype(field["dtype"]))
            if field["ragged"]:
                offsets = ends.get(name, 0) + np.cumsum([len(value) for value in column], dtype=np.int64)
                _append(folder / f"{name}.offsets", offsets)
                ends[name] = int(offsets[-1])
        size += len(chunk)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    about = {"size": size, "fields": fields, "bytes": sizes}
    (folder / "fields.json").write_text(json.dumps(about), encoding="utf-8")


def _dtype(values: list[Any]) -> str:
    dtypes = {np.asarray(value).dtype for value in values if np.size(value)}
    if dtypes == {np.dtype("int16")}:  # numbers in bf16, as they are
        return "int16"
    return "float32" if any(dtype.kind == "f" for dtype in dtypes) else "int32"


def _append(path: Path, values: Array) -> None:
    with path.open("ab") as file:
        file.write(values.tobytes())


def fingerprint(*parts: object) -> str:
    """A short content hash of JSON-like values, for cache keys."""
    text = json.dumps([SCHEMA, *parts], sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """`file_sha256`, asked once in this process of a file that stays as it is."""
    about = path.stat()
    return _sha256_of(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=32)
def _sha256_of(path: Path, size: int, modified_ns: int) -> str:
    return file_sha256(path)
