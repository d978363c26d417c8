"""Encoded examples round-trip through memory and files; a file is complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.data import encoded as module
from tunesmith.data.batches import Ragged, collate
from tunesmith.data.encoded import (
    Encoded,
    Field,
    VariableLength,
    encode,
    encode_in_memory,
    file_sha256,
    fingerprint,
)

SIZES = (3, 0, 5, 1, 2, 0, 4)


def _example(number: int) -> dict[str, Any]:
    size = SIZES[number % len(SIZES)]
    ids = [number * 10 + k for k in range(size)]
    return {"input_ids": ids, "label": number % 3, "weight": number / 4, "share": [number / 8] * 2}


def _examples(rows: list[int]) -> list[dict[str, Any]]:
    return [_example(row) for row in rows]


def _encode(count: int, folder: Path, start: int = 0) -> Encoded:
    return encode(range(start, start + count), _examples, folder)


STORES: dict[str, Callable[..., Encoded]] = {
    "files": lambda rows, encode_rows, folder, costs=None: encode(rows, encode_rows, folder / "e", costs),
    "memory": lambda rows, encode_rows, folder, costs=None: encode_in_memory(rows, encode_rows, costs),
}


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
@pytest.mark.parametrize("chunk", (1, 3, 4, 1024))
def test_what_went_in_comes_back_in_any_order(
    store: Callable[..., Encoded], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk)
    data = store(range(20), _examples, tmp_path)
    assert len(data) == 20
    assert data.fields == {
        "input_ids": Field("int32", ragged=True, is_index=True),
        "label": Field("int32", is_index=True),
        "weight": Field("float32"),
        "share": Field("float32", ragged=True),
    }
    assert data.lengths("input_ids").tolist() == [SIZES[n % len(SIZES)] for n in range(20)]
    order = [7, 0, 19, 1, 7]
    taken = data.take(order)
    for name, (values, offsets) in taken.items():
        wanted = [_example(number)[name] for number in order]
        if offsets is None:
            assert values.tolist() == wanted and not data.fields[name].ragged
        else:
            parts = [values[start:stop].tolist() for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
            assert parts == wanted


def test_no_examples_can_be_taken_and_kept(tmp_path: Path) -> None:
    values, offsets = _encode(5, tmp_path / "e").take([])["input_ids"]
    assert len(values) == 0 and offsets is not None and offsets.tolist() == [0]
    for store in STORES.values():
        nothing = store([], _examples, tmp_path / "none", lambda data: data.lengths("input_ids"))
        assert len(nothing) == 0 and nothing.fields == {} and len(nothing.costs) == 0


def test_a_field_that_is_always_empty_can_be_kept(tmp_path: Path) -> None:
    data = encode(range(3), lambda rows: [{"input_ids": []} for _ in rows], tmp_path / "e")
    assert data.lengths("input_ids").tolist() == [0, 0, 0] and data.column("input_ids").dtype == np.int32


def test_numbers_keep_their_kind(tmp_path: Path) -> None:
    data = _encode(5, tmp_path / "e")
    assert data.column("label").dtype == np.int32 and data.column("weight").dtype == np.float32
    assert data.column("weight").tolist() == [0, 0.25, 0.5, 0.75, 1.0]


def test_fractions_are_never_cut_to_whole_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 2)
    with pytest.raises(AssertionError, match="^label:"):
        encode([0, 1, 0.5], lambda rows: [{"label": row} for row in rows], tmp_path / "e")


def test_files_are_mapped_and_cannot_be_written_through(tmp_path: Path) -> None:
    data = _encode(5, tmp_path / "e")
    assert isinstance(_owner(data.column("input_ids")), np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        data.column("input_ids")[0] = 1


def _owner(array: Any) -> Any:
    """Return the array that owns the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


PIXELS = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)


def _picture(number: int) -> dict[str, Any]:
    """Return an example with arrays of every kind in the docstring of `encoded.py`."""
    boxes = np.arange(4 * (number % 3), dtype=np.float64).reshape(-1, 4) + number
    return {
        "pixels": PIXELS[number % 2],
        "half": np.array([number / 2, -1], dtype=np.float16),
        "truth": np.array(number % 2 == 0),
        "boxes": VariableLength(boxes),
        "flat_pixels": VariableLength(PIXELS[0].reshape(-1, 3)[: number * 2]),
        "crops": VariableLength(np.full((1 + number % 2, 2, 2), number, dtype=np.int16)),
        "label": number,
    }


