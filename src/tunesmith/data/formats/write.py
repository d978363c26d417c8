"""Writers of tables, one per format; a new format is added to `WRITERS`."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.data.formats.conll import DOCUMENT_MARK
from tunesmith.data.formats.parquet import BATCH_ROWS
from tunesmith.errors import DataError, RecipeError, did_you_mean, shorten

RowReader = Callable[[], Iterator[tuple[str, dict[str, Any]]]]
"""A function that reads the rows from the beginning, each with its place."""


def format_by_name(path: Path) -> str:
    """Return the output format from the suffix of a file name.

    Raises:
        RecipeError: the suffix is no known format.
    """
    suffixes = [suffix.lower().lstrip(".") for suffix in path.suffixes if suffix.lower() != ".gz"]
    name = {"ndjson": "jsonl"}.get(suffixes[-1], suffixes[-1]) if suffixes else ""
    if name not in WRITERS:
        hint = f"set --to FORMAT; {did_you_mean('', WRITERS)}"
        raise RecipeError(f"no known output format in the name {path.name}", where=str(path), hint=hint)
    return name


def write_table(path: Path, kind: str, names: Sequence[str], rows: RowReader) -> None:
    """Write all rows with the columns `names`, gzip-compressed if the file name ends in `.gz`.

    Raises:
        DataError: the format cannot represent a value.
    """
    WRITERS[kind](path, names, rows)


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    if path.name.lower().endswith(".gz"):
        with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
            yield file
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            yield file


def _write_delimited(delimiter: str) -> Callable[[Path, Sequence[str], RowReader], None]:
    def write(path: Path, names: Sequence[str], rows: RowReader) -> None:
        with _text(path) as file:
            writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
            writer.writerow(names)
            for _, row in rows():
                writer.writerow([_cell(row.get(name)) for name in names])

    return write


def _cell(value: Any) -> Any:
    """Convert a value to a cell: lists and objects become JSON, None stays None."""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=_plain)
    return value if value is None or isinstance(value, str | int | float) else _plain(value)


def _plain(value: Any) -> Any:
    """Convert a Parquet value that JSON cannot represent."""
    return float(value) if isinstance(value, Decimal) else str(value)


def _json(row: dict[str, Any]) -> str:
    kept = {name: None if value != value else value for name, value in row.items()}  # JSON has no NaN
    return json.dumps(kept, ensure_ascii=False, default=_plain)


def _write_json_lines(path: Path, names: Sequence[str], rows: RowReader) -> None:
    with _text(path) as file:
        for _, row in rows():
            file.write(f"{_json(row)}\n")


def _write_json_array(path: Path, names: Sequence[str], rows: RowReader) -> None:
    with _text(path) as file:
        file.write("[")
        for count, (_, row) in enumerate(rows(), start=1):
            file.write(f"{',' if count > 1 else ''}\n{_json(row)}")
        file.write("\n]\n")


def _write_parquet(path: Path, names: Sequence[str], rows: RowReader) -> None:
    """Write in two passes: the type of each column, then the values."""
    try:
        kinds = [pa.Table.from_pylist(part, schema=None).schema for part in _filled(rows(), names)]
        schema = pa.unify_schemas(kinds, promote_options="permissive")
        with pq.ParquetWriter(path, schema) as writer:
            for part in _filled(rows(), names):
                writer.write_table(pa.Table.from_pylist(part, schema=schema))
    except (pa.ArrowException, OverflowError) as error:
        why = str(error).splitlines()[0][:120]
        hint = "a Parquet column has a single type: write jsonl, or correct the values"
        raise DataError(f"Parquet cannot hold these rows ({why})", hint=hint) from None


def _filled(rows: Iterable[tuple[str, dict[str, Any]]], names: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    rows = iter(rows)
    while part := list(islice(rows, BATCH_ROWS)):
        yield [{name: row.get(name) for name in names} for _, row in part]


def _write_conll(path: Path, names: Sequence[str], rows: RowReader) -> None:
    """Write one word per line with its other columns, the tag last, and a blank line after each sentence."""
    with _text(path) as file:
        for place, row in rows():
            columns = [row.get(name) for name in names]
            if not all(isinstance(column, list) and len(column) == len(columns[0] or ()) for column in columns):
                what = f"{', '.join(names)} are not lists of equal length"
                raise DataError(what, where=place, hint="CoNLL needs one value per word in each column")
            for parts in zip(*columns, strict=True):  # type: ignore[arg-type]
                if str(parts[0]).startswith(DOCUMENT_MARK):
                    what = f"the word {shorten(parts[0])} begins like a document separator"
                    raise DataError(what, where=place, hint="remove the word, or write jsonl")
                if any(not str(part).strip() or set(str(part)) & set(" \t\n\r") for part in parts):
                    what = f"{shorten(parts)} has an empty value, a space, a tab or a line end"
                    raise DataError(what, where=place, hint="split the word, or write jsonl")
                file.write("\t".join(map(str, parts)) + "\n")
            file.write("\n")


WRITERS: dict[str, Callable[[Path, Sequence[str], RowReader], None]] = {
    "csv": _write_delimited(","),
    "tsv": _write_delimited("\t"),
    "jsonl": _write_json_lines,
    "json": _write_json_array,
    "parquet": _write_parquet,
    "conll": _write_conll,
}
