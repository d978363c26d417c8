"""More than one process: each computes its share of every optimizer step, sums are exchanged, all agree.

Started by torchrun (or Slurm with its variables): RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Gradients are
summed after the last micro-batch rather than by DistributedDataParallel, which averages over processes and waits for a
backward pass from each of them: here shares may be unequal or empty and the sum is exact.
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

from tunesmith import talk
from tunesmith.errors import RecipeError, ResourceError

BUCKET_BYTES = 25 * 2**20

PATIENCE = timedelta(days=1)
"""How long the others wait while the first fetches a model or encodes texts; an exchange of gradients takes seconds."""

_waiting: Any = None
"""The group of processes that wait for each other, by a way that needs no GPU."""


@contextmanager
def group(device_type: str) -> Iterator[None]:
    """Join the other processes, where there are any, and leave them at the end.

    Raises:
        RecipeError: the environment's variables do not go together.
        ResourceError: they do not find each other.
    """
    world, timeout = _number("WORLD_SIZE", 1), timedelta(seconds=_number("TUNESMITH_TIMEOUT_S", 600))
    _check_ranks(world)
    if world == 1 or dist.is_initialized():
        yield
        return
    global _waiting
    try:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timeout)
        _waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        hint = "start them with torchrun --nproc-per-node N, or unset WORLD_SIZE"
        raise ResourceError(f"{world} processes did not find each other ({_reason(error)})", hint=hint) from error
    try:
        yield
    finally:
        _waiting = None
        dist.destroy_process_group()


def local_rank() -> int:
    """This process's number on its machine, as the environment says."""
    return _number("LOCAL_RANK", 0, least=0)


def _check_ranks(world: int) -> None:
    """Refuse a rank without a world, or beyond it: each such process would take itself for the only one, or wait."""
    for variable in ("RANK", "LOCAL_RANK"):
        if not os.environ.get(variable, "").strip():
            continue
        number, hint = _number(variable, 0, least=0), f"start with torchrun --nproc-per-node N, or unset {variable}"
        if not os.environ.get("WORLD_SIZE", "").strip():
            raise RecipeError(f"the environment has {variable}={number} without WORLD_SIZE", hint=hint)
        if number >= world:
            raise RecipeError(f"the environment's {variable}={number} is not below WORLD_SIZE={world}", hint=hint)


def _number(variable: str, default: int, least: int = 1) -> int:
    text = os.environ.get(variable, "").strip() or str(default)
    if not text.isdecimal() or int(text) < least:
        what = f"the environment's {variable}={text} is no whole number from {least} up"
        raise RecipeError(what, hint="set it, or unset it")
    return int(text)


@contextmanager
def _with_all() -> Iterator[None]:
    """An exchange; whatever fails in it is another process that is gone."""
    try:
        yield
    except RuntimeError as error:
        hint = "see what the others said; --resume goes on from the last checkpoint"
        raise ResourceError(f"another process of this run is gone ({_reason(error)})", hint=hint) from error


def _reason(error: Exception) -> str:
    """The first sentence of what the library says."""
    return str(error).strip().partition("\n")[0].partition(". ")[0]


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def command(*words: object) -> str:
    """What to type on each machine for `tunesmith WORDS` in as many processes as there are now."""
    if world_size() == 1:
        return talk.command(*words)
    each = os.environ.get("LOCAL_WORLD_SIZE", str(world_size()))
    return shlex.join(["torchrun", f"--nproc-per-node={each}", "-m", "tunesmith", *map(str, words)])


def barrier() -> None:
    """Wait for the others."""
    if world_size() > 1:
        with _with_all():
            dist.barrier(group=_waiting)


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block before the others do."""
    if rank() != 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def largest(value: int, device: torch.device) -> int:
    """The largest of the processes' values."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    with _with_all():
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared.item())


def any_of(values: Sequence[bool], device: torch.device) -> list[bool]:
    """Of each value whether any process has it."""
    if world_size() == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.int32, device=device)
    with _with_all():
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return [bool(one) for one in shared.tolist()]


def sum_all(values: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Each value summed over the processes; scalars only."""
    if world_size() == 1 or not values:
        return values
    stacked = torch.stack([value.double().to(device) for value in values.values()])
    with _with_all():
        dist.all_reduce(stacked)
    return {name: stacked[index].float() for index, name in enumerate(values)}


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Each gradient summed over the processes, in flat buckets; a process without one contributes zeros."""
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
    with _with_all():
        dist.all_reduce(flat)
    for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(summed.view_as(gradient))