def _pictures(rows: list[int]) -> list[dict[str, Any]]:
    return [_picture(row) for row in rows]


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
@pytest.mark.parametrize("chunk", (2, 1024))
def test_arrays_keep_shape_and_dtype(
    store: Callable[..., Encoded], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk)
    data = store(range(7), _pictures, tmp_path)
    assert data.fields == {
        "pixels": Field("uint8", (4, 5, 3)),
        "half": Field("float16", (2,)),
        "truth": Field("bool"),
        "boxes": Field("float64", (4,), ragged=True),
        "flat_pixels": Field("uint8", (3,), ragged=True),
        "crops": Field("int16", (2, 2), ragged=True),
        "label": Field("int32", is_index=True),
    }
    assert data.column("pixels").shape == (7, 4, 5, 3) and data.column("pixels").dtype == np.uint8
    assert data.column("flat_pixels").shape == (2 * sum(range(7)), 3)
    assert data.lengths("boxes").tolist() == [0, 1, 2, 0, 1, 2, 0]
    order = [4, 0, 6, 4, 3]
    taken = data.take(np.array(order))
    for name, (values, offsets) in taken.items():
        assert values.dtype == data.fields[name].dtype
        for place, number in enumerate(order):
            wanted = _picture(number)[name]
            if offsets is None:
                np.testing.assert_array_equal(values[place], wanted)
                continue
            own = values[offsets[place] : offsets[place + 1]]
            assert own.shape == wanted.array.shape
            np.testing.assert_array_equal(own, wanted.array)


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_a_batch_has_indices_as_int64_and_all_else_as_it_is(store: Callable[..., Encoded], tmp_path: Path) -> None:
    both = store(range(7), lambda rows: [_picture(row) | _example(row) for row in rows], tmp_path)
    batch = collate(both, np.array([2, 5]))
    dtypes = {
        name: value.values.dtype if isinstance(value, Ragged) else value.dtype for name, value in batch.fields.items()
    }
    assert dtypes == {
        "pixels": torch.uint8,
        "half": torch.float16,
        "truth": torch.bool,
        "boxes": torch.float64,
        "flat_pixels": torch.uint8,
        "crops": torch.int16,
        "label": torch.int64,
        "input_ids": torch.int64,
        "weight": torch.float32,
        "share": torch.float32,
    }
    assert torch.equal(batch.tensor("pixels"), torch.from_numpy(PIXELS[[0, 1]]))
    assert batch.ragged("boxes").lengths.tolist() == [2, 2] and batch.ragged("boxes").values.shape == (4, 4)
    padded = batch.ragged("flat_pixels").padded(255)
    assert padded.shape == (2, 10, 3) and padded.dtype == torch.uint8
    assert torch.equal(padded[0, :4], torch.from_numpy(PIXELS[0].reshape(-1, 3)[:4]))
    assert bool((padded[0, 4:] == 255).all())


def test_examples_in_memory_are_those_on_disk(tmp_path: Path) -> None:
    costs = lambda data: data.lengths("flat_pixels")  # noqa: E731
    disk, memory = (store(range(9), _pictures, tmp_path, costs) for store in STORES.values())
    assert memory.fields == disk.fields and len(memory) == len(disk) == 9
    for name, field in disk.fields.items():
        np.testing.assert_array_equal(memory.column(name), disk.column(name))
        assert memory.column(name).dtype == disk.column(name).dtype == field.dtype
        if field.ragged:
            np.testing.assert_array_equal(memory.offsets(name), disk.offsets(name))
    assert memory.costs.tolist() == disk.costs.tolist() == disk.lengths("flat_pixels").tolist()
    assert (memory.key, disk.key) == ("", "e")


def test_in_memory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("mkdir", "open", "write_text", "write_bytes", "rename"):
        monkeypatch.delattr(Path, name)
    assert len(encode_in_memory(range(9), _pictures)) == 9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_an_array_of_another_shape_or_dtype_is_refused_by_its_field(
    store: Callable[..., Encoded], tmp_path: Path
) -> None:
    for name, first, other in (
        ("pixels", np.zeros((2, 3)), np.zeros((3, 3))),
        ("boxes", VariableLength(np.zeros((2, 4))), VariableLength(np.zeros((2, 5)))),
        ("mask", np.zeros(3, dtype=np.uint8), np.full(3, 0.5)),
        ("polygons", VariableLength(np.zeros(3, dtype=np.int16)), VariableLength(np.full(3, 0.5))),
    ):
        for rows in ([first, other], [first] * module.CHUNK_ROWS + [other]):
            with pytest.raises(AssertionError, match=f"^{name}: "):
                store(rows, lambda part: [{name: value} for value in part], tmp_path)  # noqa: B023


def test_costs_are_what_the_task_states_and_one_an_example_otherwise(tmp_path: Path) -> None:
    assert _encode(5, tmp_path / "e").costs.tolist() == [1] * 5
    given = encode(range(5), _examples, tmp_path / "e", lambda data: 2 * data.lengths("input_ids"))
    assert given.costs.tolist() == [2 * size for size in SIZES[:5]], "of a folder that is there already too"


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
