"""AdamW (fused) and SGD over groups of one rate each, the schedule of the rate, and their state as named tensors."""

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
"""Share of a table up to which its rows are moved apart from it: they are copied out and back."""

MOMENTA = ("exp_avg", "exp_avg_sq")
ROWS = "rows"
"""Beside the momenta of a table: which of its rows they are of, one after another; None where they are of all."""


class RowwiseAdamW(torch.optim.AdamW):
    """Fused AdamW that updates only those rows of an embedding table that any step has looked up.

    The others have no gradient and no momentum, and tables have no weight decay, so that they would not change: of
    30,000 words the texts of a task contain a few thousand.
    """

    looked_up: Mapping[Tensor, LookedUpRows] = MappingProxyType({})
    """Embedding table -> its rows with a gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step."""
        assert closure is None, "gradients are there already"
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
        """The rows that are moved; None where all are. Their momentum stands in this order, one after another."""
        known = self.looked_up.get(table)
        state = self.state[table]
        if table.grad is None or known is None or group["weight_decay"] or state.get(ROWS, known) is None:
            return None
        if ROWS not in state:  # the first step, or the first of a resumed run
            if state["step"] > 0:
                known.ever |= ((state["exp_avg"] != 0) | (state["exp_avg_sq"] != 0)).any(1)
            rows = known.ever.nonzero().flatten()
            state.update({kind: _apart(state[kind], rows) for kind in MOMENTA} | {ROWS: rows})
        new = known.ever.index_fill(0, state[ROWS], False).nonzero().flatten()
        rows = torch.cat([state[ROWS], new])
        if len(rows) <= MOST_ROWS * len(table):
            state[ROWS] = rows
            return rows
        state.update({kind: _in_place(state[kind], state[ROWS]) for kind in MOMENTA} | {ROWS: None})
        return None

    def _move(self, table: Tensor, rows: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[table], table.grad
        assert grad is not None, "its rows were asked for"
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

    grad_scale: Tensor | None = None


def _apart(whole: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a table first, and then zeros, whose pages nobody has written."""
    moved = zeros_like(whole)
    moved[: len(rows)] = whole.index_select(0, rows)
    return moved


def _in_place(moved: Tensor, rows: Tensor) -> Tensor:
    """The inverse of `_apart`."""
    return zeros_like(moved).index_copy_(0, rows, moved[: len(rows)])


def build(model: nn.Module, anatomy: Anatomy, technique: Technique, train: Train) -> torch.optim.Optimizer:
    """An optimizer over what learns. Each group carries `base_lr`.

    Vectors (norms, biases) do not decay, nor do tables: a row that no text looks up stays as it was.
    """
    assert train.learning_rate and train.head_learning_rate, "the run resolves both rates"
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
    """With the state that the first step would make: where it does not fit, that is known before any step is taken."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            zero = torch.zeros((), device=parameter.device)
            # memory pages of rows that no text contains stay unwritten
            like = zeros_like if parameter in looked_up else torch.zeros_like
            state = {kind: zero if kind == "step" else like(parameter) for kind in kinds}
            optimizer.state[parameter] = state
    return optimizer


def take_step(optimizer: torch.optim.Optimizer, share: float = 1.0) -> bool:
    """One step by this share of the gradients; False where memory ran out before a weight had moved.

    Then the step may be repeated. Fused AdamW multiplies in passing, by the way that is there for fp16.
    Groups are taken in order, and each counts its steps (fused AdamW) or gives its parameters a new version (SGD).
    Of several processes the others have moved theirs.
    """
    first = next(p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    fused: Any = optimizer if optimizer.defaults.get("fused") else None
    if share != 1.0 and fused is None:
        torch._foreach_mul_(
            [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None], share
        )
    elif share != 1.0:
        fused.grad_scale = torch.tensor(1 / share, device=first.device)
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
    """The factor on the rate at each step (counted from 0): warm-up from 1/w to 1, then the schedule down to 0."""
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
    """Scale every group's base rate; returns what `learning_rate` is now."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(optimizer.defaults["lr"]) * factor


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as `kind/parameter name` -> tensor."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        for kind, value in state.items():
            if kind in MOMENTA and state.get(ROWS) is not None:
                value = _in_place(value, state[ROWS])
            if kind != ROWS and isinstance(value, Tensor):
                tensors[f"{kind}/{name}"] = value
    return tensors


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The inverse of `state_tensors`. What is of another kind of optimizer is left out: this one starts afresh."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        state = optimizer.state[parameters[name]]
        if kind in state:
            state.pop(ROWS, None)
            state[kind] = value.to(state[kind].device, copy=True)
