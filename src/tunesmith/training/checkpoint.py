"""Checkpoints: written atomically, verified before use, never a pickle.

A checkpoint is a folder `step-000120` with safetensors files and `state.json`, and with `MANIFEST.json`, written last,
which has the size and sha256 of every file. The folder is written as `.tmp-...`, fsynced and renamed. Loading tries the
newest checkpoint first; one that does not match its manifest is renamed to `*.corrupt` with a warning. `best.json` and
`last.json` point to two checkpoints that rotation keeps.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.data.encoded import file_sha256
from tunesmith.errors import CheckpointError, NumericError, shorten
from tunesmith.storage.files import atomic_write, disk_error, free_bytes, fsync_file, fsync_folder, remove_leftovers

SCHEMA = 1
MANIFEST = "MANIFEST.json"
_STEP = re.compile(r"step-(\d{6,})")
Warn = Callable[[str], None]


class NewerSchema(CheckpointError):
    """An intact checkpoint of a newer version: never renamed to `*.corrupt`."""


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after one step. `tensors` maps file stem -> name -> tensor."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    identity: dict[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return folder / f"step-{step:06d}"


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> Path:
    """Write `folder/step-...` and return its path; keep an intact checkpoint of the same step.

    Raises:
        ResourceError: the disk is full or not writable; earlier checkpoints are untouched.
        NumericError: a tensor has a NaN or infinite value.
    """
    for name, tensor in ((name, tensor) for named in tensors.values() for name, tensor in named.items()):
        if not tensor.isfinite().all():
            hint = "lower the learning rate and --resume from the last checkpoint, which is intact"
            raise NumericError(f"step {step}: {name} has NaN or infinite values; no checkpoint saved", hint=hint)
    target = path_of(folder, step)
    if target.exists():
        try:
            _verify(target)
            return target
        except CheckpointError:
            _mark_corrupt(target, "incomplete")
    needed = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
    temporary = folder / f".tmp-{step:06d}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if free_bytes(folder) < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write(temporary, tensors, state, step, identity)
        os.rename(temporary, target)
        fsync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, target, needed) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    step: int,
    identity: Mapping[str, Any],
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for stem, named in tensors.items():
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        save_file(on_cpu, folder / f"{stem}.safetensors")
    (folder / "state.json").write_text(json.dumps(dict(state), allow_nan=False), encoding="utf-8")
    files = {}
    for path in sorted(folder.iterdir()):
        fsync_file(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = {"schema": SCHEMA, "step": step, "identity": dict(identity), "files": files}
    manifest["sha256"] = _digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    fsync_file(folder / MANIFEST)
    fsync_folder(folder)


def _digest(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest's other keys, which it has under `sha256`."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying every byte of it.

    Raises:
        CheckpointError: a file is missing, changed or unreadable.
    """
    manifest = _verify(path)
    tensors, state = {}, {}
    for name in manifest["files"]:
        file = path / name
        if file.suffix == ".safetensors":
            tensors[file.stem] = load_file(file)
        elif name == "state.json":
            state = json.loads(file.read_text(encoding="utf-8"))
    return Checkpoint(manifest["step"], tensors, state, manifest["identity"])


def _verify(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError("not a checkpoint folder", where=str(path))
    manifest = _manifest(path / MANIFEST)
    match = _STEP.fullmatch(path.name)
    if match is None or int(match[1]) != manifest["step"]:
        raise CheckpointError(f"{MANIFEST} belongs to step {manifest['step']}", where=str(path))
    for name, expected in manifest["files"].items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise CheckpointError("missing", where=str(file))
        if (size := file.stat().st_size) != expected["size"]:
            raise CheckpointError(f"{size:,} bytes instead of {expected['size']:,}", where=str(file))
        if file_sha256(file) != expected["sha256"]:
            raise CheckpointError("its content has changed (sha256 differs)", where=str(file))
    return manifest


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema, files, step = manifest["schema"], manifest["files"], manifest["step"]
        valid = isinstance(schema, int) and isinstance(step, int) and isinstance(manifest["identity"], dict)
        valid = valid and "state.json" in files and all({"size", "sha256"} <= set(entry) for entry in files.values())
        valid = valid and all(re.fullmatch(r"[\w-]+\.(safetensors|json)", name) for name in files)
    except FileNotFoundError:
        raise CheckpointError("missing: the checkpoint is incomplete", where=str(path)) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"cannot be read ({type(error).__name__})", where=str(path)) from None
    if path.is_symlink():
        raise CheckpointError("a symbolic link, not a file", where=str(path))
    if manifest.get("sha256") != _digest(manifest):  # first: one bit makes schema 1 a newer one
        raise CheckpointError("its content has changed (sha256 differs)", where=str(path))
    if schema > SCHEMA:
        raise NewerSchema(f"written by a newer tunesmith (schema {schema})", where=str(path), hint="upgrade tunesmith")
    if not valid:
        raise CheckpointError("not a checkpoint manifest", where=str(path))
    return dict(manifest)


