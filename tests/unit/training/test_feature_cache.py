"""Cached features of frozen blocks change no loss, and are computed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.console import Console
from tunesmith.kernels.accelerate import switched_off
from tunesmith.models import sources
from tunesmith.run import prepare
from tunesmith.run import train as run
from tunesmith.testing import sample_row, tiny_model, tiny_tokenizer
from tunesmith.training import feature_cache

QUIET = Console(level=-1)
TECHNIQUES = {
    "head": {"name": "freeze", "head_only": True},
    "last": {"name": "freeze", "last_n_blocks": 1},
    "lora above": {"name": "lora", "target_modules": "layer.1.output.dense"},
    "gradual": {"name": "freeze", "last_n_blocks": 1, "gradual": True},
}


def _rows(task: str, path: Path, count: int) -> str:
    path.write_text("".join(json.dumps(sample_row(task, number)) + "\n" for number in range(count)))
    return str(path)


def _losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "grad_norm" in line]


def _run(tmp_path: Path, name: str, family: str, task: Any, technique: Any, **more: Any) -> dict[str, Any]:
    base, name_of_task = tmp_path / f"base-{family}", task if isinstance(task, str) else task["name"]
    if not base.exists():
        kind = "AutoModelForSeq2SeqLM" if name_of_task == "translation" else "AutoModel"
        tiny_model(family, kind).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
    data = {
        split: _rows(name_of_task, tmp_path / f"{split}.jsonl", count)
        for split, count in (("train", 40), ("validation", 12))
    }
    train = {"epochs": 3, "batch_size": 8, "precision": "fp32", "device": "cpu", "learning_rate": 1e-2}
    recipe = {"task": task, "model": str(base), "data": data, "technique": technique, "train": train | more}
    return tunesmith.train(recipe, output=str(tmp_path / name), console=QUIET)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """Return values of `cache_features`, with a cache of its own."""
    monkeypatch.setattr(sources, "cache_home", lambda: tmp_path / "cache")
    monkeypatch.setattr(prepare.sources, "cache_home", lambda: tmp_path / "cache")
    answers: list[bool] = []
    keep = feature_cache.cache_features

    def kept(*args: Any) -> bool:
        answers.append(keep(*args))
        return answers[-1]

    monkeypatch.setattr(feature_cache, "cache_features", kept)
    return answers


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_losses_and_scores_are_those_without(
    family: str, task: str, technique: str, watched: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if technique == "lora above" and family != "bert":
        pytest.skip("its target is a name of BERT's")
    ours = _run(tmp_path, "with", family, task, TECHNIQUES[technique])
    assert watched == [True, True]
    monkeypatch.setattr(feature_cache, "use_features", lambda *_: None)
    plain = _run(tmp_path, "without", family, task, TECHNIQUES[technique])
    assert _losses(tmp_path / "with") == pytest.approx(_losses(tmp_path / "without"), abs=1e-5)
    assert ours["metrics"]["validation"]["loss"] == pytest.approx(plain["metrics"]["validation"]["loss"], abs=1e-5)


@pytest.mark.parametrize("technique", ["head", "last"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "deberta-v2"])
def test_padded_models_have_the_same_losses_too(
    family: str, technique: str, watched: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_accelerate", lambda *_: switched_off("on trial"))
    _run(tmp_path, "with", family, "text-classification", TECHNIQUES[technique])
    assert watched == [True, True]
    monkeypatch.setattr(feature_cache, "use_features", lambda *_: None)
    _run(tmp_path, "without", family, "text-classification", TECHNIQUES[technique])
    assert _losses(tmp_path / "with") == pytest.approx(_losses(tmp_path / "without"), abs=1e-5)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("family", ["marian", "bart", "t5"])
def test_a_frozen_encoder_is_computed_once(
    family: str, fast: bool, watched: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(prepare, "_accelerate", lambda *_: switched_off("on trial"))
    task = {"name": "translation", "source_lang": "en", "target_lang": "de", "scored_rows": 1}
    technique = {"name": "freeze", "last_n_blocks": 1}
    _run(tmp_path, "with", family, task, technique)
    assert watched == [True, True]
    monkeypatch.setattr(feature_cache, "use_features", lambda *_: None)
    _run(tmp_path, "without", family, task, technique)
    assert _losses(tmp_path / "with") == pytest.approx(_losses(tmp_path / "without"), abs=1e-5)


@pytest.mark.parametrize("fast", [True, False])
def test_masks_are_drawn_a_few_times_and_kept(
    fast: bool, watched: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "DRAWS", 2)
    if not fast:
        monkeypatch.setattr(prepare, "_accelerate", lambda *_: switched_off("on trial"))
    task = {"name": "fill-mask", "general": "none", "head_warmup": 0.0}
    _run(tmp_path, "with", "bert", task, TECHNIQUES["last"], epochs=6)
    assert watched == [True] * 3, "two draws of train, and validation"
    monkeypatch.setattr(feature_cache, "use_features", lambda *_: None)
    _run(tmp_path, "without", "bert", task, TECHNIQUES["last"], epochs=6)
    losses = _losses(tmp_path / "with")
    assert losses == pytest.approx(_losses(tmp_path / "without"), abs=1e-5) and len(losses) > 12


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_head_alone_steps_over_the_token_that_it_reads(
    family: str, watched: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed, tokens = feature_cache._placed, set[int]()

    def seen(cut: Any, layout: Any, *more: Any) -> Any:
        tokens.add(layout.tokens)
        return placed(cut, layout, *more)

    monkeypatch.setattr(feature_cache, "_placed", seen)
    _run(tmp_path, "head", family, "text-classification", TECHNIQUES["head"])
    assert watched == [True, True] and tokens == {1}
    tokens.clear()
    _run(tmp_path, "last", family, "text-classification", TECHNIQUES["last"])
    assert tokens and 1 not in tokens, "a block that learns sees all of a text"


def test_they_are_computed_once_for_all_runs_over_the_same_blocks(
    watched: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(tmp_path, "first", "bert", "text-classification", TECHNIQUES["head"])
    asked: list[int] = []
    record = feature_cache._record

    def counted(*args: Any) -> Any:
        asked.append(len(args[4]))
        return record(*args)

    monkeypatch.setattr(feature_cache, "_record", counted)
    _run(tmp_path, "second", "bert", "text-classification", TECHNIQUES["head"], learning_rate=3e-3)
    assert asked == [feature_cache.NUM_CHECKED] * 2, "but for the few that are tried, nothing is computed"
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 2
    _run(tmp_path, "other", "bert", "text-classification", TECHNIQUES["last"])
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 4
    monkeypatch.setattr(feature_cache, "MAX_BYTES", 0)
    feature_cache.prune(tmp_path / "cache" / "features")
    assert not list((tmp_path / "cache" / "features").iterdir())


def test_they_are_not_where_they_pay_nothing(watched: list[bool], tmp_path: Path) -> None:
    _run(tmp_path, "one epoch", "bert", "text-classification", TECHNIQUES["last"], epochs=1)
    _run(tmp_path, "all", "bert", "text-classification", "lora")
    assert not watched


def test_too_large_they_are_not_kept(
    watched: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(feature_cache, "MAX_BYTES", 100)
    monkeypatch.setattr(QUIET, "say", print)
    _run(tmp_path, "run", "bert", "text-classification", TECHNIQUES["last"])
    assert watched == [False] and "GiB of disk space" in capsys.readouterr().out


def test_a_stopped_run_goes_on_to_the_same_bits(
    watched: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(tmp_path, "whole", "bert", "text-classification", TECHNIQUES["last"], save_every=5)
    save = run._save

    def saved(own: Any) -> None:
        save(own)
        if own.state.step == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "_save", saved)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, "half", "bert", "text-classification", TECHNIQUES["last"], save_every=5)
    monkeypatch.setattr(run, "_save", save)
    tunesmith.train(resume=tmp_path / "half", console=QUIET)
    assert _losses(tmp_path / "half") == _losses(tmp_path / "whole") and len(_losses(tmp_path / "whole")) == 15
    assert watched == [True] * 6
