"""Parquet, streamed in record batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.data.formats.raw import BadRow, OpenedFile, RawRow
from tunesmith.errors import DataError

BATCH_ROWS = 1024


def open_rows(path: Path) -> OpenedFile:
    """Open a file: its column names, and a reader. `line` is the row's number.

    Raises:
        DataError: the file is damaged.
    """
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None
    return OpenedFile(names, lambda: _rows(path))


def _rows(path: Path) -> Iterator[RawRow | BadRow]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(number, values)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    why = (str(error).splitlines() or [type(error).__name__])[0][:80]
    return DataError(f"damaged Parquet file ({why})", where=str(path), hint="write or download it again")
