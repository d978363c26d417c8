"""Decisions during a run: best step, early stopping, saving, evaluation, and non-finite steps."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tunesmith
from tunesmith import recipe as recipes
from tunesmith.console import Console
from tunesmith.data.batches import Batch
from tunesmith.errors import NumericError, ResourceError
from tunesmith.tasks.text_classification import BoundTextClassification
from tunesmith.testing import tiny_tokenizer
from tunesmith.training import evaluate


def _lines(run: Path, key: str) -> dict[int, Any]:
    """Map each step to its value of `key` in `metrics.jsonl`."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def _saved(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def _weights(run: Path, step: int | None = None) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, or of the artifact."""
    where = "model/model" if step is None else f"checkpoints/step-{step:06d}/learned"
    return load_file(run / f"{where}.safetensors")


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _few(cases: Iterable[str], *fast: str) -> list[Any]:
    """Return all cases; those not in `fast` are marked slow."""
    return [pytest.param(case, id=case, marks=() if case in fast else pytest.mark.slow) for case in cases]


# --- the rates


@pytest.mark.parametrize(
    ("technique", "given", "expected"),
    [
        ("full", (), 1e-2),
        ("full", ("train.head_learning_rate=3e-3",), 3e-3),
        ({"name": "freeze", "last_n_blocks": 1}, (), 1e-2),
        ({"name": "freeze", "head_only": True}, (), 1e-3),
        ("lora", (), 1e-3),
    ],
)
def test_a_new_head_learns_at_the_rate_of_its_technique(
    technique: Any, given: tuple[str, ...], expected: float, recipe_of: Any, tmp_path: Path
) -> None:
    tunesmith.train(recipe_of("train.epochs=null", "train.max_steps=1", *given, technique=technique))
    resolved = recipes.load(str(tmp_path / "run" / "recipe.yaml")).train
    assert (resolved.learning_rate, resolved.head_learning_rate) == (1e-3, pytest.approx(expected))


# --- best, and when to stop


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`scored("accuracy", 0.5, 0.7)`: the scores of the run's evaluations, in order."""

    def script(metric: str, *values: float, losses: Iterable[float] = repeat(1.0)) -> None:
        coming = ({"loss": loss, metric: value} for loss, value in zip(losses, values, strict=False))
        own = evaluate.scores
        monkeypatch.setattr(evaluate, "scores", lambda *args, **how: own(*args, **how) | next(coming))

    return script


BEST = {
    "accuracy": ((0.5, 0.7, 0.6, 0.65), 4),
    "a tie is no better": ((0.5, 0.7, 0.7, 0.7), 4),
    "but for a lower loss": ((0.5, 0.7, 0.7, 0.7), 6),
    "loss": ((0.5, 0.7, 0.4, 0.6), 6),
    "ece": ((0.1, 0.3, 0.2, 0.2), 2),
    "f1_macro": ((0.1, 0.2, math.nan, 0.15), 4),
}


@pytest.mark.parametrize("case", _few(BEST, "a tie is no better", "but for a lower loss", "loss"))
def test_best_is_kept_and_shipped(
    case: str, recipe_of: Any, scored: Callable[..., None], tmp_path: Path, capsys: Any
) -> None:
    values, best = BEST[case]
    metric = case if case in ("loss", "ece", "f1_macro") else "accuracy"
    scored(metric, *values, losses=(1.2, 1.0, 0.8, 0.9) if case == "but for a lower loss" else repeat(1.0))
    settings = ["train.epochs=null", "train.max_steps=8", "train.evaluate_every=2", f"train.metric={metric}"]
    result = tunesmith.train(recipe_of(*settings, "train.keep_checkpoints=1"))
    run = tmp_path / "run"
    assert result["best_step"] == best and result["steps"] == 8
    assert f"best step on validation: {best} of 8" in capsys.readouterr().out
    assert _saved(run) == sorted({best, 8}), "best and last, and no other"
    assert _same(_weights(run), _weights(run, best)), "what is shipped is the best"
    assert not _same(_weights(run), _weights(run, 8))


def test_under_another_metric_the_best_is_sought_anew(
    recipe_of: Any, scored: Callable[..., None], tmp_path: Path
) -> None:
    settings = ["train.epochs=null", "train.evaluate_every=2"]
    scored("accuracy", 0.9, 0.8, 0.5, 0.5, losses=(1.0, 0.9, 0.7, 0.6))
    tunesmith.train(recipe_of(*settings, "train.max_steps=4", "train.metric=accuracy"))
    again = recipe_of(*settings, "train.max_steps=8", "train.metric=loss")
    result = tunesmith.train(again, resume=tmp_path / "run", override=["train.metric", "train.max_steps"])
    assert result["best_step"] == 8


