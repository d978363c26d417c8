"""Cached frozen features: the hidden states that enter the trained blocks, computed once.

Blocks below the lowest trained parameter run in eval mode, so that their output is a fixed function of the example.
From the second epoch on, and in every validation, they are skipped. Training a head alone takes one pass over the base
(compare SetFit, Tunstall 2022, arXiv 2209.11055; for blocks: AutoFreeze, Liu 2021, arXiv 2102.01386).

Hidden states are stored without padding in memory-mapped files, keyed by content. The cache works with and without the
fast paths, for padded inputs, and for the encoder of an encoder-decoder. Where inputs are random in each epoch
(masking), a model with frozen blocks uses the draws `epoch mod DRAWS`, whether or not they are cached.
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
"""Maximum size of the cached features of all runs; the least recently used are removed first."""

MAX_DISK_SHARE = 0.25
"""Maximum fraction of the free disk space for the features of one split."""

LIMITS = {"cpu": Limits(64, 4096, 64), "cuda": Limits(512, 65536, 4096)}
"""Limits of a batch without gradients."""

NUM_CHECKED = 8
"""Number of examples whose outputs are compared with and without cached features."""

FP32_TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2
"""Maximum relative distance between these outputs."""

DRAWS = 4
"""Number of different draws of random inputs, where there are frozen blocks."""

MASKS = ("attention_mask", "decoder_attention_mask")
"""The mask arguments of the first and the second stack of blocks."""

Indices = NDArray[np.int64]
Key = tuple[str, int, int]
"""(key of the examples, seed, draw)."""


class _Recorded(Exception):
    """Ends a forward pass once the states are recorded."""


class _NotCached(Exception):
    """Reason why features cannot be cached."""


class _OtherOutputs(_NotCached):
    """A block returns tensors besides its hidden states that depend on the batch."""


@dataclass
class Cut:
    """Last frozen block of one stack of blocks; its output enters the trained part."""

    block: str
    mask: str
    """The model's mask argument for the tokens of this stack."""

    last_block: LastBlock | None = None
    """The tokens that the head reads, if this is the last block of the model."""

    recorded: Tensor | None = None
    current: Tensor | None = None
    """Cached states of the current batch.  # (valid tokens, width)"""


@dataclass
class Features:
    """Frozen blocks of one model, and the cached states that replace them."""

    cuts: list[Cut]
    blocks: set[str]
    """The blocks that cached states replace."""

    cached: dict[Key, Encoded] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    """The width of each embedding module's output."""

    masks: dict[str, Tensor | None] = field(default_factory=dict)
    """The masks of the current forward pass."""

    recording: bool = False

    @property
    def in_use(self) -> bool:
        """True while cached states replace the blocks."""
        return self.cuts[0].current is not None


_FEATURES: WeakKeyDictionary[nn.Module, Features] = WeakKeyDictionary()


def features_of(model: nn.Module) -> Features | None:
    """Return the frozen blocks of a model, if `use_features` has prepared it."""
    return _FEATURES.get(model)


def level_of(anatomy: Anatomy, trained: Sequence[str]) -> int:
    """Return the number of blocks below the lowest trained parameter."""
    return max(0, min((anatomy.depth_of(name) for name in trained), default=0) - 1)


def draws_of(task: BoundTask, level: int) -> int | None:
    """Return the number of different draws of a task's inputs; None where every epoch has its own."""
    return 1 if task.deterministic_inputs else DRAWS if level else None


def use_features(model: Any, anatomy: Anatomy, level: int) -> None:
    """Prepare a model so that `cached_features` can replace its lowest `level` blocks by cached states."""
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
    """Return a hook that records the masks and keeps only the one token of each text that the head reads."""

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        features.masks = {name: kwargs.get(name) for name in MASKS}
        cut = features.cuts[0]
        ids, mask, last_block = kwargs.get("input_ids"), kwargs.get("attention_mask"), cut.last_block
        if cut.current is None or last_block is None or last_block.reads not in ("begin", "end") or last_block.offset:
            return None
        if ids is None or mask is None or args or len(cut.current) != len(ids):
            return None  # on a GPU the states of all tokens are cached
        position = torch.zeros_like(mask[:, :1]) if last_block.reads == "begin" else mask.sum(1, keepdim=True) - 1
        kwargs = {
            name: value.gather(1, position) if isinstance(value, Tensor) and value.shape == ids.shape else value
            for name, value in kwargs.items()
        }
        features.masks = {name: kwargs.get(name) for name in MASKS}
        return args, kwargs

    return hook


