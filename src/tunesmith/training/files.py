"""Files that are whole or absent: written beside, fsynced, renamed; and lines appended one write each."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from tunesmith.errors import ResourceError


def fsync_folder(folder: Path) -> None:
    """Make a rename inside the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Force a finished file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader sees the old or the new one, never a part.

    Raises:
        ResourceError: no space left.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise out_of_space(error, path, len(content)) from error


def out_of_space(error: OSError, path: Path, needed_bytes: int) -> Exception:
    """The error as the user's, where it is one of a full disk; else as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return error
    return ResourceError(
        f"cannot write {needed_bytes:,} bytes ({os.strerror(error.errno)}; {free_bytes(path):,} bytes free)",
        where=str(path),
        hint="make room and resume: what was saved before is untouched",
    )


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where `path` lies."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON object as one line, in one write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a last line that was not finished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            break
        if values.get("step", 0) > step:
            break
        kept.append(line + "\n")
    atomic_write(path, "".join(kept))
