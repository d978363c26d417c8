"""The one loop: a generator that yields a `Step` after each optimizer step.

Logging, evaluation, checkpoints and early stopping are ordinary code around it. The loop takes objects, not a recipe,
so that hyperparameter search, federated rounds and meta-learning call the same one. Three properties are exact:

- Gradient accumulation equals one large batch: the normalizers of a step are summed over its micro-batches and
  processes before the first forward pass.
- A resumed run equals an uninterrupted one: every micro-step is seeded with (seed, step, micro-step, rank).
- A step that runs out of memory is repeated in smaller micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith.data.batches import Batch, Batches, Limits, collate
from tunesmith.errors import ResourceError
from tunesmith.kernels.fast_path import fast_path
from tunesmith.models.anatomy import Anatomy
from tunesmith.tasks import BoundTask
from tunesmith.training import optimizer as optimizers
from tunesmith.training import parallel
from tunesmith.training.feature_cache import cached_features
from tunesmith.training.machine import Machine, is_out_of_memory

FP16_SCALE, FP16_GROWTH_STEPS = 2.0**16, 2000


@dataclass(frozen=True)
class Step:
    """One optimizer step over all processes.

    `number` counts from 1. `cost` is in the units of the task (tokens, pixels). If the loss or the gradient norm is not
    `finite`, the weights have not changed.
    """

    number: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    examples: int
    cost: int
    seconds: float
    finite: bool


@dataclass
class Engine:
    """The objects that the loop trains with, and the state that changes during training and is saved in checkpoints."""

    model: nn.Module
    anatomy: Anatomy
    task: BoundTask
    optimizer: torch.optim.Optimizer
    machine: Machine
    limits: Limits
    seed: int
    max_grad_norm: float | None = 1.0
    may_checkpoint: bool = True
    """True where gradient checkpointing may be enabled when a single example does not fit in memory."""
    say: Callable[[str], None] = print
    draws: int | None = None
    """Number of different random draws of the inputs; None where every epoch has its own."""
    fp16_scale: float = FP16_SCALE
    fp16_good_steps: int = 0
    checkpointing: bool = False
    modes_set_for: tuple[bool, ...] = ()
    """The `requires_grad` flags for which `set_modes` was last applied."""

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the model, collected once: walking through the modules takes milliseconds."""
        return list(self.model.parameters())

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters that are trained in the current step."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]


def steps(
    engine: Engine, batches: Batches, factor: Callable[[int], float], *, start: int = 0, total: int
) -> Iterator[Step]:
    """Train up to step `total`; `start` is the number of steps already done.

    Raises:
        ResourceError: one example at a time does not fit in memory.
    """
    for number in range(start, total):
        began = time.perf_counter()
        set_modes(engine)
        rate = optimizers.set_rate(engine.optimizer, factor(number))
        while True:
            loss, norm, cost = _gradients(engine, batches, number)  # clipped by the step itself
            finite = bool(np.isfinite(loss) and np.isfinite(norm))
            done = not finite or optimizers.take_step(engine.optimizer, clip_coefficient(norm, engine.max_grad_norm))
            engine.optimizer.zero_grad(set_to_none=True)
            if done:
                break
            _reduce_memory(engine, batches.micro_batches(number, engine.limits))
        yield Step(
            number=number + 1,
            epoch=(number + 1) / batches.steps_per_epoch,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            examples=len(batches.indices(number)),
            cost=cost,
            seconds=time.perf_counter() - began,
            finite=finite,
        )


def _gradients(engine: Engine, batches: Batches, number: int) -> tuple[float, float, int]:
    """Compute the gradients of one step; return loss, gradient norm and cost. Repeats the step on out of memory."""
    device = engine.machine.device
    while True:
        parts = batches.micro_batches(number, engine.limits)
        micro = [_draw_batch(engine, batches, part, number) for part in parts]
        empty = np.empty(0, dtype=np.int64)  # a process without examples takes part in every all-reduce
        normalizers = _normalizers(engine, micro or [_draw_batch(engine, batches, empty, number)], device)
        totals = None
        try:
            totals = _accumulate(engine, micro, parts, normalizers, number, batches)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # no all-reduce while a process may run out of memory; this one tells all processes if one did
        if parallel.all_reduce_max(int(totals is None), device):
            engine.optimizer.zero_grad(set_to_none=True)
            _reduce_memory(engine, parts)
            continue
        assert totals is not None, "no process ran out of memory"
        summed = parallel.all_reduce_sum(totals, device)
        loss, norm = float(summed["loss"]), _reduce(engine)
        if engine.machine.autocast_dtype == torch.float16 and not _update_fp16_scale(engine, loss, norm):
            continue
        return loss, norm, int(summed["cost"])


