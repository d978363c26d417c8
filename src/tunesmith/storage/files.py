"""Atomic writes and appended lines: a reader sees a whole file or none.

A file is written beside its target, fsynced and renamed. A line is appended in one write.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tunesmith.errors import ResourceError

DISK_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
USER_ERRNOS = DISK_FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR}
"""Errors of the file system that the user, not the code, has to fix."""

MAX_ATTEMPTS = 100


def fsync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a rename inside it survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Flush a finished file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader sees the old content or the new, never a part of it.

    Raises:
        ResourceError: the disk is full or not writable.
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
        with contextlib.suppress(OSError):  # a disk that has become read-only refuses this too
            temporary.unlink(missing_ok=True)
        raise disk_error(error, path, len(content)) from error


def disk_error(error: OSError | SafetensorError, path: Path, needed_bytes: int | None = None) -> Exception:
    """Return a `ResourceError` if the disk is full, broken or not writable, and `error` itself otherwise."""
    code = error.errno if isinstance(error, OSError) else _parse_errno(str(error))
    if code not in USER_ERRNOS:
        return error
    reason = os.strerror(code).lower()
    what = reason if needed_bytes is None else f"cannot write {needed_bytes:,} bytes: {reason}"
    fix = "free some space" if code in DISK_FULL else "fix this"
    return ResourceError(
        f"{what} ({free_bytes(path):,} bytes free)",
        where=str(path),
        hint=f"{fix} and resume: everything saved so far is intact",
    )


def _parse_errno(text: str) -> int | None:
    """Return the error number in a message of safetensors: `I/O error: ... (os error 28)`."""
    match = re.search(r"\(os error (\d+)\)", text)
    return int(match[1]) if match else None


def free_bytes(path: Path) -> int:
    """Return how many bytes may still be written on the disk of `path`."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize


def make_folder(folder: Path) -> list[Path]:
    """Create a folder (mode 0700) and its parents; return those that did not exist, the innermost first.

    Other processes may create and remove the same folders meanwhile.

    Raises:
        ResourceError: the folder cannot be created.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return missing
        except OSError as error:
            if attempt < MAX_ATTEMPTS and _may_retry_mkdir(error):
                time.sleep(0.001)
                continue
            reason = f"cannot be created ({os.strerror(error.errno or 0).lower()})"
            raise ResourceError(reason, where=str(folder), hint="set another output=DIR") from error
    raise AssertionError("the last attempt returns or raises")


def _may_retry_mkdir(error: OSError) -> bool:
    """Return whether another process may have removed a folder between two system calls of `mkdir`."""
    if isinstance(error, FileNotFoundError):  # a parent was removed after it had been created
        return True
    if not isinstance(error, FileExistsError):
        return False
    try:
        mode = os.lstat(error.filename).st_mode
    except FileNotFoundError:  # it was there for os.mkdir and gone for the look that follows
        return True
    return stat.S_ISDIR(mode) or (stat.S_ISLNK(mode) and os.path.isdir(error.filename))


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written (`.tmp-...`) or half deleted (`.trash-...`)."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith((".tmp-", ".trash-")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if the file is missing or damaged."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON object as one line, in one write.

    Raises:
        ResourceError: the disk is full or not writable.
    """
    line = json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise disk_error(error, path, len(line)) from error


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, and an unfinished last line."""
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
