"""Enable the fast paths that a model and a device support, and keep those that do not change its results.

    path              device      condition
    chunked_loss      any         logits are the LM head's output, up to a scale, bias or soft cap
    fast_dropout      CPU         the model has `nn.Dropout`
    grad_buffers      CPU         large trainable matrices in fused blocks
    sparse_embedding  CPU         one process; a large trainable embedding that no other module shares
    unpadded          CPU, CUDA   CUDA: half precision without attention dropout
    fused_blocks      as unpadded the parts of the block match a pattern
    last_block        CPU         as fused_blocks; the head reads one token per text, or chosen tokens
    cuda_graphs       CUDA        a small encoder that does not take the unpadded path
    eager_attention   CPU         an encoder-decoder that computes with padding

Each path that changes the arithmetic of blocks is checked against the model's own code (`equality.py`). A path that
fails the check or raises is undone; the `FastPath` has the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.kernels import chunked_loss, fused_blocks, unpadded
from tunesmith.kernels.block_pattern import BlockPattern, Roles, UnsupportedBlock, match_block
from tunesmith.kernels.cuda_graphs import CudaGraphs, TorchCapture, why_no_graphs
from tunesmith.kernels.edits import Edits, set_mode
from tunesmith.kernels.equality import OUTPUT_TOLERANCE, PROBE_ERRORS, Probe, explain, short_batch
from tunesmith.kernels.fast_path import FastPath, PathStatus
from tunesmith.kernels.last_block import LastBlock, read_positions
from tunesmith.kernels.layout import Layout
from tunesmith.kernels.ops.attention import has_relative_bias
from tunesmith.kernels.ops.dropout import dropout_forward
from tunesmith.kernels.ops.grad_buffers import NO_BUFFERS, GradBuffers, LookedUpRows, SparseEmbedding
from tunesmith.kernels.prefix import supports_attention_functions
from tunesmith.models.anatomy import Anatomy

__all__ = ["PATHS", "accelerate", "switched_off"]

PATHS = (
    "unpadded",
    "fused_blocks",
    "last_block",
    "chunked_loss",
    "fast_dropout",
    "grad_buffers",
    "sparse_embedding",
    "cuda_graphs",
    "eager_attention",
)
"""All fast paths, in the order of a run's output."""

MIN_TABLE = 2**20
"""Minimum number of elements of an embedding table that gets sparse gradients."""

ATTENTION_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
"""Keys of transformers' configs. PyTorch's variable-length kernel on a GPU has no dropout."""

NEEDS_UNPADDED = PathStatus(False, reason="blocks compute with padding", applies=False)


def switched_off(reason: str) -> FastPath:
    """Return a `FastPath` with every path off, for a model that runs its own code."""
    return FastPath({name: PathStatus(False, reason=reason) for name in PATHS})


def accelerate(
    model: Any,
    anatomy: Anatomy,
    *,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    max_tokens: int,
    world_size: int,
) -> FastPath:
    """Enable the fast paths of a model in place; return which are on, and why the others are off.

    `device` is the device that the model will run on, `max_tokens` the maximum number of tokens per text, and
    `world_size` the number of processes.
    """
    path = FastPath(num_blocks=len(anatomy.blocks))
    status = dict.fromkeys(PATHS, PathStatus(False, reason=f"not on {device.type}", applies=False))
    status["chunked_loss"] = _chunk_loss(model, path, autocast_dtype)
    if device.type == "cpu":
        status["fast_dropout"] = _replace_dropout(model, path)
        path.buffers = GradBuffers(model.parameters())
        status["sparse_embedding"] = _sparse_embeddings(model, path, world_size)
    refusal = _why_padded(model, device, autocast_dtype)
    if refusal is None:
        blocks = [model.get_submodule(name) for name in anatomy.blocks]
        status |= _accelerate_blocks(model, anatomy, blocks, path, device, autocast_dtype, max_tokens)
    else:
        status["unpadded"] = refusal
        status["fused_blocks"] = status["last_block"] = NEEDS_UNPADDED
    if device.type == "cuda" and not path.unpadded:
        status["cuda_graphs"] = _use_graphs(model, path, max_tokens)
    if device.type == "cpu":
        status["eager_attention"] = _use_eager_attention(model, path)
        status["grad_buffers"] = _grad_buffers(path, status["fused_blocks"].on)
    path.statuses = {name: status[name] for name in PATHS}
    path.attach(model)
    return path


def _chunk_loss(model: Any, path: FastPath, autocast_dtype: torch.dtype | None) -> PathStatus:
    try:
        with _autocast(model, autocast_dtype):
            head = chunked_loss.lm_head_of(model)
    except PROBE_ERRORS as error:
        head = f"the probe failed: {explain(error)}"
    if head is None or isinstance(head, str):
        return PathStatus(False, reason=head or "no LM head", applies=head is not None)
    path.lm_head = head
    path.edits.set_forward(head.linear, head.forward)
    return PathStatus(True)


