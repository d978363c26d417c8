"""Archives are extracted within limits; unsafe names, links and bombs are refused."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.errors import DataError
from tunesmith.models import archives
from tunesmith.models.archives import extract, publish

MEMBERS = {"model/config.json": b"{}", "model/vocab.txt": b"a\nb\n", "code.py": b"raise SystemExit"}
CLIMBING = ("../out.json", "a/../../out.json", "/out.json", "a\\..\\out.json", "C:out.json", "..", "a/b\x01.json")


def _zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as opened:
        for name, content in members.items():
            info = zipfile.ZipInfo("placeholder")
            info.filename, info.compress_type = name, compression  # unchanged, with backslashes
            opened.writestr(info, content)
    return path


def _tar(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as opened:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return path


MAKERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {"wheel": _zip, "tar.gz": _tar}
make = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def _everything(name: str) -> bool:
    return True


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@make
def test_only_what_is_selected_is_written(make: Callable[..., Path], tmp_path: Path) -> None:
    archive = make(tmp_path / "archive", MEMBERS)
    names = extract(archive, lambda name: not name.endswith(".py"), tmp_path / "out")
    assert names == ["model/config.json", "model/vocab.txt"]
    assert _files(tmp_path / "out") == {name: MEMBERS[name] for name in names}


@pytest.mark.parametrize("mode", ("w", "w:bz2", "w:xz"))
def test_other_compressions_of_source_archives_are_read(mode: str, tmp_path: Path) -> None:
    assert len(extract(_tar(tmp_path / "archive", MEMBERS, mode), _everything, tmp_path / "out")) == 3


@make
@pytest.mark.parametrize("name", CLIMBING, ids=repr)
def test_names_that_are_not_plain_are_refused(name: str, make: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    archive = make(tmp_path / "in" / "archive", {name: b"x"})
    with pytest.raises(DataError, match="unsafe member name"):
        extract(archive, _everything, tmp_path / "in" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert not _files(tmp_path / "in").keys() - {"archive"}


@pytest.mark.parametrize("kind", (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE))
def test_links_and_devices_in_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "archive", "w:gz") as opened:
        info = tarfile.TarInfo("model/config.json")
        info.type, info.linkname = kind, "/etc/hostname"
        opened.addfile(info)
    with pytest.raises(DataError, match="not a regular file"):
        extract(tmp_path / "archive", _everything, tmp_path / "out")
    assert not _files(tmp_path / "out")


@pytest.mark.parametrize("kind", (0o120000, 0o020000, 0o060000, 0o010000), ids=("link", "character", "block", "fifo"))
def test_links_and_devices_in_a_wheel_are_refused(kind: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive", "w") as opened:
        info = zipfile.ZipInfo("model/config.json")
        info.create_system, info.external_attr = 3, (kind | 0o644) << 16
        opened.writestr(info, "/etc/hostname")
    with pytest.raises(DataError, match="not a regular file"):
        extract(tmp_path / "archive", _everything, tmp_path / "out")
    assert not _files(tmp_path / "out")


@make
def test_too_many_members(make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    assert extract(make(tmp_path / "three", MEMBERS), _everything, tmp_path / "out")
    with pytest.raises(DataError, match="more than 3"):
        extract(make(tmp_path / "four", MEMBERS | {"more.txt": b""}), _everything, tmp_path / "out")


@make
def test_too_many_bytes(make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 5000)
    members = {f"{number}.txt": os.urandom(2000) for number in range(3)}
    assert extract(make(tmp_path / "two", dict(list(members.items())[:2])), _everything, tmp_path / "out")
    with pytest.raises(DataError, match="unpacks to more than"):
        extract(make(tmp_path / "three", members), _everything, tmp_path / "out")


@make
def test_an_absurd_ratio(make: Callable[..., Path], tmp_path: Path) -> None:
    archive = make(tmp_path / "bomb", {"a.txt": bytes(8 * 2**20)})
    assert archive.stat().st_size < 40_000
    with pytest.raises(DataError, match="unpacks to more than"):
        extract(archive, _everything, tmp_path / "out")


def test_a_tar_that_swells_in_what_is_skipped_is_refused_too(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "bomb", {"skipped.dat": bytes(8 * 2**20), "model.txt": b"x"})
    with pytest.raises(DataError, match="unpacks to more than"):
        extract(archive, lambda name: name == "model.txt", tmp_path / "out")


def test_a_wheel_that_lies_about_its_sizes_is_refused(tmp_path: Path) -> None:
    content = _zip(tmp_path / "archive", {"a.txt": bytes(4 * 2**20)}).read_bytes()
    stated = struct.pack("<I", 4 * 2**20)
    (tmp_path / "archive").write_bytes(content.replace(stated, struct.pack("<I", 10)))
    with pytest.raises(DataError):
        extract(tmp_path / "archive", _everything, tmp_path / "out")


@make
@pytest.mark.parametrize("share", (0.0, 0.3, 0.6, 0.9))
def test_a_cut_archive_is_refused(share: float, make: Callable[..., Path], tmp_path: Path) -> None:
    archive = make(tmp_path / "archive", {name: os.urandom(3000) for name in MEMBERS})
    archive.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * share)])
    with pytest.raises(DataError, match="damaged archive"):
        extract(archive, _everything, tmp_path / "out")


@make
def test_an_archive_with_flipped_bits_ends_in_words(make: Callable[..., Path], tmp_path: Path) -> None:
    good = make(tmp_path / "archive", MEMBERS).read_bytes()
    refused = 0
    for place in range(0, len(good), 5):
        content = bytearray(good)
        content[place] ^= 0x41
        (tmp_path / "flipped").write_bytes(content)
        try:
            extract(tmp_path / "flipped", lambda name: name.endswith(".json"), tmp_path / f"out-{place}")
        except DataError:
            refused += 1
    assert refused > 10


def test_an_encrypted_wheel_is_refused(tmp_path: Path) -> None:
    content = bytearray(_zip(tmp_path / "archive", {"a.txt": b"x"}, zipfile.ZIP_STORED).read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(magic) + offset] |= 1
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(DataError, match="damaged archive"):
        extract(tmp_path / "archive", _everything, tmp_path / "out")


@make
def test_a_file_where_a_folder_is_needed(make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="damaged archive"):
        extract(make(tmp_path / "archive", {"a": b"x", "a/b.txt": b"y"}), _everything, tmp_path / "out")


def test_the_first_to_publish_wins_and_nothing_is_left_beside(tmp_path: Path) -> None:
    def one(number: int) -> None:
        writing = tmp_path / f".tmp-{number}"
        writing.mkdir()
        (writing / "whole").write_text(str(number))
        barrier.wait()
        publish(writing, tmp_path / "target")

    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "whole").read_text() in "01234567"


def test_publishing_over_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "writing").mkdir()
    (tmp_path / "target").write_text("a file")
    with pytest.raises(OSError):
        publish(tmp_path / "writing", tmp_path / "target")
