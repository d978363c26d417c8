"""One format into another: `tunesmith data convert reviews.csv reviews.jsonl`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.formats import read_raw
from tunesmith.data.formats.json_values import list_in
from tunesmith.data.formats.raw import BadRow, RawRow, Rows
from tunesmith.data.formats.write import WRITERS, format_by_name, write_table
from tunesmith.errors import DataError, RecipeError, did_you_mean
from tunesmith.training.files import out_of_space


def convert(
    source: str | Path, output: Path, *, to: str | None = None, header: bool | None = None, skip: bool = False
) -> dict[str, Any]:
    """Rows written, columns, and what was skipped. `header`: whether the first line names the columns (default: seen).

    Columns without a name are called `column_0` and so on. A row that cannot be read stops it, unless `skip`.

    Raises:
        RecipeError: no such format, or there is a file already.
        DataError: the source or a row of it cannot be read, or the format cannot hold it.
    """
    kind = to or format_by_name(output)
    if kind not in WRITERS:
        raise RecipeError(f"--to: no format {kind}", hint=did_you_mean(kind, WRITERS))
    if output.exists():
        raise RecipeError("there is a file already, and it is not overwritten", where=str(output), hint="name another")
    if not output.absolute().parent.is_dir():
        raise RecipeError("there is no such folder", where=str(output.parent), hint="make it first")
    columns, raw_rows = read_raw(source, header)
    names = {column: f"column_{column}" if isinstance(column, int) else column for column in columns}
    lists = _of_lists(raw_rows)
    skipped, count = Counter[str](), 0

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal count
        skipped.clear()
        count = 0
        for raw in raw_rows():
            place = f"{Path(source, raw.file)}:{raw.line}"
            if not isinstance(raw, BadRow):
                count += 1
                values = {**raw.values, **{column: list_in(raw.values.get(column)) for column in lists}}
                yield place, {names[column]: value for column, value in values.items()}
            elif skip:
                skipped[raw.reason] += 1
            else:
                raise DataError(raw.what, where=place, hint=f"{raw.hint or 'mend it'}, or --skip-bad-rows")

    writing = output.with_name(f".tmp-{os.getpid()}-{output.name}")
    try:
        write_table(writing, kind, list(names.values()), rows)
        output.open("x").close()  # unlike a rename it fails where there is a file by now
        writing.replace(output)
    except FileExistsError:
        raise RecipeError("there is a file by now, and it is not overwritten", where=str(output)) from None
    except DataError as error:
        raise DataError(error.what, where=error.where or str(source), hint=error.hint) from None
    except OSError as error:
        raise out_of_space(error, output) from error
    finally:
        writing.unlink(missing_ok=True)
    about = {"input": str(source), "output": str(output), "format": kind, "rows": count}
    return about | {"columns": list(names.values()), "skipped": dict(skipped)}


def _of_lists(rows: Rows) -> list[Any]:
    """The columns whose cells are lists or objects written as JSON, as they stand in a table of texts."""
    found: dict[Any, bool] = {}
    for raw in rows():
        for column, value in raw.values.items() if isinstance(raw, RawRow) else ():
            if value and found.get(column, True):
                found[column] = isinstance(value, str) and not isinstance(list_in(value), str)
    return [column for column, is_list in found.items() if is_list]