def _autocast(model: nn.Module, dtype: torch.dtype | None) -> torch.autocast:
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None)


def _replace_dropout(model: nn.Module, path: FastPath) -> PathStatus:
    dropouts = [module for module in model.modules() if type(module) is nn.Dropout and not module.inplace]
    for module in dropouts:
        path.edits.set_forward(module, dropout_forward)
    return PathStatus(bool(dropouts), reason="" if dropouts else "no nn.Dropout", applies=False)


def _sparse_embeddings(model: nn.Module, path: FastPath, world_size: int) -> PathStatus:
    """Use sparse gradients for large trainable embedding tables, unless another module shares the weight."""
    if world_size > 1:  # other processes would add to rows that this one has not looked up
        return PathStatus(False, reason=f"{world_size} processes")
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    looked_up = dict[Tensor, LookedUpRows]()
    modules: Any = model.modules()
    for module in modules:
        plain = type(module) is nn.Embedding and not (module.sparse or module.scale_grad_by_freq or module.max_norm)
        large = plain and module.weight.requires_grad and module.weight.numel() >= MIN_TABLE
        if large and uses[id(module.weight)] == 1:
            embedding = SparseEmbedding(module)
            path.edits.set_forward(module, embedding)
            looked_up[module.weight] = embedding.rows
    path.looked_up = looked_up
    return PathStatus(bool(looked_up), reason="" if looked_up else "no large unshared table to train", applies=False)


def _grad_buffers(path: FastPath, fused: bool) -> PathStatus:
    if fused and len(path.buffers):
        return PathStatus(True)
    path.buffers = NO_BUFFERS
    return PathStatus(False, reason="no large matrix in fp32" if fused else "no fused blocks", applies=False)


def _why_padded(model: Any, device: torch.device, autocast_dtype: torch.dtype | None) -> PathStatus | None:
    """Return the status of `unpadded` if padding cannot be removed; None if it should be tried."""
    if device.type not in ("cpu", "cuda"):
        return PathStatus(False, reason=f"not on {device.type}", applies=False)
    if not isinstance(model.get_input_embeddings(), nn.Embedding):
        return PathStatus(False, reason="no token embeddings, hence no padding", applies=False)
    if not supports_attention_functions(model):
        return PathStatus(False, reason="the model does not use transformers' attention interface")
    if device.type == "cuda" and autocast_dtype is None:
        return PathStatus(False, reason="fp32 on CUDA")
    dropout = [name for name in ATTENTION_DROPOUT if getattr(model.config, name, None)]
    if device.type == "cuda" and dropout:
        return PathStatus(False, reason=f"{dropout[0]} on CUDA")
    return None


def _accelerate_blocks(
    model: Any,
    anatomy: Anatomy,
    blocks: Sequence[nn.Module],
    path: FastPath,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    max_tokens: int,
) -> dict[str, PathStatus]:
    """Remove padding, then fuse blocks; keep each change only if the model's results stay equal."""
    status = dict.fromkeys(("unpadded", "fused_blocks", "last_block"), NEEDS_UNPADDED)
    padded_attention = model.config._attn_implementation
    if not blocks:
        return status | {"unpadded": PathStatus(False, reason="the model has no blocks")}
    try:
        probe = Probe(model, blocks, autocast_dtype, max_tokens)
    except PROBE_ERRORS as error:
        return status | {"unpadded": PathStatus(False, reason=f"the probe failed: {explain(error)}")}
    edits = Edits()
    reason = _try(edits, probe, lambda trial: unpadded.remove_padding(model, blocks, trial))
    if reason:
        return status | {"unpadded": PathStatus(False, reason=reason)}
    fused, patterns = _fuse(model, anatomy, blocks, path.buffers, edits, probe)
    last, last_status = _find_last_block(model, patterns.get(blocks[-1]), device, autocast_dtype, edits, probe)
    try:
        reason = probe.whole_difference() if last is None else ""
    except PROBE_ERRORS as error:
        reason = explain(error)
    if reason:
        edits.undo()
        return status | {"unpadded": PathStatus(False, reason=reason)}
    path.edits.extend(edits)
    path.unpadded, path.padded_attention, path.last_block = True, padded_attention, last
    return {"unpadded": PathStatus(True, anatomy.blocks), "fused_blocks": fused, "last_block": last_status}


def _try(edits: Edits, probe: Probe, change: Callable[[Edits], None]) -> str:
    """Apply a change and keep it if the model's results stay equal; else undo it and return the reason.

    A change that fails is tried again if the tolerance can be widened to the model's own rounding errors.
    """
    reason = _try_once(edits, probe, change)
    if reason and probe.measure_rounding():
        reason = _try_once(edits, probe, change)
    return reason


def _try_once(edits: Edits, probe: Probe, change: Callable[[Edits], None]) -> str:
    trial = Edits()
    try:
        change(trial)
        reason = probe.difference()
    except PROBE_ERRORS as error:
        reason = explain(error)
    if reason:
        trial.undo()
    else:
        edits.extend(trial)
    return reason


