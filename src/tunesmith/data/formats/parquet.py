"""Parquet, in record batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.data.formats.raw import BadRow, RawRow
from tunesmith.errors import DataError

BATCH_ROWS = 1024


def open_rows(path: Path) -> tuple[list[str], Callable[[], Iterator[RawRow | BadRow]], list[list[str]]]:
    """Column names and a fresh reader. `line` is the row's number."""
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"a damaged Parquet file ({str(error).splitlines()[0][:80]})", where=str(path)) from None
    return names, lambda: _rows(path), []


def _rows(path: Path) -> Iterator[RawRow | BadRow]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            for values in batch.to_pylist():
                number += 1
                yield RawRow(number, values)
