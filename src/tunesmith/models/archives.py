"""Members streamed out of wheels and source archives under limits; nothing is extracted, nothing is run.

Only regular files with plain relative names are read; a link, a device, a name that climbs, too many members, too many
bytes or an absurd compression ratio end the reading.
"""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from tunesmith.errors import DataError

MAX_MEMBERS, MAX_BYTES, MAX_RATIO = 10_000, 2 * 2**30, 100
RATIO_FROM_BYTES = 2**20
CHUNK = 2**20

Select = Callable[[str], bool]


def extract(archive: Path, select: Select, into: Path) -> list[str]:
    """Copy the selected members below `into` under their own names; returns the names.

    Raises:
        DataError: the archive is damaged or breaks a limit.
    """
    names = []
    with _members(archive) as members:
        budget = min(MAX_BYTES, max(MAX_RATIO * archive.stat().st_size, RATIO_FROM_BYTES))
        for name, stream in members:
            if not select(name):
                continue
            target = into / _checked(name, archive)
            target.parent.mkdir(parents=True, exist_ok=True)
            budget = _copy(stream(), target, budget, archive)
            names.append(name)
    return names


def _copy(stream: IO[bytes] | None, target: Path, budget: int, archive: Path) -> int:
    if stream is None:
        raise DataError(f"{target.name} is not a regular file", where=archive.name)
    with stream, target.open("wb") as file:
        while chunk := stream.read(CHUNK):
            budget -= len(chunk)
            if budget < 0:
                raise DataError("unpacks to more than 2 GiB, or to over 100 times its size", where=archive.name)
            file.write(chunk)
    return budget


def _checked(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise DataError(f"a member is called '{name}'", where=archive.name, hint="this archive is not to be trusted")
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
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(f"a damaged archive ({error})", where=archive.name, hint="fetch it again") from None


def _of_zip(opened: zipfile.ZipFile, archive: Path) -> Members:
    infos = opened.infolist()
    if len(infos) > MAX_MEMBERS:
        raise DataError(f"{len(infos)} members, more than {MAX_MEMBERS}", where=archive.name)
    for info in infos:
        link = (info.external_attr >> 16) & 0o170000 == 0o120000
        if not info.is_dir():
            yield info.filename, (lambda: None) if link else (lambda info=info: opened.open(info))  # type: ignore[misc]


def _of_tar(opened: tarfile.TarFile, archive: Path) -> Members:
    for count, info in enumerate(opened, start=1):
        if count > MAX_MEMBERS:
            raise DataError(f"more than {MAX_MEMBERS} members", where=archive.name)
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
