"""Data-parallel training: each process computes a part of every optimizer step, and gradients are summed.

Processes are started by torchrun, or by Slurm with the same variables: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT. Gradients are summed after the last micro-batch, not by DistributedDataParallel, which averages over the
processes and expects a backward pass from each. Here the parts may be unequal or empty, and the sum is exact.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tunesmith import console
from tunesmith.errors import RecipeError, ResourceError

BUCKET_BYTES = 25 * 2**20

BARRIER_TIMEOUT = timedelta(days=1)
"""Maximum time to wait while the main process downloads a model or encodes texts."""

_barrier_group: Any = None
"""Gloo group of all processes, for barriers without a GPU."""


@contextmanager
def group(device_type: str) -> Iterator[None]:
    """Join the process group inside the block, if WORLD_SIZE is above 1.

    Raises:
        RecipeError: the environment variables contradict each other.
        ResourceError: the processes cannot connect.
    """
    world, timeout = _number("WORLD_SIZE", 1), timedelta(seconds=_number("TUNESMITH_TIMEOUT_S", 600))
    _check_ranks(world)
    if world == 1 or dist.is_initialized():
        yield
        return
    global _barrier_group
    try:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timeout)
        _barrier_group = dist.new_group(backend="gloo", timeout=BARRIER_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        hint = "start them with torchrun --nproc-per-node N, or unset WORLD_SIZE"
        raise ResourceError(f"{world} processes cannot connect ({_reason(error)})", hint=hint) from error
    try:
        yield
    finally:
        _barrier_group = None
        dist.destroy_process_group()


def local_rank() -> int:
    """Return the rank on this machine (LOCAL_RANK)."""
    return _number("LOCAL_RANK", 0, minimum=0)


def _check_ranks(world: int) -> None:
    """Refuse a rank without WORLD_SIZE, or beyond it: such a process would train alone, or wait forever."""
    for variable in ("RANK", "LOCAL_RANK"):
        if not os.environ.get(variable, "").strip():
            continue
        number, hint = _number(variable, 0, minimum=0), f"start with torchrun --nproc-per-node N, or unset {variable}"
        if not os.environ.get("WORLD_SIZE", "").strip():
            raise RecipeError(f"environment: {variable}={number} without WORLD_SIZE", hint=hint)
        if number >= world:
            raise RecipeError(f"environment: {variable}={number} is not below WORLD_SIZE={world}", hint=hint)


def _number(variable: str, default: int, minimum: int = 1) -> int:
    text = os.environ.get(variable, "").strip() or str(default)
    if not text.isdecimal() or int(text) < minimum:
        what = f"environment: {variable}={text} is not an integer of at least {minimum}"
        raise RecipeError(what, hint="set it to one, or unset it")
    return int(text)


@contextmanager
def _collective() -> Iterator[None]:
    """Report a failing collective operation as another process that has ended."""
    try:
        yield
    except RuntimeError as error:
        hint = "see its messages; --resume continues from the last checkpoint"
        raise ResourceError(f"another process of this run has ended ({_reason(error)})", hint=hint) from error


def _reason(error: Exception) -> str:
    """Return the first sentence of a library's message."""
    return str(error).strip().partition("\n")[0].partition(". ")[0]


def rank() -> int:
    """Return this process's rank; 0 for a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def command(*words: object) -> str:
    """Return the shell command that runs `tunesmith WORDS` with the same number of processes on each machine."""
    if world_size() == 1:
        return console.command(*words)
    per_node = os.environ.get("LOCAL_WORLD_SIZE", str(world_size()))
    return shlex.join(["torchrun", f"--nproc-per-node={per_node}", "-m", "tunesmith", *map(str, words)])


def barrier() -> None:
    """Wait until all processes have called this function."""
    if world_size() > 1:
        with _collective():
            dist.barrier(group=_barrier_group)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block in rank 0 first, and then in the other processes."""
    if rank() != 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def all_reduce_max(value: int, device: torch.device) -> int:
    """Return the maximum of a value over the processes."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    with _collective():
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared.item())


def all_reduce_any(values: Sequence[bool], device: torch.device) -> list[bool]:
    """Return for each value whether it is true in any process."""
    if world_size() == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.int32, device=device)
    with _collective():
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return [bool(value) for value in shared.tolist()]


def all_reduce_sum(values: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return each scalar tensor summed over the processes."""
    if world_size() == 1 or not values:
        return values
    stacked = torch.stack([value.double().to(device) for value in values.values()])
    with _collective():
        dist.all_reduce(stacked)
    return {name: stacked[index].float() for index, name in enumerate(values)}


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum each gradient over the processes, in flat buckets; a process without a gradient contributes zeros."""
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.grad.nbytes
        if size >= BUCKET_BYTES:
            _sum_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
    with _collective():
        dist.all_reduce(flat)
    for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(summed.view_as(gradient))
