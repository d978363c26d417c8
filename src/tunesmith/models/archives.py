"""Safe extraction of selected files from wheels and source archives; nothing is executed.

Only regular files with plain relative names are extracted. Links, devices, names with `..`, too many members, too many
bytes and extreme compression ratios are errors.
"""

from __future__ import annotations

import errno
import lzma
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from tunesmith.errors import DataError, shorten

MAX_MEMBERS, MAX_BYTES, MAX_RATIO = 10_000, 2 * 2**30, 100
MIN_BUDGET_BYTES = 2**20
CHUNK = 2**20

_UNSAFE = re.compile(r"[\\:\x00-\x1f\x7f-\x9f]")
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    RuntimeError,
    UnicodeError,
    OSError,
)
_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE)

Select = Callable[[str], bool]


def extract(archive: Path, select: Select, into: Path) -> list[str]:
    """Extract the selected members into a folder, and return their names.

    Raises:
        DataError: the archive is damaged or exceeds a limit.
    """
    names = []
    with _members(archive) as members:
        budget = _budget(archive)
        for name, stream in members:
            if not select(name):
                continue
            target = into / _safe_path(name, archive)
            target.parent.mkdir(parents=True, exist_ok=True)
            budget = _copy(stream(), target, budget, archive)
            names.append(name)
    return names


def _budget(archive: Path) -> int:
    """Return the maximum number of unpacked bytes."""
    return min(MAX_BYTES, max(MAX_RATIO * archive.stat().st_size, MIN_BUDGET_BYTES))


def _too_large(archive: Path) -> DataError:
    return DataError("unpacks to more than 2 GiB, or to more than 100 times its size", where=archive.name)


def _copy(stream: IO[bytes] | None, target: Path, budget: int, archive: Path) -> int:
    if stream is None:
        raise DataError(f"{target.name} is not a regular file", where=archive.name)
    with stream, target.open("wb") as file:
        while chunk := stream.read(CHUNK):
            budget -= len(chunk)
            if budget < 0:
                raise _too_large(archive)
            file.write(chunk)
    return budget


def _safe_path(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or _UNSAFE.search(name):
        raise DataError(f"unsafe member name {shorten(name)}", where=archive.name, hint="do not use this archive")
    return path


Members = Iterator[tuple[str, Callable[[], IO[bytes] | None]]]


@contextmanager
def _members(archive: Path) -> Iterator[Members]:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                yield _zip_members(opened, archive)
        else:
            with tarfile.open(archive, "r:*") as tar:
                yield _tar_members(tar, archive)
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
            raise
        raise DataError(f"damaged archive ({error})", where=archive.name, hint="download it again") from None


def _zip_members(opened: zipfile.ZipFile, archive: Path) -> Members:
    infos = opened.infolist()
    if len(infos) > MAX_MEMBERS:
        raise DataError(f"{len(infos)} members, more than {MAX_MEMBERS}", where=archive.name)
    for info in infos:
        special = stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG)
        if not info.is_dir():
            yield info.filename, (lambda: None) if special else (lambda info=info: opened.open(info))  # type: ignore[misc]


def _tar_members(opened: tarfile.TarFile, archive: Path) -> Members:
    budget = _budget(archive)
    for count, info in enumerate(opened, start=1):
        if count > MAX_MEMBERS:
            raise DataError(f"more than {MAX_MEMBERS} members", where=archive.name)
        budget -= info.size  # skipping a member of a compressed tar unpacks it
        if budget < 0:
            raise _too_large(archive)
        if not info.isdir():
            regular = info.isfile()
            yield info.name, (lambda info=info: opened.extractfile(info)) if regular else (lambda: None)  # type: ignore[misc]


def publish(temporary: Path, target: Path) -> None:
    """Rename a finished folder to its target; keep the target if another process was first."""
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(temporary)
