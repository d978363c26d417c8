"""Cached features: the states that cross from the frozen blocks to the trained ones, computed once.

Blocks below the lowest trained parameter run in eval mode, so that they are a fixed function of an example; from the
second epoch on, and in every validation, their part of the arithmetic is gone. A head alone is one pass and a small
problem (as SetFit's, Tunstall 2022, arXiv 2209.11055; for blocks: AutoFreeze, Liu 2021, arXiv 2102.01386).

States are kept without padding, memory-mapped, keyed by content. It works with and without the fast paths, for padded
models too, and for the encoder of an encoder-decoder. Where inputs are drawn anew in each epoch (masking, augmentation)
they are the draws `epoch mod DRAWS`, cached or not, wherever there are frozen blocks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith.data.batches import Batch, Limits, collate
from tunesmith.data.batches import cut as cut_by_cost
from tunesmith.data.encoded import Encoded, VariableLength, encode
from tunesmith.kernels.fast_path import fast_path
from tunesmith.kernels.last_block import LastBlock, select_queries
from tunesmith.kernels.layout import Layout
from tunesmith.kernels.unpadded import layout_in
from tunesmith.models.anatomy import Anatomy
from tunesmith.tasks import BoundTask
from tunesmith.training.machine import Machine

MAX_BYTES = 16 * 2**30
"""Of the features of all runs together; the oldest are removed first."""

MAX_DISK_SHARE = 0.25
"""Of the free disk space, for the features of one set of examples."""

LIMITS = {"cpu": Limits(64, 4096, 64), "cuda": Limits(512, 65536, 4096)}
"""Of a batch without gradients."""

NUM_CHECKED = 8
"""Examples whose outputs must stay the same with cached features."""

FP32_TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2
"""Relative distance of outputs with cached features, at most."""

DRAWS = 4
"""Different draws of inputs that are not deterministic, where there are frozen blocks."""

MASKS = ("attention_mask", "decoder_attention_mask")
"""The arguments that hold the valid tokens of the first stack of blocks and of the second."""

Indices = NDArray[np.int64]
Key = tuple[str, int, int]
"""Examples, seed and draw."""


class _Recorded(Exception):
    """The states are there; the rest of the forward pass is not needed."""


class _NotCached(Exception):
    """Features cannot be cached; says why."""


class _OtherOutputs(_NotCached):
    """A block hands on other tensors beside its states, which differ with the batch."""


@dataclass
class Cut:
    """The last frozen block of one stack of blocks: its output crosses to the trained part."""

    block: str
    mask: str
    """The argument of the model that says which tokens are valid."""

    last_block: LastBlock | None = None
    """What the head reads, where this is the last block of the model."""

    recorded: Tensor | None = None
    current: Tensor | None = None
    """The states of the batch at hand.  # (valid tokens, width)"""


@dataclass
class Features:
    """The frozen blocks of one model, and the states that stand in for them."""

    cuts: list[Cut]
    blocks: set[str]
    """The blocks that states stand in for."""

    kept: dict[Key, Encoded] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    """The width of each embedding module's output."""

    masks: dict[str, Tensor | None] = field(default_factory=dict)
    """Those of the forward pass at hand."""

    recording: bool = False

    @property
    def standing_in(self) -> bool:
        """Whether states stand in for blocks now."""
        return self.cuts[0].current is not None


_FEATURES: WeakKeyDictionary[nn.Module, Features] = WeakKeyDictionary()


def features_of(model: nn.Module) -> Features | None:
    """The frozen blocks of a model, where `use_features` has prepared them."""
    return _FEATURES.get(model)


def level_of(anatomy: Anatomy, trained: Sequence[str]) -> int:
    """The number of blocks below every trained parameter."""
    return max(0, min((anatomy.depth_of(name) for name in trained), default=0) - 1)


def draws_of(task: BoundTask, level: int) -> int | None:
    """The number of different draws of a task's inputs; None where each epoch has its own."""
    return 1 if task.deterministic_inputs else DRAWS if level else None


