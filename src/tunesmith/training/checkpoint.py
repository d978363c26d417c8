"""Checkpoints that can be trusted: complete or absent, verified before use, never a pickle.

A checkpoint is a folder `step-000120` of safetensors files and `state.json`, and `MANIFEST.json` written last with the
size and sha256 of every file. It is written into `.tmp-...`, fsynced and renamed. Whoever loads walks from the newest
to the oldest; what does not match its manifest is set aside as `*.corrupt` and said. `best.json` and `last.json` name
two checkpoints that are never rotated away.
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
from tunesmith.training.files import atomic_write, free_bytes, fsync_file, fsync_folder, out_of_space, sweep

SCHEMA = 1
MANIFEST = "MANIFEST.json"
_STEP = re.compile(r"step-(\d{6,})")
Say = Callable[[str], None]


class NewerSchema(CheckpointError):
    """Sound, but not for us to read: never set aside."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after a step. `tensors`: file stem -> name -> tensor."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    identity: dict[str, Any]


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:06d}"


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> Path:
    """Write `folder/step-...` and return it; a valid one of that step is left as it is.

    Raises:
        ResourceError: the disk is full; what was there before is untouched.
        NumericError: there is a value that is not finite.
    """
    for name, tensor in ((name, tensor) for named in tensors.values() for name, tensor in named.items()):
        if not tensor.isfinite().all():
            hint = "a lower learning rate; --resume goes on from the last checkpoint, which is sound"
            raise NumericError(f"after step {step} {name} is not finite, so it is not saved", hint=hint)
    target = place(folder, step)
    if target.exists():
        try:
            _verify(target)
            return target
        except CheckpointError:
            _set_aside(target, "incomplete")
    needed = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
    writing = folder / f".tmp-{step:06d}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if free_bytes(folder) < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write(writing, tensors, state, step, identity)
        os.rename(writing, target)
        fsync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise out_of_space(error, target, needed) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return target


