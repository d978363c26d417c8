"""Encoded examples: one array per field, with offsets where the first dimension varies between examples.

The same class holds examples in memory (for inference) and in memory-mapped files (for training). The files are a
cache: their folder is named by a hash of its content. They allow data larger than memory, and resuming at any example.
A folder is written under a temporary name and then renamed, so that it is complete or absent. A folder whose files were
truncated by a power failure is written again.

`encode_rows` returns a field as one of:

    7, 0.5                    one number per example: an index (int64 in a batch), or float32
    [3, 1, 4], [0.5, 1.0]     a list: ragged, indices or float32
    np.ndarray                an array of the same shape for every example, in its own dtype (uint8 stays uint8)
    VariableLength(array)     an array whose first dimension varies between examples, in its own dtype
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

CHUNK_ROWS = 1024
SCHEMA = 4
Array = NDArray[Any]
RowT = TypeVar("RowT")
Fields = dict[str, Any]
"""One example: field -> value."""


class VariableLength(NamedTuple):
    """An array whose first dimension varies between examples."""

    array: Array


@dataclass(frozen=True)
class Field:
    """The layout of a field. `shape` is the shape of one element if the field is ragged, else of one example."""

    dtype: str
    shape: tuple[int, ...] = ()
    ragged: bool = False
    is_index: bool = False
    """True if the field holds indices, which a batch converts to int64 as PyTorch requires."""


class Encoded:
    """Read-only set of encoded examples.

    `key` identifies the content (the folder's name) and is empty for examples in memory. `costs` has the cost units
    of each example (tokens, pixels), as computed by the task.
    """

    def __init__(
        self, size: int, fields: Mapping[str, Field], values: dict[str, Array], offsets: dict[str, Array], key: str = ""
    ) -> None:
        self.size, self.fields, self.key = size, dict(fields), key
        self._values, self._offsets = values, offsets
        self.costs: Array = np.ones(size, dtype=np.int64)  # (examples,)

    @classmethod
    def open(cls, folder: Path) -> Encoded:
        """Memory-map the files of a folder written by `encode`."""
        about = json.loads((folder / "fields.json").read_text(encoding="utf-8"))
        fields = {name: Field(**{**field, "shape": tuple(field["shape"])}) for name, field in about["fields"].items()}
        values, offsets = {}, {}
        for name, field in fields.items():
            values[name] = _map(folder / f"{name}.values", field.dtype).reshape(-1, *field.shape)
            if field.ragged:
                offsets[name] = _map(folder / f"{name}.offsets", "int64")
        return cls(about["size"], fields, values, offsets, folder.name)

    def __len__(self) -> int:
        return self.size

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def column(self, name: str) -> Array:
        """Return all values of a field: (examples, ...), or (sum of lengths, ...) if it is ragged."""
        return self._values[name]

    def offsets(self, name: str) -> Array:
        """Start of each example in a ragged field, and the end of the last."""  # (examples + 1,)
        return self._offsets[name]

    def lengths(self, name: str) -> Array:
        """Return the length of each example in a ragged field."""  # (examples,)
        return np.diff(self._offsets[name])

    def take(self, indices: Sequence[int] | Array) -> dict[str, tuple[Array, Array | None]]:
        """Return the examples at `indices`: field -> (values, offsets starting at 0; None if not ragged)."""
        taken: dict[str, tuple[Array, Array | None]] = {}
        for name, field in self.fields.items():
            values = self._values[name]
            if not field.ragged:
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
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # slicing a plain array is faster than slicing a memmap


Costs = Callable[[Encoded], Array]
"""Examples -> the cost units of each."""


def _with_costs(encoded: Encoded, costs: Costs | None) -> Encoded:
    if costs is not None and len(encoded):
        encoded.costs = costs(encoded)
    return encoded


def encode(
    rows: Iterable[RowT],
    encode_rows: Callable[[list[RowT]], list[Fields]],
    folder: Path,
    costs: Costs | None = None,
) -> Encoded:
    """Encode `rows` in chunks into `folder`, or open the folder if it already exists."""
    if not _is_complete(folder):
        writing = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        try:
            _write(_chunks(rows, encode_rows), writing)
            _put_in_place(writing, folder)
        finally:
            shutil.rmtree(writing, ignore_errors=True)
    return _with_costs(Encoded.open(folder), costs)


def encode_in_memory(
    rows: Iterable[RowT], encode_rows: Callable[[list[RowT]], list[Fields]], costs: Costs | None = None
) -> Encoded:
    """Encode `rows` in chunks; nothing is written to disk."""
    fields: dict[str, Field] = {}
    size = 0
    values: dict[str, list[Array]] = {}
    lengths: dict[str, list[int]] = {}
    for chunk in _chunks(rows, encode_rows):
        fields = fields or _layout(chunk)
        for name, field in fields.items():
            flat, chunk_lengths = _packed(name, field, [row[name] for row in chunk])
            values.setdefault(name, []).append(flat)
            lengths.setdefault(name, []).extend(chunk_lengths)
        size += len(chunk)
    offsets = {name: np.cumsum([0, *lengths[name]]) for name, field in fields.items() if field.ragged}
    joined = {name: np.concatenate(parts) for name, parts in values.items()}
    return _with_costs(Encoded(size, fields, joined, offsets), costs)


def _is_complete(folder: Path) -> bool:
    """Return whether all files exist with the sizes recorded in `fields.json`."""
    try:
        sizes = json.loads((folder / "fields.json").read_text(encoding="utf-8"))["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _put_in_place(writing: Path, folder: Path) -> None:
    if _is_complete(folder):  # another process was faster
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        writing.rename(folder)
    except OSError:
        if not _is_complete(folder):
            raise


def _chunks(rows: Iterable[RowT], encode_rows: Callable[[list[RowT]], list[Fields]]) -> Iterator[list[Fields]]:
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK_ROWS)):
        if fields := encode_rows(chunk):
            yield fields


def _write(chunks: Iterable[list[Fields]], folder: Path) -> None:
    fields: dict[str, Field] = {}
    ends: dict[str, int] = {}
    size = 0
    for chunk in chunks:
        if not fields:
            fields = _layout(chunk)
            for name in (name for name, field in fields.items() if field.ragged):
                _append(folder / f"{name}.offsets", np.zeros(1, dtype=np.int64))
        for name, field in fields.items():
            flat, lengths = _packed(name, field, [row[name] for row in chunk])
            _append(folder / f"{name}.values", flat)
            if field.ragged:
                offsets = ends.get(name, 0) + np.cumsum(lengths, dtype=np.int64)
                _append(folder / f"{name}.offsets", offsets)
                ends[name] = int(offsets[-1])
        size += len(chunk)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    about = {"size": size, "fields": {name: asdict(field) for name, field in fields.items()}, "bytes": sizes}
    (folder / "fields.json").write_text(json.dumps(about), encoding="utf-8")


def _layout(chunk: list[Fields]) -> dict[str, Field]:
    return {name: _field(value, [row[name] for row in chunk]) for name, value in chunk[0].items()}


def _field(value: Any, column: list[Any]) -> Field:
    if isinstance(value, VariableLength):
        return Field(value.array.dtype.name, value.array.shape[1:], ragged=True)
    if isinstance(value, np.ndarray):
        return Field(value.dtype.name, value.shape)
    dtype = _dtype(column)
    return Field(dtype, ragged=isinstance(value, list), is_index=dtype == "int32")


def _packed(name: str, field: Field, column: list[Any]) -> tuple[Array, list[int]]:
    """Return the values of a chunk as one array, and the length of each example if the field is ragged."""
    if isinstance(column[0], VariableLength):
        arrays = [value.array for value in column]
        _check_same_layout(name, field, ((array.dtype.name, array.shape[1:]) for array in arrays))
        flat = np.concatenate(arrays)
    elif isinstance(column[0], np.ndarray):
        _check_same_layout(name, field, ((array.dtype.name, array.shape) for array in column))
        return np.stack(column), []
    else:
        assert field.dtype == _dtype(column) or field.dtype == "float32", f"{name}: floats after a chunk of integers"
        arrays = column
        flat = np.concatenate([np.asarray(value) for value in column]) if field.ragged else np.asarray(column)
    return flat.astype(field.dtype, copy=False), [len(value) for value in arrays] if field.ragged else []


def _check_same_layout(name: str, field: Field, layouts: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    others = set(layouts) - {(field.dtype, field.shape)}
    assert not others, f"{name}: dtype and shape {others}, not {(field.dtype, field.shape)} as in the first example"


def _dtype(values: list[Any]) -> str:
    """Return float32 if any number is a float, else int32."""
    kinds = {np.asarray(value).dtype.kind for value in values if np.size(value)}
    return "float32" if "f" in kinds else "int32"


def _append(path: Path, values: Array) -> None:
    with path.open("ab") as file:
        file.write(values.tobytes())


def fingerprint(*parts: object) -> str:
    """Return a short content hash of JSON-like values, for cache keys."""
    text = json.dumps([SCHEMA, *parts], sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """Return `file_sha256`, cached in this process while size and modification time stay the same."""
    about = path.stat()
    return _sha256_of(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=32)
def _sha256_of(path: Path, size: int, modified_ns: int) -> str:
    return file_sha256(path)
