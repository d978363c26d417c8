from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import models, rows
from bench.arms import encode_once, floor, ours, trainer
from bench.splits import read_rows, read_sentences
from bench.workloads import ON_GPUS, SPEED, WORKLOADS, Workload, chosen
from tunesmith.console import Console
from tunesmith.models import sources
from tunesmith.recipe import load
from tunesmith.run.prepare import Prepared
from tunesmith.testing import sample_row

README = Path(__file__).parents[2] / "bench" / "README.md"


def test_the_readme_names_the_workloads() -> None:
    text = README.read_text(encoding="utf-8")
    for name in {workload.name.partition("-")[0] for workload in WORKLOADS}:
        assert f"| {name} |" in text
    assert text.count("| C") == len({workload.name.partition("-")[0] for workload in SPEED})


def test_a_name_means_one_or_all_that_begin_so() -> None:
    assert [workload.name for workload in chosen(["C5"])] == ["C5-freeze", "C5-lora"]
    assert [workload.name for workload in chosen(["C5-lora", "C1-6x768"])] == ["C1-6x768", "C5-lora"]
    assert [workload.name for workload in chosen(["C1"])] == ["C1-6x768", "C1-12x768"], "C10 is another"
    assert {workload.memory for workload in chosen(["mem"])} == {True}
    assert [*chosen([]), *chosen([], "cuda")] == [*WORKLOADS]
    with pytest.raises(ValueError, match="C99: unknown workload; choose from C1-6x768"):
        chosen(["C99"])


@pytest.mark.parametrize("workload", (*SPEED, *ON_GPUS), ids=lambda workload: workload.name)
def test_there_are_defaults_and_best_practice_and_ours_is_a_recipe(workload: Workload) -> None:
    ways = [peer.keys.get("best") for peer in workload.peers]
    assert True in ways and False in ways
    assert workload.model in models.FETCHED or workload.model in (*models.BLOCKS, *models.DECODERS, models.MARIAN)
    where = {"model": "a/model", "data": "train.csv", "device": "cpu", "precision": "fp32"}
    recipe = load(None, (), ours.keywords(workload.job(None, **where), "runs/never"))
    assert recipe.train.batch_size == workload.batch_size and recipe.data.validation is None


def test_decoders_have_the_sizes_that_they_are_called_by() -> None:
    numbers = {}
    for name, (kind, sizes) in models.DECODERS.items():
        with torch.device("meta"):
            numbers[name] = AutoModelForCausalLM.from_config(kind(**sizes)).num_parameters()
    assert numbers == pytest.approx({"llama-1b": 1.24e9, "llama-8b": 8.03e9, "qwen-0.5b": 0.494e9}, rel=0.01)


@pytest.mark.parametrize("kind", rows.KINDS)
def test_absent_data_is_made_up_in_the_same_form(kind: str, tmp_path: Path) -> None:
    path, real = rows.write(kind, tmp_path / "nothing", 64, tmp_path / "written")
    assert not real
    task = next(workload.task for workload in SPEED if workload.data == kind)
    if task == "text-classification":
        lengths = [len(text.split()) for text, _ in read_rows(path)]
        assert len(lengths) == 64 and (min(lengths) >= rows.CUT_AT if kind == "medquad" else len(set(lengths)) > 8)
    elif task == "token-classification":
        assert len(read_sentences(path)) == 64
    else:
        files = [path / "train.en", path / "train.de"] if path.is_dir() else [path]
        assert [len(file.read_text(encoding="utf-8").splitlines()) for file in files] == [64] * len(files)


def test_rows_are_the_same_every_time(tmp_path: Path) -> None:
    once, again = (rows.write("sst2", tmp_path / "nothing", 8, tmp_path / name)[0] for name in ("a", "b"))
    assert once.read_text() == again.read_text()
    assert rows._text(random.Random(0), 20) == rows._text(random.Random(0), 20)


def _job(task: str, model: Path, data: Path, **more: Any) -> dict[str, Any]:
    shared = {"batch_size": 8, "epochs": 2, "max_length": 32, "learning_rate": 1e-3}
    return {
        "task": task,
        "model": str(model),
        "data": str(data),
        "device": "cpu",
        "precision": "fp32",
        **shared,
        **more,
    }


def test_what_is_computed_once_is_timed_in_every_run(
    tiny_bert: Path, reviews_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, homes = Prepared.cache_features, []

    def slowly(prepared: Prepared, console: Console) -> float:
        homes.append(sources.cache_home())
        assert not (homes[-1] / "features").exists(), "what an earlier run has kept"
        time.sleep(0.5)
        return inner(prepared, console)

    monkeypatch.setattr(Prepared, "cache_features", slowly)
    job = _job("text-classification", tiny_bert, reviews_csv, technique={"name": "freeze", "head_only": True})
    assert all(0.5 < ours.go(job)["seconds"] < 10 for _ in range(2))
    assert len(set(homes)) == 2


@pytest.mark.filterwarnings("ignore")  # of transformers' own
def test_the_arms_do_the_same_work(tiny_bert: Path, reviews_csv: Path) -> None:
    job = _job("text-classification", tiny_bert, reviews_csv)
    mine = ours.go(job | {"technique": {"name": "freeze", "last_n_blocks": 2}})
    for keys in ({"best": True}, {"best": False, "pad_to": 32}):
        theirs = trainer.go(job | {"technique": {"name": "last-2"}, **keys})
        assert theirs["samples"] == mine["samples"] == 120
        assert theirs["tokens"] == pytest.approx(mine["tokens"], rel=0.05)  # ours come from rounded numbers
        assert theirs["learned"] == mine["learned"]
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=0.2)
        assert 0 < theirs["cpu_seconds"] and 0 < theirs["seconds"]
    assert 0 < mine["cpu_seconds"] and 0 < mine["seconds"]
    once = encode_once.go(job | {"technique": {"name": "head"}})
    assert once["tokens"] == theirs["tokens"] and 0 < once["last_loss"] < 0.7


def test_the_floor_is_counted_from_a_job(tiny_marian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.floor.SECONDS", 0.0)
    known = [sample_row("translation", number) for number in range(8)]
    job = _job("translation", tiny_marian, rows._put_pairs(tmp_path, [(row["source"], row["target"]) for row in known]))
    full, lora = (floor.go(job | {"technique": {"name": name}}) for name in ("full", "lora"))
    assert 0 < lora["multiply_adds"] < full["multiply_adds"] < 2 * lora["multiply_adds"] and full["rate"] > 0