def _write(
    writing: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    step: int,
    identity: Mapping[str, Any],
) -> None:
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    for stem, named in tensors.items():
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        save_file(held, writing / f"{stem}.safetensors")
    (writing / "state.json").write_text(json.dumps(dict(state), allow_nan=False), encoding="utf-8")
    files = {}
    for path in sorted(writing.iterdir()):
        fsync_file(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = {"schema": SCHEMA, "step": step, "identity": dict(identity), "files": files}
    manifest["sha256"] = _digest(manifest)
    (writing / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    fsync_file(writing / MANIFEST)
    fsync_folder(writing)


def _digest(manifest: Mapping[str, Any]) -> str:
    """What the manifest says of itself: the sha256 of all its other keys."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every byte of it.

    Raises:
        CheckpointError: names the file and what is wrong with it.
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
        raise CheckpointError("not a folder of our own", where=str(path))
    manifest = _manifest(path / MANIFEST)
    match = _STEP.fullmatch(path.name)
    if match is None or int(match[1]) != manifest["step"]:
        raise CheckpointError(f"{MANIFEST} is of step {manifest['step']}", where=str(path))
    for name, expected in manifest["files"].items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise CheckpointError("missing", where=str(file))
        if (size := file.stat().st_size) != expected["size"]:
            raise CheckpointError(f"{size:,} bytes, not {expected['size']:,}", where=str(file))
        if file_sha256(file) != expected["sha256"]:
            raise CheckpointError("its content has changed (sha256 differs)", where=str(file))
    return manifest


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema, files, step = manifest["schema"], manifest["files"], manifest["step"]
        sane = isinstance(schema, int) and isinstance(step, int) and isinstance(manifest["identity"], dict)
        sane = sane and "state.json" in files and all({"size", "sha256"} <= set(entry) for entry in files.values())
        sane = sane and all(re.fullmatch(r"[\w-]+\.(safetensors|json)", name) for name in files)
    except FileNotFoundError:
        raise CheckpointError("missing: the checkpoint was not finished", where=str(path)) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"cannot be read ({type(error).__name__})", where=str(path)) from None
    if path.is_symlink():
        raise CheckpointError("a link, not a file of our own", where=str(path))
    if manifest.get("sha256") != _digest(manifest):  # first: one bit makes schema 1 a newer one
        raise CheckpointError("its content has changed (sha256 differs)", where=str(path))
    if schema > SCHEMA:
        raise NewerSchema(f"written by a newer tunesmith (schema {schema})", where=str(path), hint="upgrade tunesmith")
    if not sane:
        raise CheckpointError("not a manifest of ours", where=str(path))
    return dict(manifest)


def newest(folder: Path, say: Say) -> Checkpoint | None:
    """The newest checkpoint that can be trusted; None where none was ever written.

    Raises:
        CheckpointError: there were checkpoints and not one is sound, or the newest is one of a newer tunesmith.
    """
    sweep(folder)
    reasons = []
    for path in _steps(folder):
        try:
            return load(path)
        except NewerSchema:
            raise
        except CheckpointError as error:
            reasons.append(str(error))
            aside = _set_aside(path, str(error))
            say(f"{error}: this checkpoint cannot be trusted (set aside as {aside.name}), taking the one before it")
    if reasons or (folder.is_dir() and any(".corrupt" in path.name for path in folder.iterdir())):
        hint = f"start afresh with --overwrite, or mend the newest under {folder}"
        raise CheckpointError("no checkpoint can be trusted" + "".join(f"; {r}" for r in reasons[:2]), hint=hint)
    return None


def best(folder: Path, say: Say) -> Checkpoint | None:
    """The checkpoint that `best.json` names; where it is damaged, the newest sound one, and that is said."""
    path = pointed(folder, "best")
    if path is not None:
        try:
            return load(path)
        except CheckpointError as error:
            say(f"{error}: the best checkpoint cannot be trusted, taking the newest that can")
    return newest(folder, say)


def _steps(folder: Path) -> list[Path]:
    """Newest first, by step number: clocks may jump."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STEP.fullmatch(path.name)), key=_number, reverse=True)


def _number(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _set_aside(path: Path, reason: str) -> Path:
    count = 1
    while (aside := path.with_name(f"{path.name}.corrupt" + (f"-{count}" if count > 1 else ""))).exists():
        count += 1
    os.rename(path, aside)
    if aside.is_dir() and not aside.is_symlink():
        (aside / "REASON.txt").write_text(reason + "\n", encoding="utf-8")
    return aside


def point(folder: Path, name: str, target: Path) -> None:
    """Let `name` (best or last) be that checkpoint, in one atomic replacement."""
    atomic_write(folder / f"{name}.json", json.dumps({"step": _number(target), "folder": target.name}) + "\n")


def pointed(folder: Path, name: str) -> Path | None:
    """The checkpoint that a pointer names; None where there is no pointer or it cannot be read."""
    try:
        step = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["step"]
        return place(folder, int(step))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`, best and last; nothing goes unless the newest is sound."""
    found = _steps(folder)
    if not found:
        return
    _verify(found[0])
    held = {*found[:keep], pointed(folder, "best"), pointed(folder, "last")}
    for path in found:
        if path not in held:
            trash = folder / f".trash-{path.name}-{os.getpid()}"
            os.rename(path, trash)
            shutil.rmtree(trash, ignore_errors=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) of every leaf that differs."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        was, now = old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found |= differences(was, now, f"{prefix}{key}.")
        elif was != now:
            found[f"{prefix}{key}"] = (was, now)
    return found


def check_same_run(
    old: Mapping[str, Any], new: Mapping[str, Any], overrides: Collection[str], files: Mapping[str, str] | None = None
) -> list[str]:
    """The keys that differ and are overridden; `files` are those that some keys speak of.

    Raises:
        CheckpointError: names each difference that is not.
    """
    found = differences(old, new)
    accepted = [key for key in found if any(key == over or key.startswith(f"{over}.") for over in overrides)]
    refused = [key for key in found if key not in accepted]
    if refused:
        said = {key: f"{key} was {shorten(was)}, is {shorten(now)}" for key, (was, now) in found.items()}
        said |= {
            key: f"{key} was '{str(found[key][0])[:12]}…', is '{str(found[key][1])[:12]}…': {file} has changed"
            for key, file in (files or {}).items()
            if key in found
        }
        listed = "; ".join(said[key] for key in refused)
        hint = " ".join(f"--override {key}" for key in refused)
        raise CheckpointError(f"this would not be the same run: {listed}", hint=f"change it back, or go on with {hint}")
    return accepted


def check_fits(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], overridden: Collection[str]) -> None:
    """Refuse a checkpoint of other parameters than those that learn now.

    Raises:
        CheckpointError: names the first, and what was overridden.
    """
    shapes, others = ({name: tuple(one.shape) for name, one in part.items()} for part in (own, saved))
    differ = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
    if differ:
        what = f"with {', '.join(overridden) or 'this version'} changed other parameters learn, first {differ[0]}"
        raise CheckpointError(f"{what}: the checkpoint does not fit", hint="change it back, or start a new run")
