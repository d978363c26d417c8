"""The one loop: a generator that yields a `Step` after each optimizer step.

Logging, evaluation, saving and early stopping are ordinary code around it. The loop takes objects, not a recipe, so
that searches, federated rounds and meta-learning call the same one. Three things are exact here: the normalizers of a
step are summed over its micro-batches and processes before the first forward pass, so accumulation changes no gradient;
every micro-step seeds from (seed, step, micro-step, rank), so a resumed run draws what an undisturbed one would;
running out of memory repeats the same step in smaller pieces.
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
from tunesmith.training.feature_cache import standing_in
from tunesmith.training.machine import Machine, is_out_of_memory

FP16_SCALE, FP16_GROWTH_STEPS = 2.0**16, 2000


@dataclass(frozen=True)
class Step:
    """One optimizer step, over all processes. `number` counts from 1; not `finite`: the weights were left alone.

    `cost` is in the units of the task (tokens, pixels).
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
    """What the loop works with and what of it changes as it goes (and so belongs in a checkpoint)."""

    model: nn.Module
    anatomy: Anatomy
    task: BoundTask
    optimizer: torch.optim.Optimizer
    machine: Machine
    limits: Limits
    seed: int
    max_grad_norm: float | None = 1.0
    may_checkpoint: bool = True
    """Whether gradient checkpointing may be switched on when a single example does not fit."""
    say: Callable[[str], None] = print
    draws: int | None = None
    """The number of different draws of the inputs; None where each epoch has its own."""
    fp16_scale: float = FP16_SCALE
    fp16_good_steps: int = 0
    checkpointing: bool = False
    modes_are_for: tuple[bool, ...] = ()

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All of the model's, asked for once: walking through its modules takes milliseconds."""
        return list(self.model.parameters())

    def learning(self) -> list[nn.Parameter]:
        """What learns at this moment."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]


def steps(
    engine: Engine, batches: Batches, factor: Callable[[int], float], *, start: int = 0, total: int
) -> Iterator[Step]:
    """Train from step `start` (steps done so far) to `total`.

    Raises:
        ResourceError: one example at a time does not fit in memory.
    """
    for number in range(start, total):
        began = time.perf_counter()
        set_modes(engine)
        rate = optimizers.set_rate(engine.optimizer, factor(number))
        while True:
            loss, norm, cost = _gradients(engine, batches, number)  # not clipped: the step does it in passing
            finite = bool(np.isfinite(loss) and np.isfinite(norm))
            done = not finite or optimizers.take_step(engine.optimizer, _share_kept(engine, norm))
            engine.optimizer.zero_grad(set_to_none=True)
            if done:
                break
            _make_room(engine, batches.micro_batches(number, engine.limits))
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
    """Fill the gradients of one step; loss, gradient norm and cost. Repeats what did not fit."""
    device = engine.machine.device
    while True:
        parts = batches.micro_batches(number, engine.limits)
        micro = [_drawn(engine, batches, part, number) for part in parts]
        nothing = np.empty(0, dtype=np.int64)  # an empty share takes part in every exchange
        normalizers = _normalizers(engine, micro or [_drawn(engine, batches, nothing, number)], device)
        totals = None
        try:
            totals = _accumulate(engine, micro, parts, normalizers, number, batches)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # processes exchange nothing while one of them may run out of memory; here all of them learn that one did
        if parallel.all_reduce_max(int(totals is None), device):
            engine.optimizer.zero_grad(set_to_none=True)
            _make_room(engine, parts)
            continue
        assert totals is not None, "no process ran out of memory"
        summed = parallel.all_reduce_sum(totals, device)
        loss, norm = float(summed["loss"]), _reduce(engine)
        if engine.machine.autocast_dtype == torch.float16 and not _fp16_fits(engine, loss, norm):
            continue
        return loss, norm, int(summed["cost"])


def _drawn(engine: Engine, batches: Batches, indices: NDArray[np.int64], number: int) -> Batch:
    """Some examples of a step (counted from 0), as they are in its epoch."""
    batch = collate(batches.examples(number), indices)
    return engine.task.transform(batch, indices, *_draw(engine, number // batches.steps_per_epoch))


def _draw(engine: Engine, epoch: int) -> tuple[int, int]:
    """Seed and draw of the inputs of an epoch."""
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
    """Forward and backward over this process's micro-batches of one step; its share of the loss, and their cost."""
    device = engine.machine.device
    scale = engine.fp16_scale if engine.machine.autocast_dtype == torch.float16 else 1.0
    total = torch.zeros((), device=device)
    for index, (batch, examples) in enumerate(zip(micro, parts, strict=True)):
        _seed(_mix(engine.seed, number, index, batches.rank), device)
        drawn = _draw(engine, number // batches.steps_per_epoch)
        with engine.machine.autocast(), standing_in(engine.model, batches.examples(number), examples, *drawn):
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
    """Sum the gradients over the processes; their norm."""
    learning = engine.learning()
    parallel.sum_gradients(learning)
    looked_up = fast_path(engine.model).looked_up
    gradients = [
        looked_up[parameter].gradient(parameter) if parameter in looked_up else parameter.grad
        for parameter in learning
        if parameter.grad is not None
    ]
    if engine.machine.autocast_dtype == torch.float16:
        torch._foreach_mul_(gradients, 1 / engine.fp16_scale)
    return float(torch.nn.utils.get_total_norm(gradients))


def _share_kept(engine: Engine, norm: float) -> float:
    """What gradients are multiplied by so that their norm is at most `max_grad_norm`."""
    if engine.max_grad_norm is None:
        return 1.0
    return min(1.0, engine.max_grad_norm / (norm + 1e-6))  # as PyTorch's clipping


def _fp16_fits(engine: Engine, loss: float, norm: float) -> bool:
    """Dynamic loss scaling: halve and repeat the step on overflow, double after a long good stretch.

    A loss that is not finite before it is scaled is no matter of scale.
    """
    if np.isfinite(norm) or not np.isfinite(loss) or engine.fp16_scale <= 1.0:
        engine.fp16_good_steps += 1
        if engine.fp16_good_steps % FP16_GROWTH_STEPS == 0:
            engine.fp16_scale *= 2
        return True
    engine.optimizer.zero_grad(set_to_none=True)
    engine.fp16_scale, engine.fp16_good_steps = engine.fp16_scale / 2, 0
    return False


def _make_room(engine: Engine, parts: list[NDArray[np.int64]]) -> None:
    """Halve the micro-batch; the batch, and so the result, stays what it was."""
    if engine.machine.device.type == "cuda":
        torch.cuda.empty_cache()
    tried = parallel.all_reduce_max(max((len(part) for part in parts), default=0), engine.machine.device)
    if tried > 1:
        engine.limits = replace(engine.limits, max_examples=tried // 2)
        engine.say(f"out of memory: going on with at most {tried // 2} examples at once, same batch_size")
    elif engine.may_checkpoint and not engine.checkpointing and hasattr(engine.model, "gradient_checkpointing_enable"):
        checkpoint_activations(engine)
        engine.say("out of memory: going on with gradient checkpointing")
    else:
        raise ResourceError(
            "one example at a time does not fit in memory",
            hint="lower data.max_length, use technique=lora or freeze, or a smaller model",
        )


def checkpoint_activations(engine: Engine) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    model: Any = engine.model
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # the second is its name before transformers 5.2x
    engine.checkpointing = True


def set_modes(engine: Engine) -> None:
    """Training mode, but for what lies below the lowest learning parameter, and for BatchNorm statistics.

    Nothing below learns, so dropout there would only be noise; without it the frozen part is a fixed function.
    """
    flags = tuple(parameter.requires_grad for parameter in engine.parameters)
    if engine.model.training and flags == engine.modes_are_for:
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
    engine.modes_are_for = flags


def _seed(seed: int, device: torch.device) -> None:
    """Seed what is drawn here; `torch.manual_seed` writes down the stack for each kind of device that is not there."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