def use_features(model: Any, anatomy: Anatomy, level: int) -> None:
    """Let states stand in for the lowest `level` blocks of a model, whenever `standing_in` provides them."""
    if not level:
        return
    stacks: dict[str, list[str]] = {}
    for block in anatomy.blocks[:level]:
        stacks.setdefault(block.rpartition(".")[0], []).append(block)
    cuts = [Cut(blocks[-1], mask) for blocks, mask in zip(stacks.values(), MASKS, strict=False)]
    if level == len(anatomy.blocks):
        cuts[-1].last_block = fast_path(model).last_block
    features = Features(cuts, set(anatomy.blocks[:level]))
    if len(stacks) == 1 and not getattr(model.config, "is_encoder_decoder", False):
        for path in anatomy.embeddings:  # those of an encoder-decoder are shared with its trained part
            module = model.get_submodule(path)
            module.forward = _embedding(features, path, module.forward)
    by_block = {cut.block: cut for cut in cuts}
    ends = {block.rpartition(".")[0]: block for block in anatomy.blocks}.values()
    for block in anatomy.blocks[:level]:
        module = model.get_submodule(block)
        module.forward = _block(features, block, module.forward, by_block.get(block), ends_stack=block in ends)
    model.register_forward_pre_hook(_masks(features), with_kwargs=True)
    _FEATURES[model] = features


def _masks(features: Features) -> Callable[..., Any]:
    """A hook that notes which tokens are valid, and passes on of each text the one token that a head reads."""

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        features.masks = {name: kwargs.get(name) for name in MASKS}
        cut = features.cuts[0]
        ids, mask, read = kwargs.get("input_ids"), kwargs.get("attention_mask"), cut.last_block
        if cut.current is None or read is None or read.reads not in ("begin", "end") or read.offset:
            return None
        if ids is None or mask is None or args or len(cut.current) != len(ids):
            return None  # on a GPU each token's states are kept
        place = torch.zeros_like(mask[:, :1]) if read.reads == "begin" else mask.sum(1, keepdim=True) - 1
        kwargs = {
            name: value.gather(1, place) if isinstance(value, Tensor) and value.shape == ids.shape else value
            for name, value in kwargs.items()
        }
        features.masks = {name: kwargs.get(name) for name in MASKS}
        return args, kwargs

    return hook


