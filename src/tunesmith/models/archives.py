"""Members streamed out of wheels and source archives under limits; nothing is extracted, nothing is run.

Only regular files with plain relative names are read; a link, a device, a name that climbs, too many members, too many
bytes or an absurd compression ratio end the reading.
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
RATIO_FROM_BYTES = 2**20
CHUNK = 2**20

_ODD = re.compile(r"[\\:\x00-\x1f\x7f-\x9f]")
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
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE)

Select = Callable[[str], bool]


def extract(archive: Path, select: Select, into: Path) -> list[str]:
    """Copy the selected members below `into` under their own names; returns the names.

    Raises:
        DataError: the archive is damaged or breaks a limit.
    """
    names = []
    with _members(archive) as members:
        budget = _budget(archive)
        for name, stream in members:
            if not select(name):
                continue
            target = into / _checked(name, archive)
            target.parent.mkdir(parents=True, exist_ok=True)
            budget = _copy(stream(), target, budget, archive)
            names.append(name)
    return names


def _budget(archive: Path) -> int:
    """Bytes that it may unpack to."""
    return min(MAX_BYTES, max(MAX_RATIO * archive.stat().st_size, RATIO_FROM_BYTES))


def _swells(archive: Path) -> DataError:
    return DataError("unpacks to more than 2 GiB, or to over 100 times its size", where=archive.name)


def _copy(stream: IO[bytes] | None, target: Path, budget: int, archive: Path) -> int:
    if stream is None:
        raise DataError(f"{target.name} is not a regular file", where=archive.name)
    with stream, target.open("wb") as file:
        while chunk := stream.read(CHUNK):
            budget -= len(chunk)
            if budget < 0:
                raise _swells(archive)
            file.write(chunk)
    return budget


def _checked(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or _ODD.search(name):
        raise DataError(
            f"a member is called {shorten(name)}", where=archive.name, hint="this archive is not to be trusted"
        )
    return path


Members = Iterator[tuple[str, Callable[[], IO[bytes] | None]]]


@contextmanager
def _members(archive: Path) -> Iterator[Members]:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                yield _of_zip(opened, archive)
        else:
            with tarfile.open(archive, "r:*") as tar:
                yield _of_tar(tar, archive)
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        raise DataError(f"a damaged archive ({error})", where=archive.name, hint="fetch it again") from None


def _of_zip(opened: zipfile.ZipFile, archive: Path) -> Members:
    infos = opened.infolist()
    if len(infos) > MAX_MEMBERS:
        raise DataError(f"{len(infos)} members, more than {MAX_MEMBERS}", where=archive.name)
    for info in infos:
        special = stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG)
        if not info.is_dir():
            yield info.filename, (lambda: None) if special else (lambda info=info: opened.open(info))  # type: ignore[misc]


def _of_tar(opened: tarfile.TarFile, archive: Path) -> Members:
    budget = _budget(archive)
    for count, info in enumerate(opened, start=1):
        if count > MAX_MEMBERS:
            raise DataError(f"more than {MAX_MEMBERS} members", where=archive.name)
        budget -= info.size  # to skip a member of a tar is to unpack it
        if budget < 0:
            raise _swells(archive)
        if not info.isdir():
            regular = info.isfile()
            yield info.name, (lambda info=info: opened.extractfile(info)) if regular else (lambda: None)  # type: ignore[misc]


def publish(writing: Path, target: Path) -> None:
    """Make a finished folder visible at once; another process may have been first."""
    try:
        writing.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(writing)
