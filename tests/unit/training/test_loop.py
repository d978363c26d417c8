"""Optimizer steps: equal updates for any micro-batches, and none from a non-finite loss or gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from messages import has_parts
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from tunesmith.data.batches import Batch, Batches, collate
from tunesmith.errors import ResourceError
from tunesmith.tasks.text_classification import BoundTextClassification
from tunesmith.testing import Case, case, sample_row
from tunesmith.training import loop
from tunesmith.training.machine import Machine

FAMILIES = ("bert", "roberta", "modernbert", "gpt2", "llama")
REVIEW = partial(sample_row, "text-classification")


def _labels(number: int) -> list[str]:
    return [name for bit, name in enumerate(("price", "service", "room")) if number >> bit & 1]


KINDS: dict[str, dict[str, Any]] = {
    "weighted": {"data": {"class_weights": {"negative": 3.0, "positive": 0.25}}, "label_smoothing": 0.1},
    "multi": {"task": {"labels": "multi"}, "row": lambda n: REVIEW(n) | {"label": _labels(n)}},
    "regression": {"task": {"labels": "regression"}, "row": lambda n: REVIEW(n) | {"label": math.sin(n)}},
    "pair": {"row": lambda n: REVIEW(n) | {"text_pair": REVIEW(3 * n)["text"]}},
    "windows": {
        "task": {"windows": 3},
        "row": lambda n: REVIEW(n) | {"text": " . ".join([str(REVIEW(n)["text"])] * (1 + n % 5))},
        "data": {"max_length": 8, "class_weights": {"negative": 2.0}},
    },
}
"""Each kind of target and of input the task has, texts of unequal length, classes of unequal weight."""


def _trial(folder: Path, technique: Any = "full", family: str = "bert", task: Any = None, **keys: Any) -> Case:
    given = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, **keys}
    return case(technique, {"name": "text-classification", **(task or {})}, family, folder, **given)


def _run(trial: Case, *, micro: int = 8, start: int = 0, stop: int = 4, batch: int = 8, **changes: Any) -> Any:
    """Train a copy of the model at a constant rate; return its engine and steps."""
    engine = replace(trial.engine(copy.deepcopy(trial.model), micro), **{"max_grad_norm": None, **changes})
    return engine, list(loop.steps(engine, Batches(trial.encoded, batch, 0), lambda _: 1.0, start=start, total=stop))


def _moved(trial: Case, engine: loop.Engine) -> Tensor:
    """Return the flat change of the trainable parameters in one step."""
    before = dict(trial.model.named_parameters())
    return torch.cat([(p - before[name]).detach().flatten() for name, p in engine.model.named_parameters()])


def _same(ours: nn.Module, theirs: nn.Module, atol: float = 0.0) -> bool:
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return all(torch.allclose(a, b, atol=atol, rtol=0) for a, b in pairs)


def _pairs() -> list[Any]:
    """Return every family with every kind; all but one case of each are marked slow."""
    every = [(row, family, column, kind) for row, family in enumerate(FAMILIES) for column, kind in enumerate(KINDS)]
    return [pytest.param(f, k, id=f"{f}-{k}", marks=() if row == at else pytest.mark.slow) for row, f, at, k in every]


@pytest.mark.parametrize(("family", "kind"), _pairs())
def test_accumulation_is_exact(family: str, kind: str, tmp_path: Path) -> None:
    trial = _trial(tmp_path, family=family, **KINDS[kind])
    assert len(set(trial.encoded.costs)) > 3, "lengths are unequal"
    engine, (whole,) = _run(trial, stop=1)
    update = _moved(trial, engine)
    for micro in (4, 2, 1):
        engine, (step,) = _run(trial, micro=micro, stop=1)
        found = _moved(trial, engine)
        assert float(found.norm() / update.norm()) == pytest.approx(1, abs=1e-4), f"micro-batches of {micro}"
        assert float(torch.cosine_similarity(found, update, dim=0)) >= 0.9999
        assert step.loss == pytest.approx(whole.loss, abs=1e-5) and step.examples == 8
        assert step.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)


def test_the_last_smaller_step_of_an_epoch_is_a_mean_too(tmp_path: Path) -> None:
    trial = _trial(tmp_path, **KINDS["weighted"])
    updates = []
    for micro in (12, 1):
        engine, (step,) = _run(trial, micro=micro, start=3, stop=4, batch=12)
        assert step.examples == 4 and step.epoch == 1.0 and step.number == 4
        updates.append(_moved(trial, engine))
    assert torch.dist(*updates) < 1e-4 * updates[0].norm()


def test_a_step_is_that_of_plain_pytorch(tmp_path: Path) -> None:
    """The reference is one step of gradient descent on transformers' loss of the same eight rows."""
    trial = _trial(tmp_path)
    plain = copy.deepcopy(trial.model)
    batch = collate(trial.encoded, Batches(trial.encoded, 8, 0).indices(0))
    rows = batch.ragged("input_ids")
    plain(
        input_ids=rows.padded(0),
        attention_mask=rows.mask(),
        token_type_ids=batch.ragged("token_type_ids").padded(0),
        labels=batch.tensor("label"),
    ).loss.backward()
    torch.optim.SGD(plain.parameters(), lr=0.1, weight_decay=0.0).step()
    engine, _ = _run(trial, micro=3, stop=1)
    assert _same(engine.model, plain, atol=1e-6)