def _embedding(features: Features, path: str, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        tensors = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        shaped = next((one for one in tensors if one.ndim in (2, 3)), None)  # ids or embeddings, no pictures
        if not features.standing_in or shaped is None or path not in features.widths:
            out = inner(*args, **kwargs)
            if isinstance(out, Tensor):
                features.widths[path] = out.shape[-1]
            return out
        states = features.cuts[0].current
        assert states is not None, "states stand in"
        return states.new_zeros(1).expand(*shaped.shape[:2], features.widths[path])

    return forward


def _block(
    features: Features, path: str, inner: Callable[..., Any], cut: Cut | None, *, ends_stack: bool
) -> Callable[..., Any]:
    extras = 0

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal extras
        layout = layout_in(args, kwargs)
        if path not in features.blocks:
            return inner(hidden_states, *args, **kwargs)
        if features.standing_in:
            states = hidden_states if cut is None else _placed(cut, layout, features.masks[cut.mask], hidden_states)
            return (states, *[None] * extras) if extras else states
        out = inner(hidden_states, *args, **kwargs)
        if not features.recording:
            return out
        states, *more = out if isinstance(out, tuple) else (out,)
        extras = len(more)
        if cut is not None:
            if not ends_stack and any(isinstance(one, Tensor) for one in more):  # T5's position bias, say
                raise _OtherOutputs(f"{path} hands on more than states")
            cut.recorded = _flat(cut, layout, features.masks[cut.mask], states)
        if cut is features.cuts[-1]:
            raise _Recorded
        return out

    return forward


def _flat(cut: Cut, layout: Layout | None, mask: Tensor | None, states: Tensor) -> Tensor:
    """The states of valid tokens, row after row.  # (valid tokens, width)"""
    if layout is not None:
        places = _read(cut.last_block, layout)
        return states[0][: layout.total - layout.spare] if places is None else states[0][places]
    return states.flatten(0, -2) if mask is None else states[mask.bool()]


def _placed(cut: Cut, layout: Layout | None, mask: Tensor | None, hidden: Tensor) -> Tensor:
    """The inverse of `_flat`, with zeros where nothing is read."""
    states = cut.current
    assert states is not None, "states stand in"
    if layout is None:
        if mask is None:
            return states.view(len(hidden), -1, states.shape[-1])
        return states.new_zeros(*mask.shape, states.shape[-1]).masked_scatter(mask.bool()[..., None], states)
    places = _read(cut.last_block, layout)
    if places is None:
        return torch.cat([states, states.new_zeros(layout.total - len(states), states.shape[1])])[None]
    return states.new_zeros(layout.total, states.shape[1]).index_copy_(0, places, states)[None]


def _read(last_block: LastBlock | None, layout: Layout) -> Tensor | None:
    """The flat places of a last block's output that are read; None where all are."""
    wanted = None if last_block is None else last_block.needed(layout)
    return None if wanted is None else select_queries(layout, wanted)[0]


@contextmanager
def standing_in(model: nn.Module, encoded: Encoded, indices: Indices, seed: int = 0, draw: int = 0) -> Iterator[None]:
    """Let the states of these examples stand in for the frozen blocks, where they are kept.

    `seed` and `draw` are those of `BoundTask.transform`.
    """
    features = _FEATURES.get(model)
    kept = None if features is None else features.kept.get((encoded.key, seed, draw))
    if features is None or kept is None:
        yield
        return
    device = next(model.parameters()).device
    for cut, (states, _) in zip(features.cuts, kept.take(indices).values(), strict=True):
        dtype, tensor = features.dtypes[cut.block], torch.from_numpy(states)
        cut.current = (tensor.view(dtype) if dtype != tensor.dtype else tensor).to(device)
    try:
        yield
    finally:
        for cut in features.cuts:
            cut.current = None


def keep_features(
    model: nn.Module,
    task: BoundTask,
    encoded: Encoded,
    machine: Machine,
    folder: Path,
    say: Callable[[str], None],
    seed: int = 0,
    draw: int = 0,
) -> bool:
    """Compute the states of some examples, or open them where they are; returns whether they are used from now on."""
    features = _FEATURES[model]
    model.eval()
    checked, key = np.arange(min(NUM_CHECKED, len(encoded))), (encoded.key, seed, draw)
    try:
        first = _first(features, model, task, encoded, machine, checked, seed, draw)
        features.dtypes = {cut.block: states.dtype for cut, states in zip(features.cuts, first[0], strict=True)}
        bytes_each = sum(states.nbytes for example in first for states in example) / len(first)
        _check_room(bytes_each * len(encoded), folder)

        def states_of(indices: list[int]) -> list[dict[str, Any]]:
            found = _record(model, task, encoded, machine, np.asarray(indices), seed, draw)
            return [{f"states{n}": VariableLength(_array(one)) for n, one in enumerate(each)} for each in found]

        features.kept[key] = encode(range(len(encoded)), states_of, folder)
        os.utime(folder)  # used now
        if not _same(model, task, encoded, machine, checked, seed, draw):
            raise _NotCached("outputs with cached features differ")
    except _NotCached as why:
        features.kept.pop(key, None)
        say(f"frozen features are not cached: {why}; the frozen blocks are computed in each epoch")
        return False
    return True


def _first(features: Features, model: nn.Module, *args: Any) -> list[list[Tensor]]:
    """The states of the first examples; without the second stack, where its blocks hand on more than states."""
    try:
        return _record(model, *args)
    except _OtherOutputs:
        if len(features.cuts) == 1:
            raise
    stack = features.cuts.pop().block.rpartition(".")[0]
    features.blocks = {block for block in features.blocks if block.rpartition(".")[0] != stack}
    return _record(model, *args)


def _check_room(needed: float, folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if needed > min(MAX_DISK_SHARE * shutil.disk_usage(existing).free, MAX_BYTES):
        raise _NotCached(f"they would take {needed / 2**30:.1f} GiB on the disk")


def _array(states: Tensor) -> NDArray[Any]:
    """States as NumPy holds them: bf16, which it lacks, as int16."""
    return states.view(torch.int16).numpy() if states.dtype.itemsize == 2 else states.numpy()


def prune(home: Path) -> None:
    """Remove the features that have not been used for longest until what is kept is within `MAX_BYTES`."""
    folders = sorted((path for path in home.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.glob("*")) for path in folders}
    total = sum(sizes.values())
    for path in folders:
        if total > MAX_BYTES:
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]


def _record(
    model: nn.Module, task: BoundTask, encoded: Encoded, machine: Machine, indices: Indices, seed: int, draw: int
) -> list[list[Tensor]]:
    """The states of each example at every cut.

    Raises:
        _NotCached: they cannot be told apart by example.
    """
    features = _FEATURES[model]
    states: dict[int, list[Tensor]] = {}
    limits = LIMITS.get(machine.device.type, LIMITS["cpu"])
    order = indices[np.argsort(encoded.costs[indices], kind="stable")]
    for first, last in cut_by_cost(encoded.costs[order], limits):
        own = order[first:last]
        batch = task.transform(collate(encoded, own), own, seed, draw).to(machine.device)
        _forward(features, model, task, batch, machine)
        for one in features.cuts:
            if one.recorded is None:
                raise _NotCached(f"the output of {one.block} is not read")
            counts = _counts(batch, len(one.recorded))
            for index, part in zip(own.tolist(), one.recorded.cpu().split(counts), strict=True):
                states.setdefault(index, []).append(part.contiguous())
            one.recorded = None
    return [states[int(index)] for index in indices]


def _forward(features: Features, model: nn.Module, task: BoundTask, batch: Batch, machine: Machine) -> None:
    """One forward pass up to the last cut, recorded."""
    features.recording = True
    try:
        with torch.no_grad(), machine.autocast():
            task.outputs(model, batch)
    except _Recorded:
        pass
    finally:
        features.recording = False


def _counts(batch: Batch, rows: int) -> list[int]:
    """The number of states of each example: one a token, one a text or window, or as many for each (pictures)."""
    fields = [batch.ragged(name).lengths.tolist() for name in ("input_ids", "label") if _is_ragged(batch, name)]
    fields.append(batch.ragged("windows").lengths.tolist() if "windows" in batch else [1] * batch.size)
    fields.append([rows // batch.size] * batch.size)
    for counts in fields:
        if sum(counts) == rows:
            return counts
    raise _NotCached("states cannot be told apart by example")


def _is_ragged(batch: Batch, name: str) -> bool:
    return name in batch and not isinstance(batch.fields[name], Tensor)


@torch.no_grad()
def _same(
    model: nn.Module, task: BoundTask, encoded: Encoded, machine: Machine, indices: Indices, seed: int, draw: int
) -> bool:
    """Whether the model's outputs are as before with cached features."""
    batch = task.transform(collate(encoded, indices), indices, seed, draw).to(machine.device)
    with machine.autocast():
        expected = task.outputs(model, batch)
        try:
            with standing_in(model, encoded, indices, seed, draw):
                outputs = task.outputs(model, batch)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise _NotCached(f"{type(error).__name__}: {error}") from error
    tolerance = FP32_TOLERANCE if machine.autocast_dtype is None else HALF_TOLERANCE
    return bool(torch.dist(outputs.float(), expected.float()) <= tolerance * (1e-6 + expected.float().norm()))