def test_a_score_that_there_is_not_is_no_better(recipe_of: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A correlation is undefined where all predictions are equal."""
    own, left = evaluate.scores, iter((0.5, None, 0.4))

    def scores(*args: Any, **how: Any) -> dict[str, Any]:
        found, value = own(*args, **how), next(left)
        return {name: one for name, one in found.items() if name != "pearson"} | ({"pearson": value} if value else {})

    monkeypatch.setattr(evaluate, "scores", scores)
    settings = ["train.epochs=null", "train.max_steps=6", "train.evaluate_every=2", "train.metric=pearson"]
    task = {"name": "text-classification", "labels": "regression"}
    recipe = recipe_of(*settings, task=task, data={"train": str(_numbers(tmp_path)), "validation": 0.2})
    assert tunesmith.train(recipe)["best_step"] == 2


@pytest.mark.parametrize(
    ("metric", "values"), (("accuracy", (0.5, 0.7, 0.6, 0.7, 0.9)), ("rmse", (0.5, 0.3, 0.4, 0.3, 0.1)))
)
def test_it_stops_when_nothing_gets_better(
    metric: str, values: tuple[float, ...], recipe_of: Any, scored: Callable[..., None], tmp_path: Path, capsys: Any
) -> None:
    scored(metric, *values)
    settings = ["train.epochs=null", "train.max_steps=12", "train.evaluate_every=2", "train.early_stopping_patience=2"]
    task = {"name": "text-classification", "labels": "regression"} if metric == "rmse" else "text-classification"
    data = {"train": str(_numbers(tmp_path)), "validation": 0.2} if metric == "rmse" else None
    recipe = recipe_of(*settings, task=task, **({"data": data} if data else {}))
    result = tunesmith.train(recipe)
    assert result["steps"] == 8 and result["best_step"] == 4
    assert re.search(rf"early stopping at step 8 of 12: {metric} .*\b2 evaluations", capsys.readouterr().out)
    again = tunesmith.train(resume=tmp_path / "run")
    assert again["steps"] == 8, "and stays stopped"


def _numbers(folder: Path) -> Path:
    path = folder / "numbers.csv"
    rows = [f"the film was {'good' * (n % 2)} {n},{n / 7:.2f}" for n in range(40)]
    path.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return path


# --- when to score, to save, and what to keep

EVERY = {
    "epoch, epoch": (("epoch", "epoch"), [6, 12], [6, 12]),
    "2, 3": ((2, 3), [2, 4, 6, 8, 10, 12], [3, 6, 9, 12]),
    "epoch, 5": (("epoch", 5), [6, 12], [5, 10, 12]),
    "7, epoch": ((7, "epoch"), [7, 12], [6, 12]),
    "100, 100": ((100, 100), [12], [12]),
}


@pytest.mark.parametrize("case", _few(EVERY, "2, 3", "epoch, 5"))
def test_every_so_many_steps_or_epochs(case: str, recipe_of: Any, scored: Callable[..., None], tmp_path: Path) -> None:
    (score, save), scores, saves = EVERY[case]
    scored("accuracy", 1.0, *[0.0] * 9)
    every = [f"train.evaluate_every={score}", f"train.save_every={save}", "train.keep_checkpoints=99"]
    tunesmith.train(recipe_of("train.epochs=2", *every))
    assert list(_lines(tmp_path / "run", "validation/accuracy")) == scores
    assert _saved(tmp_path / "run") == sorted({*saves, scores[0]}), "and the best as soon as it is seen"
    assert list(_lines(tmp_path / "run", "loss")) == list(range(1, 13))


def test_without_validation_nothing_is_scored_and_the_last_is_shipped(recipe_of: Any, tmp_path: Path) -> None:
    result = tunesmith.train(recipe_of("data.validation=null"))
    assert result["metrics"] == {} and result["best_step"] is None
    assert _lines(tmp_path / "run", "validation/accuracy") == {}
    assert _same(_weights(tmp_path / "run"), _weights(tmp_path / "run", result["steps"]))


@pytest.mark.parametrize("keep", (1, pytest.param(3, marks=pytest.mark.slow)))
def test_the_newest_are_kept(keep: int, recipe_of: Any, scored: Callable[..., None], tmp_path: Path) -> None:
    scored("accuracy", *(1.0 - step / 10 for step in range(6)))
    every = ["train.evaluate_every=1", "train.save_every=1", f"train.keep_checkpoints={keep}"]
    tunesmith.train(recipe_of(*every))
    assert _saved(tmp_path / "run") == [1, *range(7 - keep, 7)], "and the best"


# --- what is not finite


@pytest.fixture
def nan_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Batch]]:
    """`nan_at(3)`: make the loss of the third step NaN; the returned list collects its batch."""

    def spoil(*steps: int) -> list[Batch]:
        own, count, seen = BoundTextClassification.loss, [0], list[Batch]()

        def loss(self: Any, model: Any, batch: Batch, *rest: Any) -> Tensor:
            count[0] += 1
            if count[0] not in steps:
                return own(self, model, batch, *rest)
            seen.append(batch)
            return own(self, model, batch, *rest) * math.nan

        monkeypatch.setattr(BoundTextClassification, "loss", loss)
        return seen

    return spoil


TWELVE = ("train.epochs=null", "train.max_steps=12", "train.save_every=4", "train.evaluate_every=100")


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_rows(
    recipe_of: Any, nan_at: Callable[..., list[Batch]], reviews_csv: Path, tmp_path: Path
) -> None:
    seen = nan_at(6)
    with pytest.raises(NumericError, match=r"^step 6: loss nan, .*norm nan \(.*; .*learning rate below") as stopped:
        tunesmith.train(recipe_of(*TWELVE))
    assert stopped.value.exit_code == 5
    file, _, numbers = str(stopped.value).partition("(")[2].partition(")")[0].rpartition(":")
    assert file == str(reviews_csv)
    lines = list(csv.DictReader(reviews_csv.read_text(encoding="utf-8").splitlines()))
    named = [lines[int(number) - 2]["text"] for number in numbers.split(",")]  # line 1 is the header
    (batch,) = seen
    ids = batch.ragged("input_ids")
    learned = [part.tolist() for part in ids.values.split(ids.lengths.tolist())]
    assert sorted(tiny_tokenizer()(named)["input_ids"]) == sorted(learned)
    run = tmp_path / "run"
    assert _lines(run, "loss")[6] == "nan" == _lines(run, "grad_norm")[6], "what is logged is the real value"
    assert _saved(run) == [4] and json.loads((run / "run.json").read_text())["outcome"].startswith(
        "NumericError: step 6"
    )


def test_skip_leaves_the_step_out(
    recipe_of: Any, nan_at: Callable[..., list[Batch]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nan_at(6, 9)
    result = tunesmith.train(recipe_of(*TWELVE, "train.on_nan=skip", "train.max_skips=2"))
    said = capsys.readouterr().out
    assert "skipped (1 of at most 2)" in said and "skipped (2 of at most 2)" in said and result["steps"] == 12
    assert all(weight.isfinite().all() for weight in _weights(tmp_path / "run").values())
    losses = _lines(tmp_path / "run", "loss")
    assert [step for step, loss in losses.items() if loss == "nan"] == [6, 9]


@pytest.mark.parametrize("policy", (pytest.param("skip", marks=pytest.mark.slow), "rollback"))
def test_after_max_skips_it_stops(policy: str, recipe_of: Any, nan_at: Callable[..., Any], tmp_path: Path) -> None:
    nan_at(*range(6, 99))
    with pytest.raises(NumericError, match=r"^step 9: loss nan") as stopped:
        tunesmith.train(recipe_of(*TWELVE, f"train.on_nan={policy}"))
    assert stopped.value.exit_code == 5
    for step in _saved(tmp_path / "run"):
        assert all(weight.isfinite().all() for weight in _weights(tmp_path / "run", step).values())


def test_rollback_goes_back_to_the_last_checkpoint(
    recipe_of: Any, nan_at: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nan_at(12)
    tunesmith.train(recipe_of(*TWELVE, "train.on_nan=rollback", "data.validation=null"))
    assert re.search("skipped; .*weights of step 8", capsys.readouterr().out)
    assert _same(_weights(tmp_path / "run", 12), _weights(tmp_path / "run", 8))


def test_rollback_before_the_first_checkpoint_leaves_the_step_out(
    recipe_of: Any, nan_at: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    nan_at(2)
    assert tunesmith.train(recipe_of(*TWELVE, "train.on_nan=rollback"))["steps"] == 12
    assert "skipped (1 of at most 3)" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_never_saved(recipe_of: Any, tmp_path: Path) -> None:
    wild = ("train.learning_rate=1e30", "train.weight_decay=1e10", "train.save_every=1")
    with pytest.raises(NumericError, match=r"step 1: .*query.weight .*--resume"):
        tunesmith.train(recipe_of(*wild, "train.warmup_ratio=0.0", "train.on_nan=skip"))
    assert _saved(tmp_path / "run") == []


# --- memory and threads


def test_a_smaller_micro_batch_is_kept_in_the_checkpoint(
    recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tunesmith.train(recipe_of(output=str(tmp_path / "clean")))
    own = BoundTextClassification.loss

    def loss(self: Any, model: Any, batch: Batch, *rest: Any) -> Tensor:
        if batch.size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, model, batch, *rest)

    monkeypatch.setattr(BoundTextClassification, "loss", loss)
    tunesmith.train(recipe_of())
    run = tmp_path / "run"
    assert re.search(r"out of memory: .*\bmicro_batch_size 2\b", capsys.readouterr().out)
    assert json.loads((run / "checkpoints" / "step-000006" / "state.json").read_text())["max_examples"] == 2
    assert _lines(run, "loss") == pytest.approx(_lines(tmp_path / "clean", "loss"), abs=1e-5)


def test_a_run_that_does_not_fit_ends_with_advice(recipe_of: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def loss(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BoundTextClassification, "loss", loss)
    with pytest.raises(ResourceError, match=r"one example .*memory; .*data\.max_length") as end:
        tunesmith.train(recipe_of(), console=Console(level=-1))
    assert end.value.exit_code == 4 and _saved(tmp_path / "run") == []


def test_a_resumed_run_has_the_threads_it_began_with(
    recipe_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        tunesmith.train(recipe_of())
        torch.set_num_threads(1)
        tunesmith.train(resume=tmp_path / "run")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert re.search(r"\b2 threads, .*before", capsys.readouterr().out)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["hardware"]["threads"] == 2