def _embedding(features: Features, path: str, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        tensors = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        shaped = next((one for one in tensors if one.ndim in (2, 3)), None)  # ids or embeddings, not pixels
        if not features.in_use or shaped is None or path not in features.widths:
            out = inner(*args, **kwargs)
            if isinstance(out, Tensor):
                features.widths[path] = out.shape[-1]
            return out
        states = features.cuts[0].current
        assert states is not None, "cached states are in use"
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
        if features.in_use:
            states = hidden_states if cut is None else _placed(cut, layout, features.masks[cut.mask], hidden_states)
            return (states, *[None] * extras) if extras else states
        out = inner(hidden_states, *args, **kwargs)
        if not features.recording:
            return out
        states, *more = out if isinstance(out, tuple) else (out,)
        extras = len(more)
        if cut is not None:
            if not ends_stack and any(isinstance(one, Tensor) for one in more):  # such as T5's position bias
                raise _OtherOutputs(f"{path} returns other tensors besides hidden states")
            cut.recorded = _flat(cut, layout, features.masks[cut.mask], states)
        if cut is features.cuts[-1]:
            raise _Recorded
        return out

    return forward


def _flat(cut: Cut, layout: Layout | None, mask: Tensor | None, states: Tensor) -> Tensor:
    """Return the states of the valid tokens, row after row.  # (valid tokens, width)"""
    if layout is not None:
        places = _read(cut.last_block, layout)
        return states[0][: layout.total - layout.spare] if places is None else states[0][places]
    return states.flatten(0, -2) if mask is None else states[mask.bool()]


def _placed(cut: Cut, layout: Layout | None, mask: Tensor | None, hidden: Tensor) -> Tensor:
    """Return the inverse of `_flat`, with zeros at unused positions."""
    states = cut.current
    assert states is not None, "cached states are in use"
    if layout is None:
        if mask is None:
            return states.view(len(hidden), -1, states.shape[-1])
        return states.new_zeros(*mask.shape, states.shape[-1]).masked_scatter(mask.bool()[..., None], states)
    places = _read(cut.last_block, layout)
    if places is None:
        return torch.cat([states, states.new_zeros(layout.total - len(states), states.shape[1])])[None]
    return states.new_zeros(layout.total, states.shape[1]).index_copy_(0, places, states)[None]


def _read(last_block: LastBlock | None, layout: Layout) -> Tensor | None:
    """Return the flat positions of the last block's output that the head reads; None for all."""
    wanted = None if last_block is None else last_block.needed(layout)
    return None if wanted is None else select_queries(layout, wanted)[0]


@contextmanager
def cached_features(
    model: nn.Module, encoded: Encoded, indices: Indices, seed: int = 0, draw: int = 0
) -> Iterator[None]:
    """Replace the frozen blocks by the cached states of these examples, if there are any.

    `seed` and `draw` are those of `BoundTask.transform`.
    """
    features = _FEATURES.get(model)
    cached = None if features is None else features.cached.get((encoded.key, seed, draw))
    if features is None or cached is None:
        yield
        return
    device = next(model.parameters()).device
    for cut, (states, _) in zip(features.cuts, cached.take(indices).values(), strict=True):
        dtype, tensor = features.dtypes[cut.block], torch.from_numpy(states)
        cut.current = (tensor.view(dtype) if dtype != tensor.dtype else tensor).to(device)
    try:
        yield
    finally:
        for cut in features.cuts:
            cut.current = None


def cache_features(
    model: nn.Module,
    task: BoundTask,
    encoded: Encoded,
    machine: Machine,
    folder: Path,
    say: Callable[[str], None],
    seed: int = 0,
    draw: int = 0,
) -> bool:
    """Compute the states of all examples, or open those on disk; return True if they are used from now on."""
    features = _FEATURES[model]
    model.eval()
    checked, key = np.arange(min(NUM_CHECKED, len(encoded))), (encoded.key, seed, draw)
    try:
        first = _first(features, model, task, encoded, machine, checked, seed, draw)
        features.dtypes = {cut.block: states.dtype for cut, states in zip(features.cuts, first[0], strict=True)}
        bytes_each = sum(states.nbytes for example in first for states in example) / len(first)
        _check_disk_space(bytes_each * len(encoded), folder)

        def states_of(indices: list[int]) -> list[dict[str, Any]]:
            recorded = _record(model, task, encoded, machine, np.asarray(indices), seed, draw)
            return [{f"states{n}": VariableLength(_array(one)) for n, one in enumerate(each)} for each in recorded]

        features.cached[key] = encode(range(len(encoded)), states_of, folder)
        os.utime(folder)  # marks it as recently used
        if not _outputs_agree(model, task, encoded, machine, checked, seed, draw):
            raise _NotCached("outputs with cached features differ")
    except _NotCached as why:
        features.cached.pop(key, None)
        say(f"frozen features are not cached: {why}; the frozen blocks run in every epoch")
        return False
    return True


def _first(features: Features, model: nn.Module, *args: Any) -> list[list[Tensor]]:
    """Record the first examples; drop the second stack if its blocks return more than hidden states."""
    try:
        return _record(model, *args)
    except _OtherOutputs:
        if len(features.cuts) == 1:
            raise
    stack = features.cuts.pop().block.rpartition(".")[0]
    features.blocks = {block for block in features.blocks if block.rpartition(".")[0] != stack}
    return _record(model, *args)


def _check_disk_space(needed: float, folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if needed > min(MAX_DISK_SHARE * shutil.disk_usage(existing).free, MAX_BYTES):
        raise _NotCached(f"they need {needed / 2**30:.1f} GiB of disk space")


def _array(states: Tensor) -> NDArray[Any]:
    """Return states as a NumPy array; bf16, which NumPy lacks, as int16."""
    return states.view(torch.int16).numpy() if states.dtype.itemsize == 2 else states.numpy()


def prune(home: Path) -> None:
    """Remove the least recently used features until the rest takes at most `MAX_BYTES`."""
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
    """Return the states of each example at every cut.

    Raises:
        _NotCached: the states cannot be assigned to examples.
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
                raise _NotCached(f"{one.block} did not run")
            counts = _counts(batch, len(one.recorded))
            for index, part in zip(own.tolist(), one.recorded.cpu().split(counts), strict=True):
                states.setdefault(index, []).append(part.contiguous())
            one.recorded = None
    return [states[int(index)] for index in indices]


def _forward(features: Features, model: nn.Module, task: BoundTask, batch: Batch, machine: Machine) -> None:
    """Run one forward pass up to the last cut and record the states."""
    features.recording = True
    try:
        with torch.no_grad(), machine.autocast():
            task.outputs(model, batch)
    except _Recorded:
        pass
    finally:
        features.recording = False


def _counts(batch: Batch, rows: int) -> list[int]:
    """Return the number of states of each example: one per token, text or window, or equally many (pictures)."""
    fields = [batch.ragged(name).lengths.tolist() for name in ("input_ids", "label") if _is_ragged(batch, name)]
    fields.append(batch.ragged("windows").lengths.tolist() if "windows" in batch else [1] * batch.size)
    fields.append([rows // batch.size] * batch.size)
    for counts in fields:
        if sum(counts) == rows:
            return counts
    raise _NotCached("states cannot be assigned to examples")


def _is_ragged(batch: Batch, name: str) -> bool:
    return name in batch and not isinstance(batch.fields[name], Tensor)


@torch.no_grad()
def _outputs_agree(
    model: nn.Module, task: BoundTask, encoded: Encoded, machine: Machine, indices: Indices, seed: int, draw: int
) -> bool:
    """Return True if the model has the same outputs with cached features as without."""
    batch = task.transform(collate(encoded, indices), indices, seed, draw).to(machine.device)
    with machine.autocast():
        expected = task.outputs(model, batch)
        try:
            with cached_features(model, encoded, indices, seed, draw):
                outputs = task.outputs(model, batch)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise _NotCached(f"{type(error).__name__}: {error}") from error
    tolerance = FP32_TOLERANCE if machine.autocast_dtype is None else HALF_TOLERANCE
    return bool(torch.dist(outputs.float(), expected.float()) <= tolerance * (1e-6 + expected.float().norm()))
