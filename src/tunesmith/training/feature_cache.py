"""What the frozen lower blocks give, computed once: memory-mapped, keyed by content, read in every later pass.

Blocks below the lowest parameter that learns run in eval mode, so that they are a fixed function of an example; from
the second epoch on, and in every validation, their part of the arithmetic is gone. A head alone is one pass and a small
problem (as SetFit's, Tunstall 2022, arXiv 2209.11055; for blocks: AutoFreeze, Liu 2021, arXiv 2102.01386).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.data.batches import Batch, Limits, collate, cut
from tunesmith.data.encoded import Encoded, encode
from tunesmith.kernels.fast_path import fast_path
from tunesmith.kernels.last_block import LastBlock, select_queries
from tunesmith.kernels.layout import Layout
from tunesmith.kernels.unpadded import layout_in
from tunesmith.models.anatomy import Anatomy
from tunesmith.tasks import Task
from tunesmith.training.machine import Machine

KEPT_BYTES = 16 * 2**30
"""Of all runs together; the oldest go first."""

DISK_SHARE = 0.25
"""Of what is free on the disk, that one set of states may take."""

LIMITS = {"cpu": Limits(64, 4096, 64), "cuda": Limits(512, 65536, 4096)}
"""Of a batch that is only asked, not learned from."""

TRIED = 8
"""Examples whose answers must stay the same."""


class _Enough(Exception):
    """The states are there, and what stands above is not asked."""


@dataclass
class Features:
    """The states that stand in for the lower blocks of one model."""

    level: int
    """How many blocks they stand for."""

    kept: dict[Path, Encoded] = field(default_factory=dict)
    """By the folder of the examples."""

    widths: dict[str, int] = field(default_factory=dict)
    """What each embedding module gives for a token."""

    width: int = 0
    dtype: torch.dtype | None = None
    """Of a state."""

    recorded: Tensor | None = None
    recording: bool = False
    states: Tensor | None = None
    """Of the batch that is asked now.  # (tokens, width)"""


def level_of(anatomy: Anatomy, learned: Sequence[str]) -> int:
    """How many blocks stand below everything that ever learns."""
    return max(0, min((anatomy.depth_of(name) for name in learned), default=0) - 1)


def use_features(model: Any, anatomy: Anatomy, level: int) -> None:
    """Let states stand in for the lowest `level` blocks of a padding-free model, where it is asked for."""
    if not level or not fast_path(model).unpadded or model.config.is_encoder_decoder:
        return  # a decoder's embeddings stand above its encoder's blocks
    features = Features(level)
    for path in anatomy.embeddings:
        module = model.get_submodule(path)
        module.forward = _embedding(features, path, module.forward)
    for place, path in enumerate(anatomy.blocks[:level], start=1):
        block = model.get_submodule(path)
        tail = fast_path(model).last_block if place == len(anatomy.blocks) else None
        block.forward = _block(features, block.forward, tail, top=place == level)
        if tail is not None and tail.reads in ("begin", "end") and not tail.offset:
            model.register_forward_pre_hook(partial(_read_alone, features, tail.reads), with_kwargs=True)
    model.frozen_features = features


