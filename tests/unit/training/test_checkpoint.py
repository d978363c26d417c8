"""A checkpoint is complete or absent; a damaged one is detected, reported and skipped."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.errors import CheckpointError, ResourceError
from tunesmith.storage import files
from tunesmith.training import checkpoint

FILES = ("learned.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")


def _save(folder: Path, step: int) -> Path:
    tensors = {
        "learned": {"weight": torch.full((4, 3), float(step)), "half": torch.ones(5, dtype=torch.bfloat16)},
        "optimizer": {"exp_avg/weight": torch.arange(12.0).view(4, 3), "step/weight": torch.tensor(float(step))},
    }
    return checkpoint.save(folder, step, tensors, {"step": step, "best": 0.5}, {"train": {"seed": 0}})


def _three(folder: Path) -> list[str]:
    for step in (1, 2, 3):
        checkpoint.write_pointer(folder, "last", _save(folder, step))
    return []


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _flip(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(len(content) * share), len(content) - 1)] ^= 0x10
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut to nothing": lambda path: _cut(path, 0),
    "cut to a byte": lambda path: _cut(path, 1),
    "cut to half": lambda path: _cut(path, path.stat().st_size // 2),
    "cut by a byte": lambda path: _cut(path, path.stat().st_size - 1),
    "deleted": lambda path: path.unlink(),
    "a folder instead": lambda path: (path.unlink(), path.mkdir()),
    "a link instead": lambda path: (path.rename(path.with_suffix(".away")), path.symlink_to(path.with_suffix(".away"))),
    **{f"bit flipped at {share:.2f}": (lambda path, share=share: _flip(path, share)) for share in
       (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.99)},
}  # fmt: skip


def test_a_checkpoint_round_trips(tmp_path: Path) -> None:
    _three(tmp_path)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None and found.step == 3
    assert found.state == {"step": 3, "best": 0.5} and found.identity == {"train": {"seed": 0}}
    assert torch.equal(found.tensors["learned"]["weight"], torch.full((4, 3), 3.0))
    assert found.tensors["learned"]["half"].dtype == torch.bfloat16
    assert sorted(path.name for path in (tmp_path / "step-000003").iterdir()) == sorted(FILES)


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "checkpoints", pytest.fail) is None


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(file: str, damage: str, tmp_path: Path) -> None:
    _three(tmp_path)
    DAMAGE[damage](tmp_path / "step-000003" / file)
    warnings: list[str] = []
    found = checkpoint.newest(tmp_path, warnings.append)
    assert (
        found is not None
        and found.step == 2
        and torch.equal(found.tensors["learned"]["weight"], torch.full((4, 3), 2.0))
    )
    assert len(warnings) == 1 and file in warnings[0] and "step-000003.corrupt" in warnings[0]
    assert (tmp_path / "step-000003.corrupt" / "REASON.txt").read_text().strip()
    assert checkpoint.newest(tmp_path, pytest.fail) is not None, "the second time there is no warning"


def test_without_an_intact_checkpoint_loading_is_refused(tmp_path: Path) -> None:
    _three(tmp_path)
    for step in (1, 2, 3):
        _flip(tmp_path / f"step-00000{step}" / "learned.safetensors", 0.9)
    with pytest.raises(CheckpointError, match="sha256") as refused:
        checkpoint.newest(tmp_path, lambda _: None)
    assert refused.value.exit_code == 6 and "--overwrite" in str(refused.value)
    with pytest.raises(CheckpointError):
        checkpoint.newest(tmp_path, lambda _: None)


def test_a_newer_schema_is_refused_and_left_where_it_is(tmp_path: Path) -> None:
    _three(tmp_path)
    path = tmp_path / "step-000003" / "MANIFEST.json"
    manifest = json.loads(path.read_text()) | {"schema": 99}
    path.write_text(json.dumps(manifest | {"sha256": checkpoint._digest(manifest)}))
    with pytest.raises(CheckpointError, match="schema 99") as refused:
        checkpoint.newest(tmp_path, pytest.fail)
    assert refused.value.exit_code == 6 and path.exists()


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    path = _save(tmp_path, 1) / "MANIFEST.json"
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8) if place % 16 == 0 else (place % 8,):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            if content[place : place + 1].isspace() and changed[place : place + 1].isspace():
                continue  # white space between two values has no meaning
            try:
                checkpoint.load(path.parent)
            except CheckpointError as error:
                assert not isinstance(error, checkpoint.NewerSchema), (place, bit)
            else:
                pytest.fail(f"flipped bit {bit} of byte {place} was not detected")


@pytest.mark.parametrize(
    "content", ("{}", "[]", "null", '{"schema": 1, "step": 3, "files": {}, "identity": {}}', "\ufeff{")
)
def test_a_foreign_manifest_is_not_trusted(content: str, tmp_path: Path) -> None:
    _three(tmp_path)
    (tmp_path / "step-000003" / "MANIFEST.json").write_text(content)
    found = checkpoint.newest(tmp_path, lambda _: None)
    assert found is not None and found.step == 2


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    _three(tmp_path)
    path = tmp_path / "step-000003" / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../step-000002/learned.safetensors"] = manifest["files"]["learned.safetensors"]
    path.write_text(json.dumps(manifest | {"sha256": checkpoint._digest(manifest)}))
    found = checkpoint.newest(tmp_path, lambda _: None)
    assert found is not None and found.step == 2


def test_a_linked_or_renamed_checkpoint_is_not_trusted(tmp_path: Path) -> None:
    _three(tmp_path)
    (tmp_path / "step-000009").symlink_to(tmp_path / "step-000002")
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000008")
    warnings: list[str] = []
    found = checkpoint.newest(tmp_path, warnings.append)
    assert found is not None and found.step == 3 and len(warnings) == 2


@pytest.mark.parametrize("content", (b"", b"{", b'{"step": 2}\r\n', b'{"step": "x"}', b"\xff"))
def test_best_survives_a_damaged_pointer(content: bytes, tmp_path: Path) -> None:
    _three(tmp_path)
    checkpoint.write_pointer(tmp_path, "best", tmp_path / "step-000002")
    (tmp_path / "best.json").write_bytes(content)
    found = checkpoint.best(tmp_path, lambda _: None)
    assert found is not None and found.step == (2 if b"2" in content else 3)


def test_best_and_last_are_never_rotated_away(tmp_path: Path) -> None:
    for step in range(1, 8):
        saved = _save(tmp_path, step)
        checkpoint.write_pointer(tmp_path, "last", saved)
        if step == 2:
            checkpoint.write_pointer(tmp_path, "best", saved)
        checkpoint.rotate(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000002", "step-000007"]


def test_nothing_is_rotated_while_the_newest_is_damaged(tmp_path: Path) -> None:
    _three(tmp_path)
    _flip(tmp_path / "step-000003" / "learned.safetensors", 0.9)
    with pytest.raises(CheckpointError):
        checkpoint.rotate(tmp_path, 1)
    assert len(list(tmp_path.glob("step-*"))) == 3


class Crash(BaseException):
    """A killed process: only `finally` blocks run after it, and recovery must not need them."""


def _crash_at(monkeypatch: pytest.MonkeyPatch, nth: int, *, after: bool) -> list[int]:
    """Crash at the nth disk operation, before or after it is done."""
    count = [0]

    def wrapped(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == nth and not after:
                raise Crash
            done = own(*args, **kwargs)
            if count[0] == nth and after:
                raise Crash
            return done

        return call

    for owner, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (checkpoint, "save_file"), (Path, "write_text"),
                        (Path, "mkdir"), (files.json, "dumps")):  # fmt: skip
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process removes nothing
    return count


def _save_point_rotate(folder: Path, step: int) -> None:
    checkpoint.write_pointer(folder, "last", _save(folder, step))
    checkpoint.write_pointer(folder, "best", folder / f"step-{step:06d}")
    checkpoint.rotate(folder, 1)


@pytest.mark.parametrize("after", (False, True), ids=("before", "after"))
def test_a_crash_at_any_operation_leaves_a_sound_checkpoint(after: bool, tmp_path: Path) -> None:
    nth = 0
    while True:
        nth += 1
        folder = tmp_path / str(nth)
        _save_point_rotate(folder, 1)
        _save_point_rotate(folder, 2)
        with pytest.MonkeyPatch.context() as patch:
            count = _crash_at(patch, nth, after=after)
            try:
                _save_point_rotate(folder, 3)
            except Crash:
                pass
        if count[0] < nth:
            break
        found = checkpoint.newest(folder, pytest.fail)
        assert found is not None and found.step in (2, 3), f"operation {nth}"
        best = checkpoint.best(folder, pytest.fail)
        assert best is not None and best.step in (2, 3), f"operation {nth}"
        _save_point_rotate(folder, 4)
        assert {path.name for path in folder.iterdir()} == {"step-000004", "best.json", "last.json"} | {
            path.name for path in folder.iterdir() if path.name == "step-000003"
        }
    assert nth > 15, "every operation is covered"


@pytest.mark.parametrize("code", (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES))
def test_a_full_disk_is_reported_and_harms_nothing(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _three(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(ResourceError, match=r"step-000004: .*\d+ bytes") as refused:
            _save(tmp_path, 4)
    assert refused.value.exit_code == 4 and os.strerror(code).lower() in str(refused.value)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None and found.step == 3
    _save(tmp_path, 4)


def test_too_little_space_is_detected_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 10)
    with pytest.raises(ResourceError, match="cannot write"):
        _save(tmp_path, 1)


def test_every_changed_key_is_reported() -> None:
    old = {"train": {"seed": 0, "learning_rate": 1e-3}, "data_sha256": {"train": "aa"}}
    new = {"train": {"seed": 1, "learning_rate": 1e-2}, "data_sha256": {"train": "aa"}}
    with pytest.raises(CheckpointError, match=r"train.seed was '0', is '1'; train.learning_rate was '0.001'"):
        checkpoint.check_same_run(old, new, ())
    with pytest.raises(CheckpointError, match="--override train.seed$"):
        checkpoint.check_same_run(old, new, ["train.learning_rate"])
    assert checkpoint.check_same_run(old, new, ["train"]) == ["train.seed", "train.learning_rate"]


def test_no_pickle_is_ever_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _three(tmp_path)
    opened: list[str] = []
    own = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda file, *args, **kwargs: (opened.append(str(file)), own(file, *args, **kwargs))[1]
    )
    checkpoint.newest(tmp_path, pytest.fail)
    assert all(path.endswith((".safetensors", ".json")) for path in opened)