def test_what_a_step_says(tmp_path: Path) -> None:
    trial = _trial(tmp_path)
    _, steps = _run(trial, micro=3, stop=7)
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [step.epoch for step in steps[4:]] == [1.0, 1.2, 1.4]
    batches = Batches(trial.encoded, 8, 0)
    assert [step.cost for step in steps] == [int(trial.encoded.costs[batches.indices(n)].sum()) for n in range(7)]
    assert all(step.finite and step.seconds > 0 and step.learning_rate == 0.1 for step in steps)


@pytest.mark.parametrize("limit", (0.05, None))
def test_clipping(limit: float | None, tmp_path: Path) -> None:
    trial = _trial(tmp_path)
    engine, (step,) = _run(trial, micro=2, stop=1, max_grad_norm=limit)
    moved = float(_moved(trial, engine).norm())
    assert step.grad_norm > 0.5, "what is said is the norm before it is clipped"
    assert moved == pytest.approx(0.1 * (limit or step.grad_norm), rel=1e-4)


# --- what is not finite


def _spoil(where: str, value: float, trial: Case, monkeypatch: pytest.MonkeyPatch, at: int = 3) -> None:
    """Put `value` into the loss, one gradient, or the input of the at-th step (one pass each)."""
    own, count = BoundTextClassification.loss, [0]

    def loss(self: Any, model: Any, *rest: Any) -> Tensor:
        count[0] += 1
        if count[0] != at:
            return own(self, model, *rest)
        if where == "input":
            handle = model.get_input_embeddings().register_forward_hook(lambda *args: args[-1] * value)
            found = own(self, model, *rest)
            handle.remove()
            return found
        bias = dict(model.named_parameters())["classifier.bias"]
        spoilt = bias[:1].sum() * 0 if where == "loss" else Spoilt.apply(bias[:1], value).sum() * 0
        return own(self, model, *rest) + (value if where == "loss" else 0) + spoilt

    monkeypatch.setattr(BoundTextClassification, "loss", loss)


class Spoilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.full_like(grad, ctx.value), None


@pytest.mark.parametrize("where", ("loss", "gradient", "input"))
@pytest.mark.parametrize(("kind", "value"), (("sgd", math.nan), ("adamw", math.inf)))
def test_what_is_not_finite_moves_no_weight(
    kind: str, where: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = _trial(tmp_path, optimizer=kind, weight_decay=0.1)
    before, _ = _run(trial, stop=2)
    _spoil(where, value, trial, monkeypatch)
    engine, steps = _run(trial, stop=3)
    assert [step.finite for step in steps] == [True, True, False]
    assert _same(engine.model, before.model), "the third step was not taken"
    for ours, theirs in zip(engine.model.parameters(), before.model.parameters(), strict=True):
        ours_state, state = engine.optimizer.state[ours], before.optimizer.state[theirs]
        assert ours_state.keys() == state.keys() and all(torch.equal(ours_state[key], state[key]) for key in state)
    last = steps[-1]
    if where == "gradient":
        assert math.isfinite(last.loss) and not math.isfinite(last.grad_norm), "each value is the real one"
    else:
        assert not math.isfinite(last.loss) or not math.isfinite(last.grad_norm)
        assert where == "input" or str(last.loss) == str(value)


# --- memory that runs out

GONE: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "torch on a CPU": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    "python": MemoryError,
}


class Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, error: BaseException) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise ctx.error