def _read_alone(features: Features, reads: str, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Of a text whose blocks are all stood in for, the one token that the head reads."""
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if features.states is None or ids is None or mask is None or args or len(features.states) != len(ids):
        return None  # on a GPU each token's states are kept
    place = torch.zeros_like(mask[:, :1]) if reads == "begin" else mask.sum(1, keepdim=True) - 1
    return args, {
        name: value.gather(1, place) if isinstance(value, Tensor) and value.shape == ids.shape else value
        for name, value in kwargs.items()
    }


def _embedding(features: Features, path: str, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if features.states is None:
            out = inner(*args, **kwargs)
            features.widths[path] = out.shape[-1]
            return out
        shaped = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.ndim >= 2)
        return features.states.new_zeros(1).expand(*shaped.shape[:2], features.widths[path])

    return forward


def _block(features: Features, inner: Callable[..., Any], tail: LastBlock | None, *, top: bool) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout = layout_in(args, kwargs)
        if layout is None or (features.states is None and not features.recording):
            return inner(hidden_states, *args, **kwargs)
        if features.states is not None:
            return _placed(features.states, layout, _read(tail, layout)) if top else hidden_states
        out = inner(hidden_states, *args, **kwargs)
        if not top:
            return out
        states, places = (out[0] if isinstance(out, tuple) else out)[0], _read(tail, layout)
        features.recorded = states[: layout.total - layout.spare] if places is None else states[places]
        raise _Enough

    return forward


def _read(tail: LastBlock | None, layout: Layout) -> Tensor | None:
    """The flat places that are read of a last block; None where all are."""
    wanted = None if tail is None else tail.needed(layout)
    return None if wanted is None else select_queries(layout, wanted)[0]


def _placed(states: Tensor, layout: Layout, places: Tensor | None) -> Tensor:
    """(1, total, width), zero where nothing is read."""
    if places is None:
        return torch.cat([states, states.new_zeros(layout.total - len(states), states.shape[1])])[None]
    return states.new_zeros(layout.total, states.shape[1]).index_copy_(0, places, states)[None]


@contextmanager
def standing_in(model: Any, encoded: Encoded, indices: NDArray[np.int64]) -> Iterator[None]:
    """The model's states of these examples stand in for its lower blocks, where they are kept."""
    features: Features | None = getattr(model, "frozen_features", None)
    kept = None if features is None else features.kept.get(encoded.folder)
    if features is None or kept is None:
        yield
        return
    flat, _ = kept.take(indices)["states"]
    states = torch.from_numpy(flat)
    assert features.dtype is not None, "it was recorded"
    states = states.view(features.dtype) if features.dtype != states.dtype else states
    features.states = states.view(-1, features.width).to(next(model.parameters()).device)
    try:
        yield
    finally:
        features.states = None


def keep_features(
    model: Any, task: Task, encoded: Encoded, machine: Machine, folder: Path, say: Callable[[str], None]
) -> bool:
    """Compute the states of some examples, or open them where they are; whether they are used from now on."""
    features: Features = model.frozen_features
    model.eval()
    tried = np.arange(min(TRIED, len(encoded)))
    first = _record(model, task, encoded, machine, tried)
    if first is None:
        return False
    width, dtype = first[0].shape[1], first[0].dtype
    tokens = sum(len(one) for one in first) / len(first) * len(encoded)
    needed, free = tokens * width * dtype.itemsize, shutil.disk_usage(_existing(folder)).free
    if needed > min(DISK_SHARE * free, KEPT_BYTES):
        say(
            f"what the frozen blocks give would take {needed / 2**30:.1f} GiB on the disk: it is computed in each epoch"
        )
        return False
    features.width, features.dtype = width, dtype

    def states_of(indices: list[int]) -> list[dict[str, Any]]:
        found = _record(model, task, encoded, machine, np.asarray(indices))
        assert found is not None, "it was recorded for the first few"
        return [{"states": one.view(torch.int16 if dtype.itemsize == 2 else dtype).numpy().ravel()} for one in found]

    features.kept[encoded.folder] = encode(range(len(encoded)), states_of, folder)
    os.utime(folder)  # used now
    if not _same(model, task, encoded, machine, tried):
        del features.kept[encoded.folder]
        return False
    return True


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def prune(home: Path) -> None:
    """Remove the states that have not been used for longest until what is kept is within `KEPT_BYTES`."""
    folders = sorted((path for path in home.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.glob("*")) for path in folders}
    total = sum(sizes.values())
    for path in folders:
        if total > KEPT_BYTES:
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]


def _record(
    model: Any, task: Task, encoded: Encoded, machine: Machine, indices: NDArray[np.int64]
) -> list[Tensor] | None:
    """The states of each example; None where they are not one row a token (or one a text) in the examples' order."""
    found: dict[int, Tensor] = {}
    limits = LIMITS.get(machine.device.type, LIMITS["cpu"])
    order = indices[np.argsort(encoded.lengths[indices], kind="stable")]
    for first, last in cut(encoded.lengths[order], limits):
        own = order[first:last]
        batch = collate(encoded, own).to(machine.device)
        states = _flat_states(model, task, batch, machine)
        counts = None if states is None else _counts(batch, len(states))
        if states is None or counts is None:
            return None
        found |= zip(own.tolist(), states.split(counts), strict=True)
    return [found[int(index)] for index in indices]


def _flat_states(model: Any, task: Task, batch: Batch, machine: Machine) -> Tensor | None:
    features: Features = model.frozen_features
    features.recorded, features.recording = None, True
    try:
        with torch.no_grad(), machine.autocast():
            task.forward(model, batch)
    except _Enough:
        pass
    finally:
        features.recording = False
    states, features.recorded = features.recorded, None
    return None if states is None else states.cpu()


def _counts(batch: Batch, rows: int) -> list[int] | None:
    """How many of the states are each example's: one a token, or one a text or window."""
    windows = batch.ragged("windows").lengths.tolist() if "windows" in batch else [1] * batch.size
    for counts in (batch.ragged("input_ids").lengths.tolist(), windows):
        if sum(counts) == rows:
            return counts
    return None


@torch.no_grad()
def _same(model: Any, task: Task, encoded: Encoded, machine: Machine, indices: NDArray[np.int64]) -> bool:
    """Whether the model answers as before with states standing in."""
    batch = collate(encoded, indices).to(machine.device)
    with machine.autocast():
        kept = model.frozen_features.kept.pop(encoded.folder)
        expected = task.forward(model, batch)
        model.frozen_features.kept[encoded.folder] = kept
        try:
            with standing_in(model, encoded, indices):
                found = task.forward(model, batch)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return False
    return bool(torch.dist(found.float(), expected.float()) <= 0.01 * (1e-6 + expected.float().norm()))
