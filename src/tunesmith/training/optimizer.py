"""Fused AdamW and SGD, learning-rate schedules, and the optimizer state as named tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.kernels.fast_path import fast_path
from tunesmith.kernels.ops.grad_buffers import LookedUpRows, zeros_like
from tunesmith.models.anatomy import Anatomy
from tunesmith.recipe import Train
from tunesmith.techniques import Technique
from tunesmith.training import parallel
from tunesmith.training.machine import is_out_of_memory

MOMENTUM = 0.9

MOST_ROWS = 0.5
"""Maximum fraction of a table's rows that are updated by copying them out and back."""

MOMENTA = ("exp_avg", "exp_avg_sq")
ROWS = "rows"
"""State key of the row numbers whose momenta are stored, in order; None where the momenta cover the whole table."""


class RowwiseAdamW(torch.optim.AdamW):
    """Fused AdamW that updates only those rows of an embedding table that any step has looked up.

    The other rows have no gradient and no momentum, and tables have no weight decay, so a step would not change them.
    Of 30,000 words the texts of a task contain a few thousand.
    """

    looked_up: Mapping[Tensor, LookedUpRows] = MappingProxyType({})
    """Embedding table -> its rows with a gradient."""

    grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        assert closure is None, "gradients are already computed"
        apart: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for table in group["params"]:
                rows = self._rows(table, group)
                if rows is not None:
                    self._move(table, rows, group)
                    apart.append((table, table.grad))
                    table.grad = None
        super().step()
        for table, grad in apart:
            table.grad = grad

    def _rows(self, table: Any, group: dict[str, Any]) -> Tensor | None:
        """Return the rows to update, in the order of their stored momenta; None for the whole table."""
        known = self.looked_up.get(table)
        state = self.state[table]
        if table.grad is None or known is None or group["weight_decay"] or state.get(ROWS, known) is None:
            return None
        if ROWS not in state:  # the first step, or the first of a resumed run
            if state["step"] > 0:
                known.ever |= ((state["exp_avg"] != 0) | (state["exp_avg_sq"] != 0)).any(1)
            rows = known.ever.nonzero().flatten()
            state.update({kind: _compact(state[kind], rows) for kind in MOMENTA} | {ROWS: rows})
        new = known.ever.index_fill(0, state[ROWS], False).nonzero().flatten()
        rows = torch.cat([state[ROWS], new])
        if len(rows) <= MOST_ROWS * len(table):
            state[ROWS] = rows
            return rows
        state.update({kind: _scatter(state[kind], state[ROWS]) for kind in MOMENTA} | {ROWS: None})
        return None

    def _move(self, table: Tensor, rows: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[table], table.grad
        assert grad is not None, "_rows returned rows of it"
        weights, gradients = table.index_select(0, rows), grad.index_select(0, rows)
        first, second = ([state[kind][: len(rows)]] for kind in MOMENTA)
        state["step"] += 1
        torch._fused_adamw_(
            [weights],
            [gradients],
            first,
            second,
            [],
            [state["step"]],
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=self.grad_scale,
        )
        table.index_copy_(0, rows, weights)


def _compact(whole: Tensor, rows: Tensor) -> Tensor:
    """Return a table with these rows first, then zeros, whose memory pages stay unwritten."""
    moved = zeros_like(whole)
    moved[: len(rows)] = whole.index_select(0, rows)
    return moved


def _scatter(moved: Tensor, rows: Tensor) -> Tensor:
    """Return the inverse of `_compact`."""
    return zeros_like(moved).index_copy_(0, rows, moved[: len(rows)])


def build(model: nn.Module, anatomy: Anatomy, technique: Technique, train: Train) -> torch.optim.Optimizer:
    """Return an optimizer over the trainable parameters; each parameter group has a `base_lr`.

    Norms, biases and embedding tables have no weight decay: a row that is never looked up does not change.
    """
    assert train.learning_rate and train.head_learning_rate, "assemble sets both learning rates"
    groups: dict[tuple[float, float], list[Tensor]] = {}
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    tables = {id(module.weight) for module in embeddings if uses[id(module.weight)] == 1}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            base = train.head_learning_rate if name in anatomy.always_trainable else train.learning_rate
            decay = train.weight_decay if parameter.ndim > 1 and id(parameter) not in tables else 0.0
            groups.setdefault((base * technique.lr_scale(name, anatomy), decay), []).append(parameter)
    listed = [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    if train.optimizer == "sgd":
        return _allocated(torch.optim.SGD(listed, lr=train.learning_rate, momentum=MOMENTUM), ("momentum_buffer",))
    adamw = RowwiseAdamW(listed, lr=train.learning_rate, fused=True)
    adamw.looked_up = fast_path(model).looked_up
    return _allocated(adamw, ("step", "exp_avg", "exp_avg_sq"), adamw.looked_up)


def _allocated(
    optimizer: torch.optim.Optimizer, kinds: tuple[str, ...], looked_up: Collection[Tensor] = ()
) -> torch.optim.Optimizer:
    """Allocate the state of the first step now, so that a lack of memory shows before any weight has changed."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            zero = torch.zeros((), device=parameter.device)
            # memory pages of rows that no text contains stay unwritten
            like = zeros_like if parameter in looked_up else torch.zeros_like
            state = {kind: zero if kind == "step" else like(parameter) for kind in kinds}
            optimizer.state[parameter] = state
    return optimizer


def take_step(optimizer: torch.optim.Optimizer, clip: float = 1.0) -> bool:
    """Take one step with the gradients multiplied by `clip`; return False if memory ran out before any weight changed.

    Such a step may be repeated. Fused AdamW multiplies within its kernel, by its `grad_scale` for fp16. A changed
    weight shows in the first parameter group: fused AdamW counts its steps, SGD increases the version of parameters.
    With several processes a step is never repeated, because the others have changed their weights.
    """
    first = next(p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    fused: Any = optimizer if optimizer.defaults.get("fused") else None
    if clip != 1.0 and fused is None:
        torch._foreach_mul_(
            [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None], clip
        )
    elif clip != 1.0:
        fused.grad_scale = torch.tensor(1 / clip, device=first.device)
    version, count = first._version, optimizer.state[first].get("step", torch.zeros(())).clone()
    try:
        optimizer.step()
    except (MemoryError, RuntimeError) as error:
        counted = optimizer.state[first].get("step", torch.zeros(()))
        moved = first._version != version or not torch.equal(counted, count) or parallel.world_size() > 1
        if moved or not is_out_of_memory(error):
            raise
        return False
    finally:
        if fused is not None:
            fused.grad_scale = None
    return True


def schedule(train: Train, total_steps: int) -> Callable[[int], float]:
    """Return the learning-rate factor of each step (counted from 0): linear warmup to 1, then the schedule to 0."""
    warmup = math.ceil(train.warmup_ratio * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, total_steps - warmup)
        if train.schedule == "constant":
            return 1.0
        return 1 - done if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return factor


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set the learning rate of every group to its `base_lr` times `factor`; return the main learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(optimizer.defaults["lr"]) * factor


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer state as `kind/parameter name` -> tensor."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        for kind, value in state.items():
            if kind in MOMENTA and state.get(ROWS) is not None:
                value = _scatter(value, state[ROWS])
            if kind != ROWS and isinstance(value, Tensor):
                tensors[f"{kind}/{name}"] = value
    return tensors


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the result of `state_tensors`; state of another kind of optimizer is ignored."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        state = optimizer.state[parameters[name]]
        if kind in state:
            state.pop(ROWS, None)
            state[kind] = value.to(state[kind].device, copy=True)
