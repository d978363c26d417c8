"""A resumed run must be the same run: each key that differs is refused, and may be overridden by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import STOP, Done, Forks
from outcome import differences, result


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _refused(done: Done, *differences: str) -> None:
    """Refused in one line with these keys and the flags that override them."""
    assert done.code == [6] and done.err.count("\n") == 1, done.err
    assert done.err.startswith("error: ")
    for said in differences:
        assert f" {said}" in done.err, done.err
        assert f"--override {said.split()[0]}" in done.err, done.err


CHANGES = {
    "learning rate": ("train.learning_rate=0.05", "train.learning_rate was '0.001', is '0.05'"),
    "batch size": ("train.batch_size=4", "train.batch_size was '8', is '4'"),
    "seed": ("train.seed=9", "train.seed was '0', is '9'"),
    "number format": ("train.precision=bf16", "train.precision was 'fp32', is 'bf16'"),
    "a key of the technique": ("technique.layer_lr_decay=0.5", "technique.layer_lr_decay was '1.0', is '0.5'"),
    "technique": ("technique=lora", "technique.name was 'full', is 'lora'"),
    "split": ("data.validation=0.3", "data.validation was '0.2', is '0.3'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused(change: str, run: Path, forks: Forks) -> None:
    word, said = CHANGES[change]
    before = _tree(run)
    _refused(forks.resume(run, word), said)
    assert _tree(run) == before, "nothing was touched"


def test_every_field_that_differs_is_named(run: Path, forks: Forks) -> None:
    before = _tree(run)
    words, said = zip(*(CHANGES[name] for name in CHANGES if name != "technique"), strict=True)
    _refused(forks.resume(run, *words), *said)
    assert _tree(run) == before, "nothing was touched"
    but_one = [over for line in said[1:] for over in ("--override", line.split()[0])]
    _refused(forks.resume(run, *words, *but_one), said[0])


def test_other_data_under_the_same_name_is_refused(forks: Forks, reviews_csv: Path, tmp_path: Path) -> None:
    data = tmp_path / "reviews.csv"
    lines = reviews_csv.read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert forks.train(tmp_path / "run", f"data.train={data}", fault=STOP).code == [75]
    data.write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n", encoding="utf-8")  # the same rows, reversed
    _refused(forks.resume(tmp_path / "run"), "data_sha256.train was", "data_sha256.validation was")


@pytest.mark.slow
def test_another_base_under_the_same_name_is_refused(forks: Forks, tiny_bert: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    assert forks.train(tmp_path / "run", f"model={model}", fault=STOP).code == [75]
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    _refused(forks.resume(tmp_path / "run"), "base_sha256 was")


def test_another_number_of_processes_is_refused(run: Path, forks: Forks) -> None:
    done = forks.resume(run, world=2)
    assert done.code == [6, 6] and "world_size was '1', is '2'" in done.err and "--override world_size" in done.err


def test_what_is_overridden_holds_and_is_written_down(run: Path, forks: Forks) -> None:
    done = forks.resume(run, CHANGES["learning rate"][0], "--override", "train.learning_rate")
    assert done.code == [0], done.err
    assert json.loads((run / "run.json").read_text())["overridden"] == ["train.learning_rate"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert rates[6] == pytest.approx(0.001 * 7 / 11) and rates[7] == pytest.approx(0.05 * 6 / 11), "one schedule"
    assert "learning_rate: 0.05" in (run / "recipe.yaml").read_text()
    assert forks.resume(run).code == [0], "the recipe of the run has it from then on"


@pytest.mark.slow
def test_another_optimizer_starts_afresh(run: Path, forks: Forks) -> None:
    assert forks.resume(run, "train.optimizer=sgd", "--override", "train.optimizer").code == [0]


@pytest.mark.parametrize("word", ("technique=lora", {"technique": "freeze"}), ids=str)
def test_what_does_not_fit_cannot_be_overridden(word: Any, run: Path, forks: Forks) -> None:
    before = _tree(run)
    word = "technique={name: freeze, last_n_blocks: 1}" if isinstance(word, dict) else word
    done = forks.resume(run, word, "--override", "technique")
    assert done.code == [6] and "technique" in done.err
    assert _tree(run) == before


@pytest.mark.parametrize(
    ("words", "said"),
    (
        (("--override", "train.seed"), "--override: "),
        (("--resume", "RUN", "--overwrite"), "--overwrite: "),
    ),
)
def test_words_that_do_not_go_together(words: tuple[str, ...], said: str, run: Path, forks: Forks) -> None:
    before = _tree(run)
    done = forks("train", *forks.words, *(str(run) if word == "RUN" else word for word in words))
    assert done.code == [2] and said in done.err and _tree(run) == before


def test_nothing_to_resume(forks: Forks, tmp_path: Path) -> None:
    done = forks.resume(tmp_path / "nothing")
    assert done.code == [6] and f"{tmp_path / 'nothing'}: " in done.err


@pytest.mark.slow
def test_a_finished_run_stays_finished(run: Path, forks: Forks, undisturbed: dict[str, Any]) -> None:
    assert forks.resume(run).code == [0]
    assert differences(result(run), undisturbed) == []
    assert forks.resume(run).code == [0], "once more"
    assert differences(result(run), undisturbed) == []
    _refused(forks.resume(run, CHANGES["seed"][0]), CHANGES["seed"][1])
    assert json.loads((run / "run.json").read_text())["outcome"] == "done"
