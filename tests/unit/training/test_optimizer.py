"""Learning rates by parameter group, schedules, and a state that round-trips through disk."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerating import sparse_embeddings
from torch import nn

from tunesmith.kernels import accelerate
from tunesmith.recipe import Train
from tunesmith.testing import Case, case
from tunesmith.training import optimizer

HEAD = ("classifier.weight", "classifier.bias")


def _trial(folder: Path, technique: Any = "full", **train: Any) -> Case:
    return case(technique, "text-classification", "bert", folder, **train)


def _build(trial: Case) -> torch.optim.Optimizer:
    return optimizer.build(trial.model, trial.anatomy, trial.technique, trial.recipe.train)


def _rates(trial: Case) -> dict[str, float]:
    names = {parameter: name for name, parameter in trial.model.named_parameters()}
    return {names[p]: group["lr"] for group in _build(trial).param_groups for p in group["params"]}


def _learn(model: nn.Module, optimizer: torch.optim.Optimizer, start: int = 0, stop: int = 5) -> None:
    """Take steps with gradients that depend only on the step and the weights."""
    for step in range(start, stop):
        for index, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(100 * step + index)
                parameter.grad = parameter.detach() / 7 + torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", ("adamw", "sgd"))
def test_steps_are_those_of_torch(kind: str, tmp_path: Path) -> None:
    trial = _trial(tmp_path, optimizer=kind, learning_rate=0.01, weight_decay=0.1)
    plain = copy.deepcopy(trial.model)
    decays = {p: p.ndim > 1 and not name.endswith("_embeddings.weight") for name, p in plain.named_parameters()}
    matrices, vectors = ([p for p, does in decays.items() if does is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    of_torch = torch.optim.SGD(groups, lr=0.01, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(groups, lr=0.01)
    _learn(trial.model, _build(trial))
    _learn(plain, of_torch)
    for (name, ours), theirs in zip(trial.model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6, rtol=1e-5), name


def test_vectors_and_tables_do_not_decay(tmp_path: Path) -> None:
    trial = _trial(tmp_path, weight_decay=0.3)
    decays = {p: group["weight_decay"] for group in _build(trial).param_groups for p in group["params"]}
    assert len(decays) == len(list(trial.model.parameters())), "each parameter is in one group"
    for name, parameter in trial.model.named_parameters():
        never = name.endswith((".bias", "_embeddings.weight")) or "LayerNorm" in name
        assert decays[parameter] == (0.0 if never else 0.3), name


def test_only_what_learns_is_in_it(tmp_path: Path) -> None:
    rates = _rates(_trial(tmp_path, {"name": "freeze", "head_only": True}, learning_rate=0.01))
    assert set(rates) == set(HEAD) and set(rates.values()) == {0.01}


def test_the_head_has_its_own_rate(tmp_path: Path) -> None:
    rates = _rates(_trial(tmp_path, learning_rate=0.001, head_learning_rate=0.02))
    assert {name for name, rate in rates.items() if rate == 0.02} == set(HEAD)
    assert {rate for name, rate in rates.items() if name not in HEAD} == {0.001}


def test_lora_plus_lets_b_learn_faster(tmp_path: Path) -> None:
    rates = _rates(_trial(tmp_path, {"name": "lora", "r": 2, "lora_plus_ratio": 8.0}, learning_rate=2**-10))
    assert {rate for name, rate in rates.items() if ".lora_B." in name} == {2**-7}
    assert {rate for name, rate in rates.items() if ".lora_B." not in name} == {2**-10}


@pytest.mark.parametrize("technique", ({"name": "full"}, {"name": "freeze", "last_n_blocks": 3}))
def test_lower_blocks_learn_slower(technique: dict[str, Any], tmp_path: Path) -> None:
    trial = _trial(tmp_path, technique | {"layer_lr_decay": 0.5}, learning_rate=2**-4, head_learning_rate=0.5)
    rates = _rates(trial)
    for depth in range(3):
        found = {rate for name, rate in rates.items() if f"encoder.layer.{depth}." in name}
        assert found == {2 ** (depth - 7)}, depth
    assert rates["bert.pooler.dense.weight"] == 2**-4 and {rates[name] for name in HEAD} == {0.5}
    embeddings = {rate for name, rate in rates.items() if "embeddings" in name}
    assert embeddings == ({2**-8} if technique["name"] == "full" else set())


# --- the schedule

TOTAL = 100
SCHEDULES = {
    ("linear", 0.1): {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.5, 99: 1 / 90},
    ("linear", 0.0): {0: 1.0, 50: 0.5, 99: 0.01},
    ("cosine", 0.1): {0: 0.1, 9: 1.0, 10: 1.0, 40: 0.75, 55: 0.5, 99: 0.5 * (1 + math.cos(math.pi * 89 / 90))},
    ("constant", 0.1): {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0},
    ("constant", 0.0): {0: 1.0, 99: 1.0},
}


@pytest.mark.parametrize(("schedule", "warmup"), SCHEDULES)
def test_the_schedule_at_its_corners(schedule: Any, warmup: float) -> None:
    factor = optimizer.schedule(Train(schedule=schedule, warmup_ratio=warmup), TOTAL)
    for step, expected in SCHEDULES[schedule, warmup].items():
        assert factor(step) == pytest.approx(expected, abs=1e-9), step
    values = [factor(step) for step in range(TOTAL)]
    assert all(0 < value <= 1 for value in values), "no step is without effect"
    top = values.index(1.0)
    assert values[: top + 1] == sorted(values[: top + 1]) and values[top:] == sorted(values[top:], reverse=True)


@pytest.mark.parametrize("total", (1, 2, 3))
@pytest.mark.parametrize("schedule", ("linear", "cosine", "constant"))
def test_the_shortest_runs_learn_too(schedule: Any, total: int) -> None:
    factor = optimizer.schedule(Train(schedule=schedule, warmup_ratio=0.99), total)
    assert all(0 < factor(step) <= 1 for step in range(total)) and factor(total - 1) == 1.0


def test_the_factor_scales_every_group(tmp_path: Path) -> None:
    built = _build(_trial(tmp_path, learning_rate=2**-10, head_learning_rate=2**-6))
    for factor in (0.5, 0.125, 0.5):  # from the base rate each time
        assert optimizer.set_rate(built, factor) == 2**-10 * factor, "not the head's"
        assert {group["lr"] for group in built.param_groups} == {2**-10 * factor, 2**-6 * factor}


# --- the state


@pytest.mark.parametrize("kind", ("adamw", "sgd"))
@pytest.mark.parametrize("technique", ("full", {"name": "lora", "r": 2}))
def test_the_state_goes_there_and_back(technique: Any, kind: str, tmp_path: Path) -> None:
    trial = _trial(tmp_path, technique, optimizer=kind)
    other = copy.deepcopy(trial)
    built = _build(trial)
    _learn(trial.model, built, stop=3)
    state = optimizer.state_tensors(built, trial.model)
    kinds = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}[kind]
    learns = {name for name, parameter in trial.model.named_parameters() if parameter.requires_grad}
    assert state.keys() == {f"{one}/{name}" for one in kinds for name in learns}
    other.model.load_state_dict(trial.model.state_dict())
    again = _build(other)
    _learn(other.model, again, stop=1)  # replaces the earlier state
    other.model.load_state_dict(trial.model.state_dict())
    kept = {key: value.clone() for key, value in state.items()}
    optimizer.load_state_tensors(again, other.model, kept)
    _learn(trial.model, built, 3, 6)
    _learn(other.model, again, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(trial.model.parameters(), other.model.parameters(), strict=True))


def test_the_state_is_there_before_the_first_step(tmp_path: Path) -> None:
    """A lack of memory for the state then shows before any weight has changed."""
    trial = _trial(tmp_path)
    before = optimizer.state_tensors(_build(trial), trial.model)
    built = _build(trial)
    _learn(trial.model, built, stop=1)
    after = optimizer.state_tensors(built, trial.model)
    assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}


@pytest.mark.parametrize("kind", ("adamw", "sgd"))
def test_a_step_that_has_begun_is_never_repeated(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = _trial(tmp_path, optimizer=kind)
    built = _build(trial)
    own = type(built).step
    first, *rest = built.param_groups
    assert rest, "there is more than one group"

    def step(self: torch.optim.Optimizer) -> None:
        self.param_groups = [first]
        own(self)
        self.param_groups = [first, *rest]
        raise MemoryError

    monkeypatch.setattr(type(built), "step", step)
    with pytest.raises(MemoryError):
        _take(trial.model, built)

    def nothing(self: torch.optim.Optimizer) -> None:
        raise MemoryError

    monkeypatch.setattr(type(built), "step", nothing)
    assert _take(trial.model, built) is False


def _take(model: nn.Module, built: torch.optim.Optimizer) -> bool:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return optimizer.take_step(built)


@pytest.mark.parametrize("clipped", (False, True))
def test_rows_that_were_looked_up_move_as_the_whole_table_would(
    clipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate, "MIN_TABLE", 1)
    trial = _trial(tmp_path, learning_rate=0.01)
    plain = copy.deepcopy(trial.model)
    table = trial.model.get_input_embeddings().weight
    rows = sparse_embeddings(trial.model).looked_up[table]
    built, of_plain = _build(trial), optimizer.build(plain, trial.anatomy, trial.technique, trial.recipe.train)
    moved = []
    move = optimizer.RowwiseAdamW._move

    def watched(self: Any, weight: Any, rows: Any, group: Any) -> None:
        moved.append(len(rows))
        move(self, weight, rows, group)

    monkeypatch.setattr(optimizer.RowwiseAdamW, "_move", watched)
    for step in range(6):
        ids = torch.tensor([[5, 6, 7 + step % 3], [9, 5, 5]])
        for model, own in ((trial.model, built), (plain, of_plain)):
            (10 * model(input_ids=ids).logits).square().sum().backward()
            optimizer.take_step(own, 0.25 if clipped else 1.0)
            own.zero_grad(set_to_none=True)
    assert moved and max(moved) < len(table) / 2
    for (name, ours), theirs in zip(trial.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=name)
    again = optimizer.build(trial.model, trial.anatomy, trial.technique, trial.recipe.train)
    optimizer.load_state_tensors(again, trial.model, optimizer.state_tensors(built, trial.model))
    ever = rows.ever.clone()
    rows.ever.zero_()
    trial.model(input_ids=torch.tensor([[5]])).logits.sum().backward()
    optimizer.take_step(again)
    assert torch.equal(rows.ever, ever), "a resumed run knows the rows by their momentum"


def test_momenta_are_those_of_the_whole_table_wherever_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate, "MIN_TABLE", 1)
    trial = _trial(tmp_path, learning_rate=0.01)
    models = [copy.deepcopy(trial.model) for _ in range(2)]
    sparse_embeddings(models[0])
    ours, plain = (optimizer.build(one, trial.anatomy, trial.technique, trial.recipe.train) for one in models)
    count = models[0].get_input_embeddings().weight.shape[0]
    for step, share in enumerate((0.1, 0.2, 0.1, 0.9, 0.1)):  # most rows have been looked up from the fourth step on
        torch.manual_seed(step)
        ids = torch.randperm(count)[: int(share * count)][None, :64]
        for model, own in zip(models, (ours, plain), strict=True):
            for part in (ids[:, :8], ids[:, 8:]) if ids.shape[1] > 8 else (ids,):
                (10 * model(input_ids=part).logits).square().sum().backward()
            optimizer.take_step(own)
            own.zero_grad(set_to_none=True)
        found, expected = (optimizer.state_tensors(own, one) for own, one in zip((ours, plain), models, strict=True))
        assert found.keys() == expected.keys()
        for name in (
            "exp_avg/bert.embeddings.word_embeddings.weight",
            "exp_avg_sq/bert.embeddings.word_embeddings.weight",
        ):
            assert torch.dist(found[name], expected[name]) <= 1e-5 * expected[name].norm() > 0, (step, name)
        again = optimizer.build(models[0], trial.anatomy, trial.technique, trial.recipe.train)
        optimizer.load_state_tensors(again, models[0], found)
        optimizer.load_state_tensors(ours, models[0], found)  # also into an optimizer that has taken steps
        for name, tensor in optimizer.state_tensors(again, models[0]).items():
            assert torch.equal(tensor, found[name])