def _fuse(
    model: Any, anatomy: Anatomy, blocks: Sequence[nn.Module], buffers: GradBuffers, edits: Edits, probe: Probe
) -> tuple[PathStatus, dict[nn.Module, BlockPattern]]:
    """Fuse the blocks that match a pattern. A block with LayerNorm may be post-norm or pre-norm, so both are tried."""
    reason = ""
    for kind in fused_blocks.KINDS:
        patterns, unsupported = dict[nn.Module, BlockPattern](), ""
        for block, name in zip(blocks, anatomy.blocks, strict=True):
            try:
                roles: Roles = anatomy.roles_in(name)
                patterns[block] = match_block(model, block, roles, kind, buffers)
            except UnsupportedBlock as error:
                unsupported = unsupported or str(error)
        if not patterns:
            reason = reason or unsupported
            continue

        def fuse(trial: Edits, patterns: dict[nn.Module, BlockPattern] = patterns) -> None:
            for pattern in patterns.values():
                fused_blocks.fuse_block(pattern, trial)

        reason = _try(edits, probe, fuse)
        buffers.clear()  # the probe has also filled buffers of frozen weights
        if not reason:
            fused = tuple(name for block, name in zip(blocks, anatomy.blocks, strict=True) if block in patterns)
            return PathStatus(True, fused, unsupported), patterns
    return PathStatus(False, reason=reason), {}


def _find_last_block(
    model: Any,
    pattern: BlockPattern | None,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    edits: Edits,
    probe: Probe,
) -> tuple[LastBlock | None, PathStatus]:
    """Compute the last block only for the tokens that the head reads, if the model's logits stay equal."""
    if pattern is None:
        return None, PathStatus(False, reason="the last block is not fused", applies=False)
    if model.config.is_encoder_decoder or any(map(has_relative_bias, model.modules())):
        return None, PathStatus(False, reason="encoder-decoder or relative bias", applies=False)
    if device.type != "cpu":
        return None, PathStatus(False, reason=f"not on {device.type}", applies=False)
    trial = Edits()
    try:
        with set_mode(model, training=False), _autocast(model, autocast_dtype):
            last = _restrict_last_block(model, pattern, trial, probe)
    except PROBE_ERRORS as error:
        last = explain(error)
    if isinstance(last, str):
        trial.undo()
        return None, PathStatus(False, reason=last)
    edits.extend(trial)
    return last, PathStatus(True)


def _restrict_last_block(model: Any, pattern: BlockPattern, trial: Edits, probe: Probe) -> LastBlock | str:
    """Find the tokens that the head reads and compute the last block only for them; return the reason if this fails."""
    recorded, recording, batch = list[tuple[Tensor, Layout]](), Edits(), short_batch(model)
    try:
        with torch.enable_grad():
            fused_blocks.fuse_block(pattern, recording, record=lambda *one: recorded.append(one))
            logits = model(**batch).logits
            if len(recorded) != 1:
                return "the last block runs several times"
            last, logits = read_positions(logits, *recorded[0]), logits.detach()
    finally:
        recording.undo()
    if isinstance(last, str):
        return last
    if reason := probe.whole_difference(logits):
        return reason
    fused_blocks.fuse_block(pattern, trial, last_block=last)
    last.watch(model, trial)
    with torch.no_grad():
        if last.reads == "each":
            row, position = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 4])
            with last.only(row, position):
                actual, logits = model(**batch).logits[row, position], logits[row, position]
        else:
            actual = model(**batch).logits
    distance, norm = float(torch.dist(actual.float(), logits.float())), float(logits.float().norm())
    same = distance <= OUTPUT_TOLERANCE[logits.dtype] * norm
    return last if same else f"logits differ by {distance / norm:.2g} of their norm"


def _use_graphs(model: Any, path: FastPath, max_tokens: int) -> PathStatus:
    reason = why_no_graphs(model)
    if reason:
        return PathStatus(False, reason=reason, applies=False)

    def off(reason: str) -> None:
        path.statuses["cuda_graphs"] = PathStatus(False, reason=reason)

    graphs = CudaGraphs(model, max_tokens, TorchCapture(), off)
    path.edits.set_forward(model, lambda _, **inputs: graphs(**inputs))
    return PathStatus(True)


def _use_eager_attention(model: Any, path: FastPath) -> PathStatus:
    """Use eager attention in an encoder-decoder: for sentences its backward pass is a fourth faster than SDPA's."""
    if path.unpadded or not model.config.is_encoder_decoder:
        return PathStatus(False, reason="only for an encoder-decoder that computes with padding", applies=False)
    if model.config._attn_implementation != "sdpa":
        return PathStatus(False, reason=f"the model uses {model.config._attn_implementation}", applies=False)
    path.edits.set_attention(model, "eager")
    return PathStatus(True)