def _run_out(where: str, most: int, error: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Raise `error` for more than `most` examples at a time; the returned list collects the sizes tried."""
    own, own_step, tried = BoundTextClassification.loss, torch.optim.SGD.step, []

    def loss(self: Any, model: Any, batch: Batch, *rest: Any) -> Tensor:
        tried.append(batch.size)
        if where == "forward" and batch.size > most:
            raise error()
        found = own(self, model, batch, *rest)
        return Boom.apply(found, error()) if where == "backward" and batch.size > most else found

    def step(self: Any, *args: Any) -> Any:
        if where == "optimizer" and tried[-1] > most:
            raise error()
        return own_step(self, *args)

    monkeypatch.setattr(BoundTextClassification, "loss", loss)
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    return tried


@pytest.mark.parametrize("most", (1, *(pytest.param(most, marks=pytest.mark.slow) for most in (2, 4))))
@pytest.mark.parametrize("where", ("forward", "backward", "optimizer"))
def test_out_of_memory_repeats_the_same_step_in_smaller_pieces(
    where: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, said = _trial(tmp_path), list[str]()
    clean, expected = _run(trial)
    _run_out(where, most, GONE["cuda"], monkeypatch)
    engine, steps = _run(trial, say=said.append)
    assert _same(engine.model, clean.model, atol=1e-6), "every step was made once"
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected], abs=1e-6)
    assert [step.examples for step in steps] == [8, 8, 8, 8] and engine.limits.max_examples == most
    assert len(said) == int(math.log2(8 / most))
    assert has_parts(said[-1], "out of memory: ", f"micro_batch_size {most},")


@pytest.mark.parametrize("kind", GONE)
def test_whoever_says_that_memory_ran_out(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run_out("forward", 2, GONE[kind], monkeypatch)
    engine, steps = _run(_trial(tmp_path), stop=1, say=lambda _: None)
    assert engine.limits.max_examples == 2 and len(steps) == 1


def test_an_error_that_is_no_lack_of_memory_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = _run_out("forward", 2, lambda: RuntimeError("shapes differ"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes differ"):
        _run(_trial(tmp_path))
    assert tried == [8]


@pytest.mark.parametrize("where", ("forward", "backward", "optimizer"))
def test_where_one_example_does_not_fit_it_ends_with_advice(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, said = _trial(tmp_path), list[str]()
    engine = replace(trial.engine(copy.deepcopy(trial.model)), say=said.append)
    _run_out(where, 0, GONE["cuda"], monkeypatch)
    with pytest.raises(ResourceError, match=r"one example .*; .*max_length.*lora") as refused:
        list(loop.steps(engine, Batches(trial.encoded, 8, 0), lambda _: 1.0, total=1))
    assert refused.value.exit_code == 4 and _same(engine.model, trial.model), "no weight has moved"
    assert has_parts(said[-1], "out of memory: ", "gradient checkpointing")


def test_gradient_checkpointing_changes_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = _trial(tmp_path)
    clean, _ = _run(trial)
    _run_out("forward", 1, GONE["cuda"], monkeypatch)
    engine = replace(trial.engine(copy.deepcopy(trial.model)), max_grad_norm=None)
    loop.checkpoint_activations(engine)
    list(loop.steps(engine, Batches(trial.encoded, 8, 0), lambda _: 1.0, total=4))
    assert engine.checkpointing and _same(engine.model, clean.model, atol=1e-6)


# --- fp16


def _fp16(**changes: Any) -> dict[str, Any]:
    return {"machine": Machine(torch.device("cpu"), torch.float16), **changes}


def test_an_overflow_halves_the_scale_and_repeats_the_step(tmp_path: Path) -> None:
    trial = _trial(tmp_path)
    expected, clean = _run(trial, stop=2, **_fp16(fp16_scale=1.0))
    engine, steps = _run(trial, stop=2, **_fp16(fp16_scale=2.0**30))
    assert 1.0 < engine.fp16_scale < 2.0**30, "halved until it fitted"
    assert [step.finite for step in steps] == [True, True]
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in clean], abs=1e-3)
    assert [step.grad_norm for step in steps] == pytest.approx([step.grad_norm for step in clean], rel=1e-2)
    assert torch.dist(_moved(trial, engine), _moved(trial, expected)) < 0.02 * _moved(trial, expected).norm()


def test_the_scale_grows_after_a_long_good_stretch(tmp_path: Path) -> None:
    good = loop.FP16_GROWTH_STEPS - 2
    engine, _ = _run(_trial(tmp_path), stop=1, **_fp16(fp16_scale=4.0, fp16_good_steps=good))
    assert engine.fp16_scale == 4.0
    engine, _ = _run(_trial(tmp_path), stop=2, **_fp16(fp16_scale=4.0, fp16_good_steps=good))
    assert engine.fp16_scale == 8.0


def test_a_loss_that_is_not_finite_is_no_matter_of_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = _trial(tmp_path)
    _spoil("loss", math.nan, trial, monkeypatch, at=1)
    engine, (step,) = _run(trial, stop=1, **_fp16(fp16_scale=16.0))
    assert not step.finite and engine.fp16_scale == 16.0 and _same(engine.model, trial.model)


# --- what learns, and in which mode


def test_gradual_unfreezing_moves_only_what_is_open(tmp_path: Path) -> None:
    technique = {"name": "freeze", "last_n_blocks": 3, "gradual": True}
    trial = _trial(tmp_path, technique, optimizer="adamw", learning_rate=0.01, weight_decay=0.1)
    engine, moved = trial.engine(), []
    for step in range(8):
        before = copy.deepcopy(trial.model.state_dict())
        trial.train(engine, step, step + 1, total=8)
        after = trial.model.state_dict()
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        moved.append([any(name.startswith(f"{block}.") for name in changed) for block in trial.anatomy.blocks])
        assert "classifier.weight" in changed and not any("embeddings" in name for name in changed)
    none, last, two, every = [False] * 3, [False, False, True], [False, True, True], [True] * 3
    assert moved == [none, none, last, last, two, two, every, every]


@pytest.mark.parametrize(
    ("technique", "still"),
    (
        ("full", []),
        ({"name": "freeze", "last_n_blocks": 2}, ["bert.embeddings", "bert.encoder.layer.0"]),
        ({"name": "freeze", "head_only": True}, ["bert.embeddings", *(f"bert.encoder.layer.{n}" for n in range(3))]),
        ({"name": "lora", "r": 2}, ["bert.embeddings"]),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_lies_below_the_lowest_that_learns_is_in_eval_mode(
    technique: Any, still: list[str], tmp_path: Path
) -> None:
    trial = _trial(tmp_path, technique)
    trial.model.eval()
    engine = trial.engine()
    list(loop.steps(engine, Batches(trial.encoded, 8, 0), lambda _: 1.0, total=1))
    modes = {name: module.training for name, module in engine.model.named_modules()}
    below = {name for name in modes if any(name == path or name.startswith(f"{path}.") for path in still)}
    assert {name for name, training in modes.items() if not training} == below


def test_modes_follow_what_is_thawed(tmp_path: Path) -> None:
    trial = _trial(tmp_path, {"name": "freeze", "last_n_blocks": 2, "gradual": True})
    engine, modes = trial.engine(), []
    for step in range(3):
        trial.train(engine, step, step + 1, total=3)
        modes.append([trial.model.get_submodule(path).training for path in trial.anatomy.blocks])
    assert modes == [[False, False, False], [False, False, True], [False, True, True]]


class Normed(BertForSequenceClassification):
    """A head after a BatchNorm, whose statistics are buffers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = nn.Sequential(nn.BatchNorm1d(config.hidden_size), self.classifier)


def test_batchnorm_keeps_its_statistics(tmp_path: Path) -> None:
    trial = _trial(tmp_path)
    model = Normed(trial.model.config)
    norm = model.classifier[0]
    mean, var = norm.running_mean.clone().fill_(0.3), norm.running_var.clone().fill_(2.0)
    norm.load_state_dict(norm.state_dict() | {"running_mean": mean, "running_var": var})
    before = norm.weight.detach().clone()
    engine = replace(trial.engine(model), modes_set_for=())
    list(loop.steps(engine, Batches(trial.encoded, 8, 0), lambda _: 1.0, total=3))
    assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, var)
    assert norm.num_batches_tracked == 0 and not torch.equal(norm.weight, before), "but its weight learns"


