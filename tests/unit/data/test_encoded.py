"""Encoded examples come back as they went in, from files that are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.data import encoded as module
from tunesmith.data.encoded import Encoded, encode, file_sha256, fingerprint

SIZES = (3, 0, 5, 1, 2, 0, 4)


def _example(number: int) -> dict[str, Any]:
    size = SIZES[number % len(SIZES)]
    ids = [number * 10 + k for k in range(size)]
    return {"input_ids": ids, "label": number % 3, "weight": number / 4, "share": [number / 8] * 2}


def _encode(count: int, folder: Path, start: int = 0) -> Encoded:
    return encode(range(start, start + count), lambda rows: [_example(row) for row in rows], folder)


@pytest.mark.parametrize("chunk", (1, 3, 4, 1024))
def test_what_went_in_comes_back_in_any_order(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk)
    data = _encode(20, tmp_path / "e")
    assert len(data) == 20
    assert data.fields == {"input_ids": True, "label": False, "weight": False, "share": True}
    assert data.lengths.tolist() == [SIZES[n % len(SIZES)] for n in range(20)]
    order = [7, 0, 19, 1, 7]
    taken = data.take(order)
    for name, (values, offsets) in taken.items():
        wanted = [_example(number)[name] for number in order]
        if offsets is None:
            assert values.tolist() == wanted
        else:
            parts = [values[start:stop].tolist() for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
            assert parts == wanted


def test_no_examples_can_be_taken_and_kept(tmp_path: Path) -> None:
    values, offsets = _encode(5, tmp_path / "e").take([])["input_ids"]
    assert len(values) == 0 and offsets is not None and offsets.tolist() == [0]
    nothing = _encode(0, tmp_path / "none")
    assert len(nothing) == 0 and nothing.fields == {} and len(nothing.lengths) == 0


def test_a_field_that_is_always_empty_can_be_kept(tmp_path: Path) -> None:
    data = encode(range(3), lambda rows: [{"input_ids": []} for _ in rows], tmp_path / "e")
    assert data.lengths.tolist() == [0, 0, 0] and data.column("input_ids").dtype == np.int32


def test_numbers_keep_their_kind(tmp_path: Path) -> None:
    data = _encode(5, tmp_path / "e")
    assert data.column("label").dtype == np.int32 and data.column("weight").dtype == np.float32
    assert data.column("weight").tolist() == [0, 0.25, 0.5, 0.75, 1.0]


def test_fractions_are_never_cut_to_whole_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 2)
    with pytest.raises(AssertionError, match="label: floats after a chunk of integers"):
        encode([0, 1, 0.5], lambda rows: [{"label": row} for row in rows], tmp_path / "e")


def test_files_are_mapped_and_cannot_be_written_through(tmp_path: Path) -> None:
    data = _encode(5, tmp_path / "e")
    assert isinstance(data.column("input_ids").base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        data.column("input_ids")[0] = 1


def test_the_same_folder_is_encoded_once(tmp_path: Path) -> None:
    _encode(5, tmp_path / "e")

    def never(rows: Any) -> list[dict[str, Any]]:
        raise AssertionError("encoded again")

    assert len(encode(range(9), never, tmp_path / "e")) == 5


def test_rows_are_encoded_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 4)
    read: list[int] = []
    most = 0

    def rows() -> Iterator[int]:
        for number in range(20):
            read.append(number)
            yield number

    def encode_rows(chunk: list[int]) -> list[dict[str, Any]]:
        nonlocal most
        most = max(most, len(read) - chunk[0])
        return [_example(row) for row in chunk]

    encode(rows(), encode_rows, tmp_path / "e")
    assert most <= 5, "no more than a chunk is held"


def test_what_fails_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 2)

    def fails(rows: list[int]) -> list[dict[str, Any]]:
        if 4 in rows:
            raise KeyboardInterrupt
        return [_example(row) for row in rows]

    with pytest.raises(KeyboardInterrupt):
        encode(range(9), fails, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []
    assert len(_encode(9, tmp_path / "e")) == 9


def test_what_a_killed_process_left_is_in_nobody_s_way(tmp_path: Path) -> None:
    (tmp_path / f".tmp-e-{os.getpid()}").mkdir()
    (tmp_path / f".tmp-e-{os.getpid()}" / "label.values").write_bytes(b"12345678")
    assert _encode(3, tmp_path / "e").column("label").tolist() == [0, 1, 2]


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut to nothing": lambda folder: (folder / "input_ids.values").write_bytes(b""),
    "cut by a value": lambda folder: os.truncate(folder / "input_ids.values", 4),
    "cut inside a value": lambda folder: os.truncate(folder / "input_ids.offsets", 13),
    "a file gone": lambda folder: (folder / "label.values").unlink(),
    "nothing said": lambda folder: (folder / "fields.json").write_text(""),
    "half said": lambda folder: os.truncate(folder / "fields.json", 20),
    "something else said": lambda folder: (folder / "fields.json").write_text(json.dumps({"size": 3})),
    "only a folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_is_not_whole_is_written_anew(damage: str, tmp_path: Path) -> None:
    _encode(9, tmp_path / "e")
    DAMAGE[damage](tmp_path / "e")
    data = _encode(9, tmp_path / "e")
    assert data.column("label").tolist() == [n % 3 for n in range(9)]
    assert data.take([8])["input_ids"][0].tolist() == _example(8)["input_ids"]


def test_of_two_processes_the_faster_wins(tmp_path: Path) -> None:
    def meanwhile(rows: list[int]) -> list[dict[str, Any]]:
        theirs = tmp_path / "theirs"
        _encode(9, theirs)
        theirs.rename(tmp_path / "e")
        return [_example(row) for row in rows]

    assert len(encode(range(9), meanwhile, tmp_path / "e")) == 9
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def test_a_fingerprint_is_of_content_and_of_all_of_it() -> None:
    one = fingerprint("sha", {"b": 1, "a": [1, 2]}, None)
    assert one == fingerprint("sha", {"a": [1, 2], "b": 1}, None) and len(one) == 32
    others = [
        fingerprint("sha", {"b": 1, "a": [2, 1]}, None),
        fingerprint("sha", {"b": 1.5, "a": [1, 2]}, None),
        fingerprint("sha", {"b": "1", "a": [1, 2]}, None),
        fingerprint("sha", {"b": 1, "a": [1, 2]}),
        fingerprint("sha", {"b": 1, "a": [1, 2]}, None, "é"),
    ]
    assert len({one, *others}) == 6


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