def newest(folder: Path, warn: Warn) -> Checkpoint | None:
    """Load the newest intact checkpoint; return None if none was ever written.

    Raises:
        CheckpointError: every checkpoint is damaged, or the newest was written by a newer version.
    """
    remove_leftovers(folder)
    reasons = []
    for path in _steps(folder):
        try:
            return load(path)
        except NewerSchema:
            raise
        except CheckpointError as error:
            reasons.append(str(error))
            renamed = _mark_corrupt(path, str(error))
            warn(f"{error}; damaged checkpoint renamed to {renamed.name}, using the one before it")
    if reasons or (folder.is_dir() and any(".corrupt" in path.name for path in folder.iterdir())):
        hint = f"restart with --overwrite, or restore the newest in {folder}"
        raise CheckpointError("no intact checkpoint" + "".join(f"; {r}" for r in reasons[:2]), hint=hint)
    return None


def best(folder: Path, warn: Warn) -> Checkpoint | None:
    """Load the checkpoint that `best.json` points to; if it is damaged, warn and load the newest intact one."""
    path = read_pointer(folder, "best")
    if path is not None:
        try:
            return load(path)
        except CheckpointError as error:
            warn(f"{error}; the best checkpoint is damaged, using the newest intact one")
    return newest(folder, warn)


def _steps(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first by step number (file times may be wrong)."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STEP.fullmatch(path.name)), key=_number, reverse=True)


def _number(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _mark_corrupt(path: Path, reason: str) -> Path:
    """Rename a damaged checkpoint, and write the reason into it."""
    count = 1
    while (renamed := path.with_name(f"{path.name}.corrupt" + (f"-{count}" if count > 1 else ""))).exists():
        count += 1
    os.rename(path, renamed)
    if renamed.is_dir() and not renamed.is_symlink():
        (renamed / "REASON.txt").write_text(reason + "\n", encoding="utf-8")
    return renamed


def write_pointer(folder: Path, name: str, target: Path) -> None:
    """Make `name` (best or last) point to a checkpoint, in one atomic write."""
    atomic_write(folder / f"{name}.json", json.dumps({"step": _number(target), "folder": target.name}) + "\n")


def read_pointer(folder: Path, name: str) -> Path | None:
    """Return the checkpoint that `name` (best or last) points to; None if it is missing or unreadable."""
    try:
        step = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["step"]
        return path_of(folder, int(step))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rotate(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep`, best and last, provided that the newest is intact.

    Raises:
        CheckpointError: the newest is damaged; nothing is deleted.
    """
    paths = _steps(folder)
    if not paths:
        return
    _verify(paths[0])
    kept = {*paths[:keep], read_pointer(folder, "best"), read_pointer(folder, "last")}
    for path in paths:
        if path not in kept:
            trash = folder / f".trash-{path.name}-{os.getpid()}"
            os.rename(path, trash)
            shutil.rmtree(trash, ignore_errors=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> (old, new) of every leaf that differs between two trees."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed |= differences(before, after, f"{prefix}{key}.")
        elif before != after:
            changed[f"{prefix}{key}"] = (before, after)
    return changed


def check_same_run(
    old: Mapping[str, Any], new: Mapping[str, Any], overrides: Collection[str], files: Mapping[str, str] | None = None
) -> list[str]:
    """Return the keys that differ and are overridden; `files` maps keys of hashes to the files they belong to.

    Raises:
        CheckpointError: a key differs that is not overridden; the message has all of them.
    """
    changed = differences(old, new)
    accepted = [key for key in changed if any(key == over or key.startswith(f"{over}.") for over in overrides)]
    refused = [key for key in changed if key not in accepted]
    if refused:
        messages = {
            key: f"{key} was {shorten(before)}, is {shorten(after)}" for key, (before, after) in changed.items()
        }
        messages |= {
            key: f"{key} was '{str(changed[key][0])[:12]}…', is '{str(changed[key][1])[:12]}…': {file} has changed"
            for key, file in (files or {}).items()
            if key in changed
        }
        listed = "; ".join(messages[key] for key in refused)
        flags = " ".join(f"--override {key}" for key in refused)
        raise CheckpointError(f"not the same run: {listed}", hint=f"change it back, or resume with {flags}")
    return accepted


def check_fits(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], overridden: Collection[str]) -> None:
    """Check that a checkpoint has the parameters that are trainable now, in the same shapes.

    Raises:
        CheckpointError: it does not; the message has the first such parameter and the overridden keys.
    """
    own_shapes, saved_shapes = ({name: tuple(tensor.shape) for name, tensor in part.items()} for part in (own, saved))
    names = own_shapes.keys() | saved_shapes.keys()
    differing = sorted(name for name in names if own_shapes.get(name) != saved_shapes.get(name))
    if differing:
        cause = f"{', '.join(overridden)} changes them" if overridden else "they differ in this version"
        raise CheckpointError(
            f"the checkpoint does not fit the trainable parameters, first {differing[0]}: {cause}",
            hint="change it back, or start a new run",
        )