# --- chance

DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}


def test_a_resumed_step_draws_the_same_dropout(tmp_path: Path) -> None:
    trial = _trial(tmp_path, config=DROPOUT)
    whole, steps = _run(trial, micro=4)
    engine = replace(trial.engine(copy.deepcopy(trial.model), 4), max_grad_norm=None)
    losses = []
    for start in range(4):
        torch.manual_seed(start)
        torch.rand(1000), np.random.rand(3)  # random numbers drawn by an evaluation in between
        batches = Batches(trial.encoded, 8, 0)
        losses += [step.loss for step in loop.steps(engine, batches, lambda _: 1.0, start=start, total=start + 1)]
    assert losses == [step.loss for step in steps] and _same(engine.model, whole.model)


def test_dropout_differs_by_seed_by_step_and_by_micro_batch(tmp_path: Path) -> None:
    trial = _trial(tmp_path, config=DROPOUT, learning_rate=1e-30)
    batches = Batches(trial.encoded, 40, 0)
    _, plain = _run(trial, micro=40, batch=40, stop=2)
    assert not math.isclose(plain[0].loss, plain[1].loss, abs_tol=1e-4), "the same rows at the next step"
    _, seeded = _run(trial, micro=40, batch=40, stop=1, seed=1)
    assert not math.isclose(plain[0].loss, seeded[0].loss, abs_tol=1e-4)
    drawn: list[Tensor] = []
    engine = trial.engine(copy.deepcopy(trial.model), 20)
    engine.model.bert.embeddings.register_forward_hook(lambda *args: drawn.append(args[-1] == 0))
    list(loop.steps(engine, batches, lambda _: 1.0, total=1))
    (first, second), tokens = drawn, min(mask.shape[1] for mask in drawn)
    assert not torch.equal(first[:20, :tokens], second[:20, :tokens]), "each micro-batch has its own mask"