def _draw_batch(engine: Engine, batches: Batches, indices: NDArray[np.int64], number: int) -> Batch:
    """Return a batch of a step's examples, as drawn in the epoch of that step (counted from 0)."""
    batch = collate(batches.examples(number), indices)
    return engine.task.transform(batch, indices, *_draw(engine, number // batches.steps_per_epoch))


def _draw(engine: Engine, epoch: int) -> tuple[int, int]:
    """Return seed and draw number of the inputs of an epoch."""
    if engine.draws == 1:
        return 0, 0
    return engine.seed, epoch if engine.draws is None else epoch % engine.draws


def _accumulate(
    engine: Engine,
    micro: list[Batch],
    parts: list[NDArray[np.int64]],
    normalizers: dict[str, Tensor],
    number: int,
    batches: Batches,
) -> dict[str, Tensor]:
    """Run forward and backward over this process's micro-batches; return its share of the loss and their cost."""
    device = engine.machine.device
    scale = engine.fp16_scale if engine.machine.autocast_dtype == torch.float16 else 1.0
    total = torch.zeros((), device=device)
    for index, (batch, examples) in enumerate(zip(micro, parts, strict=True)):
        _seed(_mix(engine.seed, number, index, batches.rank), device)
        drawn = _draw(engine, number // batches.steps_per_epoch)
        with engine.machine.autocast(), cached_features(engine.model, batches.examples(number), examples, *drawn):
            loss = engine.task.loss(engine.model, batch.to(device), normalizers)
        (loss * scale if scale != 1.0 else loss).backward()
        total += loss.detach()
    cost = sum(int(batches.examples(number).costs[examples].sum()) for examples in parts)
    return {"loss": total, "cost": torch.tensor(float(cost), device=device)}


def _normalizers(engine: Engine, micro: list[Batch], device: torch.device) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    for batch in micro:
        for name, value in engine.task.normalizers(batch).items():
            totals[name] = totals.get(name, torch.zeros((), device=device)) + value.to(device)
    return parallel.all_reduce_sum(totals, device)


def _reduce(engine: Engine) -> float:
    """Sum the gradients over the processes and return their norm."""
    trainable = engine.trainable()
    parallel.sum_gradients(trainable)
    looked_up = fast_path(engine.model).looked_up
    gradients = [
        looked_up[parameter].gradient(parameter) if parameter in looked_up else parameter.grad
        for parameter in trainable
        if parameter.grad is not None
    ]
    if engine.machine.autocast_dtype == torch.float16:
        torch._foreach_mul_(gradients, 1 / engine.fp16_scale)
    return float(torch.nn.utils.get_total_norm(gradients))


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """Return the factor that clips gradients of this norm to `max_norm`, as `torch.nn.utils.clip_grad_norm_` does."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))


def _update_fp16_scale(engine: Engine, loss: float, norm: float) -> bool:
    """Dynamic loss scaling: halve the scale on overflow and repeat the step; double it after many good steps.

    A loss that is not finite before scaling is not an overflow of the scale.
    """
    if np.isfinite(norm) or not np.isfinite(loss) or engine.fp16_scale <= 1.0:
        engine.fp16_good_steps += 1
        if engine.fp16_good_steps % FP16_GROWTH_STEPS == 0:
            engine.fp16_scale *= 2
        return True
    engine.optimizer.zero_grad(set_to_none=True)
    engine.fp16_scale, engine.fp16_good_steps = engine.fp16_scale / 2, 0
    return False


def _reduce_memory(engine: Engine, parts: list[NDArray[np.int64]]) -> None:
    """Halve the micro-batch, or enable gradient checkpointing. The batch, and so the result, does not change."""
    if engine.machine.device.type == "cuda":
        torch.cuda.empty_cache()
    tried = parallel.all_reduce_max(max((len(part) for part in parts), default=0), engine.machine.device)
    if tried > 1:
        engine.limits = replace(engine.limits, max_examples=tried // 2)
        engine.say(f"out of memory: continuing with micro_batch_size {tried // 2}, same batch_size")
    elif engine.may_checkpoint and not engine.checkpointing and hasattr(engine.model, "gradient_checkpointing_enable"):
        checkpoint_activations(engine)
        engine.say("out of memory: continuing with gradient checkpointing")
    else:
        raise ResourceError(
            "one example at a time does not fit in memory",
            hint="lower data.max_length, use technique=lora or technique=freeze, or choose a smaller model",
        )


def checkpoint_activations(engine: Engine) -> None:
    """Enable gradient checkpointing: recompute activations in the backward pass instead of storing them."""
    model: Any = engine.model
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # transformers before 5.2x has only the second name
    engine.checkpointing = True


def set_modes(engine: Engine) -> None:
    """Set training mode; set eval mode below the lowest trained parameter and for BatchNorm statistics.

    Without dropout, the frozen lower blocks are a fixed function, whose outputs can be cached.
    """
    flags = tuple(parameter.requires_grad for parameter in engine.parameters)
    if engine.model.training and flags == engine.modes_set_for:
        return
    engine.model.train()
    names = [name for name, parameter in engine.model.named_parameters() if parameter.requires_grad]
    lowest = min((engine.anatomy.depth_of(name) for name in names), default=0)
    below = (*engine.anatomy.embeddings, *engine.anatomy.blocks[: lowest - 1]) if lowest else ()
    for path in below:
        engine.model.get_submodule(path).eval()
    for module in engine.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    engine.modes_set_for = flags


def _seed(seed: int, device: torch.device) -> None:
    """Seed the default generators. `torch.manual_seed` is slower: it records a stack trace for absent devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
