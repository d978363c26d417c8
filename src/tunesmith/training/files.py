"""Files that are whole or absent: written beside, fsynced, renamed; and lines appended one write each."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tunesmith.errors import ResourceError

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
NOT_OURS = FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR}
"""What a disk answers when the user, not the code, has to mend it."""


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
        with contextlib.suppress(OSError):  # on a disk gone read-only nothing can be removed either
            temporary.unlink(missing_ok=True)
        raise out_of_space(error, path, len(content)) from error


def out_of_space(error: OSError | SafetensorError, path: Path, needed_bytes: int | None = None) -> Exception:
    """The error as the user's, where a disk is full, broken or closed to us; else as it is."""
    code = error.errno if isinstance(error, OSError) else _os_error(str(error))
    if code not in NOT_OURS:
        return error
    why = os.strerror(code).lower()
    what = why if needed_bytes is None else f"cannot write {needed_bytes:,} bytes: {why}"
    way_out = "make room" if code in FULL else "mend that"
    return ResourceError(
        f"{what} ({free_bytes(path):,} bytes free)",
        where=str(path),
        hint=f"{way_out} and resume: what was saved before is untouched",
    )


def _os_error(text: str) -> int | None:
    """Safetensors reports what the system said as words: `I/O error: ... (os error 28)`."""
    found = re.search(r"\(os error (\d+)\)", text)
    return int(found[1]) if found else None


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where `path` lies."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize


def make_folder(folder: Path) -> list[Path]:
    """A folder for the user alone, with those above it; those that were not there before, it first.

    Raises:
        ResourceError: it cannot be made here.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        if isinstance(error, FileExistsError) and (os.path.isdir(folder) or not os.path.lexists(error.filename)):
            return make_folder(folder)  # in between, who had made it took it along
        why = f"cannot be made ({os.strerror(error.errno or 0).lower()})"
        raise ResourceError(why, where=str(folder), hint="output=DIR puts the run elsewhere") from error
    return made


def sweep(folder: Path) -> None:
    """Remove what a killed process left half written (`.tmp-...`) or half deleted (`.trash-...`)."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith((".tmp-", ".trash-")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where it is not there or a power cut has spoilt it."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON object as one line, in one write.

    Raises:
        ResourceError: no space left.
    """
    line = json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise out_of_space(error, path, len(line)) from error


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
