"""Stages of one recipe: each starts from the previous one; resumed as a whole, refused when changed; their gain."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from messages import has_parts

import tunesmith
from tunesmith import recipe as recipes
from tunesmith.console import Console
from tunesmith.errors import CheckpointError, Interrupted, RecipeError, UserError
from tunesmith.run import train as run
from tunesmith.studies import stages
from tunesmith.testing import sample_row, tiny_model, tiny_tokenizer

QUIET = Console(level=-1)


@pytest.fixture
def written(tmp_path: Path, reviews_csv: Path) -> Path:
    """A recipe of two stages over a base without a head."""
    tiny_model("bert", "AutoModel").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    texts = "\n\n".join(str(sample_row("fill-mask", number)["text"]) for number in range(30))
    (tmp_path / "texts.txt").write_text(texts)
    path = tmp_path / "two.yaml"
    path.write_text(f"""\
model: {tmp_path / "base"}
technique: full
output: {tmp_path / "out"}
train: {{max_steps: 4, batch_size: 8, learning_rate: 1e-3, precision: fp32, device: cpu, save_every: 1}}
stages:
  - task: fill-mask
    data: {{train: {tmp_path / "texts.txt"}, validation: 0.2, max_length: 16}}
  - task: text-classification
    data: {{train: {reviews_csv}, validation: 0.2, test: 0.2}}
    train: {{max_steps: 3}}
""")
    return path


def _weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_stage_starts_from_the_run_before_it(written: Path, tmp_path: Path, capsys: Any) -> None:
    result = tunesmith.train(written, "stages.1.train.max_steps=2")
    said = capsys.readouterr().out
    first, second = tmp_path / "out" / "1-fill-mask", tmp_path / "out" / "2-text-classification"
    assert [one["run"] for one in result["stages"]] == [str(first), str(second)]
    assert [one["steps"] for one in result["stages"]] == [2, 3] and result["task"] == "text-classification"
    assert result["metrics"] == result["stages"][1]["metrics"] and "gain" not in result
    assert "stage 1 of 2: fill-mask" in said and "gain.seeds=3" in said
    about = json.loads((second / "run.json").read_text())
    assert about["model"]["spec"] == str(first) and about["model"]["lineage"][0]["run"] == str(first)
    assert about["model"]["lineage"][0]["model"]["spec"] == str(tmp_path / "base")
    assert f"train --resume {tmp_path / 'out'}\n" in said and "1-fill-mask\n" not in said, "the whole is gone on with"
    assert json.loads((tmp_path / "out" / "stages.json").read_text()) == result
    again = tunesmith.train(resume=tmp_path / "out", console=QUIET)
    assert again == result, "what is finished is not run again"
    (tmp_path / "alone").mkdir()
    alone = run.train(recipes.load(second / "recipe.yaml", [f"output={tmp_path / 'alone' / 'run'}"]), console=QUIET)
    assert _weights(second) == _weights(Path(alone["run"])), "a stage is an ordinary run"


@pytest.mark.parametrize("stage", (1, 2))
def test_a_killed_stage_resumes_and_a_finished_one_is_kept(
    stage: int, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tunesmith.train(written, f"output={tmp_path / 'whole'}", console=QUIET)
    save, begun = run._save, []

    def interrupted(one: Any) -> None:
        save(one)
        if one.folder.name.startswith(str(stage)) and one.state.step == 2 and not begun:
            begun.append(one.folder)
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tunesmith.train(written, console=QUIET)
    out = tmp_path / "out"
    first = (out / "1-fill-mask" / "run.json").read_text()
    result = tunesmith.train(resume=out, console=QUIET)
    assert stage == 1 or (out / "1-fill-mask" / "run.json").read_text() == first
    assert result["metrics"] == whole["metrics"]
    for name in ("1-fill-mask", "2-text-classification"):
        assert _weights(out / name) == _weights(tmp_path / "whole" / name)


def test_other_stages_are_not_resumed(written: Path, tmp_path: Path) -> None:
    tunesmith.train(written, console=QUIET)
    with pytest.raises(CheckpointError, match=r"stages\.2\.train\.max_steps was '3', is '5'"):
        tunesmith.train(written, "stages.2.train.max_steps=5", resume=tmp_path / "out", console=QUIET)
    with pytest.raises(RecipeError, match="^.*output: .*not empty"):
        tunesmith.train(written, console=QUIET)
    result = tunesmith.train(written, "stages.1.train.max_steps=1", overwrite=True, console=QUIET)
    assert result["stages"][0]["steps"] == 1


def test_dependents_of_a_rerun_stage_are_rerun(written: Path, tmp_path: Path) -> None:
    tunesmith.train(written, "gain.seeds=2", console=QUIET)
    key = "stages.1.train.max_steps"
    again = tunesmith.train(written, "gain.seeds=2", f"{key}=6", resume=tmp_path / "out", override=[key], console=QUIET)
    assert [one["steps"] for one in again["stages"]] == [6, 3]
    about = json.loads((tmp_path / "out" / "2-text-classification" / "run.json").read_text())
    assert about["model"]["lineage"][0]["steps"] == 6
    key = "stages.2.train.max_steps"
    words = ("gain.seeds=2", "stages.1.train.max_steps=6", f"{key}=5")
    tunesmith.train(written, *words, resume=tmp_path / "out", override=[key], console=QUIET)
    runs = (path for path in (tmp_path / "out").glob("*/run.json") if "fill-mask" not in str(path))
    assert [json.loads(path.read_text())["steps"] for path in runs] == [5] * 4


def test_a_gain_on_rows_seen_in_training_is_refused(written: Path, reviews_csv: Path) -> None:
    learned = ("stages.1.task=text-classification", f"stages.1.data.train={reviews_csv}", "gain.seeds=2")
    with pytest.raises(
        RecipeError, match=r"^gain: stage 1 .*reviews\.csv.*; .*data\.validation and data\.test.*gain=null"
    ):
        tunesmith.train(written, *learned, console=QUIET)


def test_the_gain_is_paired_and_has_a_standard_error(written: Path, tmp_path: Path, capsys: Any) -> None:
    result = tunesmith.train(written, "gain.seeds=2", "train.max_steps=2")
    gain, out = result["gain"], tmp_path / "out"
    assert gain["metric"] == "accuracy" and gain["split"] == "test" and gain["seeds"] == [0, 1]
    assert gain["with"][0] == result["metrics"]["test"]["accuracy"]
    for seed in (0, 1):
        about = json.loads((out / f"without-seed-{seed}" / "run.json").read_text())
        assert about["model"]["spec"] == str(tmp_path / "base") and about["seed"] == seed
        assert about["metrics"]["test"]["accuracy"] == gain["without"][seed]
    gains = [one - other for one, other in zip(gain["with"], gain["without"], strict=True)]
    assert gain["mean"] == pytest.approx(sum(gains) / 2)
    assert gain["standard_error"] == pytest.approx(abs(gains[0] - gains[1]) / 2)
    assert gain["within_noise"] == (abs(gain["mean"]) <= 2 * gain["standard_error"])
    said = capsys.readouterr().out
    assert ("not significant" in said) == gain["within_noise"]
    headings = [line for line in said.splitlines() if line.startswith("gain")]
    assert has_parts(headings[0], "gain: ", "text-classification", "2 seeds")
    assert [re.findall(r"seed \d|with(?:out)?(?= )", line) for line in headings[1:-1]] == [
        ["seed 0", "without"], ["seed 1", "with"], ["seed 1", "without"]
    ]  # fmt: skip
    assert " is finished" not in said
    tunesmith.train(resume=out)
    said = capsys.readouterr().out
    assert sorted(line for line in said.splitlines() if line.endswith(" is finished")) == sorted(
        f"{out / name} is finished"
        for name in (
            "1-fill-mask",
            "2-text-classification",
            "2-text-classification-seed-1",
            "without-seed-0",
            "without-seed-1",
        )
    )


@pytest.mark.parametrize(
    ("gains", "said"),
    (
        ((0.1, 0.3, 0.2), "not significant (within 4.3 standard errors)"),
        ((0.1, 0.12, 0.11), "0.0058: significant; "),
        ((0.1, -0.1, 0.01), "not significant"),
    ),
)
def test_the_report_of_a_gain(gains: tuple[float, ...], said: str, capsys: Any) -> None:
    stages._say_gain(stages.gain_of("accuracy", "test", [0, 1, 2], gains, (0.0, 0.0, 0.0)), Console())
    assert said in capsys.readouterr().out
    lower = stages.gain_of("loss", "test", [0, 1, 2], (1.0, 1.1, 1.2), (2.0, 2.2, 2.1))
    assert lower["mean"] == pytest.approx(1.0) and not lower["within_noise"], "of a loss less is better"


REFUSED = {
    "a stage that is none": ("stages: [fill-mask]\nmodel: x\n", "two.yaml:1: stages.1: "),
    "an output of its own": ("stages:\n  - {task: fill-mask, output: a}\nmodel: x\n", "two.yaml:2: stages.1.output: "),
    "a key that is unknown": ("model: x\nstages:\n  - task: fill-mask\n  - task: {name: fill-mask, shar: 1}\n",
                              "two.yaml:4: stages.2.task.shar: unknown key"),
    "no list": ("model: x\nstages: fill-mask\n", "two.yaml:2: stages: must be a list "),
    "no base": ("stages:\n  - task: fill-mask\n", "model: missing"),
    "one seed": ("model: x\ngain: {seeds: 1}\nstages:\n  - task: fill-mask\n", "gain.seeds: must be at least 2"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_errors_name_the_line(why: str, tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    text, said = REFUSED[why]
    path = tmp_path / "two.yaml"
    path.write_text(text)
    code, _, err = command("train", str(path))
    assert code == 2 and said in err and err.count("\n") == 1, err
    path.write_text("model: x\nstages:\n  - task: fill-mask\n")
    code, _, err = command("train", str(path), "stages=5")
    assert code == 2 and "command line: stages: must be a list " in err, err
    code, _, err = command("train", str(path), "stages.2.train.epochs=1")
    assert code == 2 and "command line: stages.2: " in err and "1 to 1" in err, err


def test_a_later_error_names_its_line_in_the_stage(written: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    written.write_text(written.read_text().replace("{max_steps: 3}", "{max_steps: 3, metric: f2}"))
    code, _, err = command("train", str(written), "--offline")
    assert code == 2 and f"{written}:10: stages.2.train.metric: " in err and "'f2'" in err, err
    code, _, err = command("train", str(written), "stages.1.train.metric=f3", "--offline", "--overwrite")
    assert code == 2 and "command line: stages.1.train.metric: " in err and "'f3'" in err, err


def test_a_refused_first_stage_leaves_no_folder(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone"):
        tunesmith.train(written, "stages.1.data.train=" + str(tmp_path / "gone.txt"), console=QUIET)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError):
        tunesmith.train(written, "stages.2.data.train=" + str(tmp_path / "gone.csv"), console=QUIET)
    assert (tmp_path / "out" / "stages.yaml").exists(), "the first stage stands, and is gone on with"


def test_json_is_one_object(written: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = command("train", str(written), "train.max_steps=1", "--json", "--offline")
    assert code == 0, err
    result = json.loads(out)
    assert len(result["stages"]) == 2 and result["run"] == result["stages"][1]["run"]


def test_data_verbs_take_a_stage(written: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    said = {word: command("data", "show", str(written), "-n", "1", *word) for word in ((), ("--stage", "1"))}
    assert [code for code, _, _ in said.values()] == [0, 0]
    assert "target: " in said[()][1] and "[MASK]" in said["--stage", "1"][1]
    code, out, _ = command("data", "check", str(written), "--stage", "1")
    assert code == 0 and out.startswith("note: inspecting stage 1 of 2 (fill-mask); set --stage N for another")
    assert json.loads(command("data", "check", str(written), "--json")[1])["task"] == "text-classification"
    for words, why in (
        ((str(written), "--stage", "3"), "there is no stage 3; 1 to 2"),
        (("a.csv", "--stage", "1"), "the recipe has no stages"),
    ):
        code, _, err = command("data", "check", *words)
        assert code == 2 and f"--stage: {why}" in err


def test_a_folder_of_runs_names_them(
    written: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    tunesmith.train(written, "train.max_steps=1", "stages.2.train.max_steps=1", console=QUIET)
    out = tmp_path / "out"
    runs = f"use one of the runs in it: {out / '1-fill-mask'}, {out / '2-text-classification'}\n"
    for words in (
        ("predict", str(out), "x"),
        ("evaluate", str(out)),
        ("chat", str(out)),
        ("models", "path", str(out)),
        ("data", "show", str(tmp_path / "texts.txt"), "task=fill-mask", "--model", str(out)),
    ):
        code, _, err = command(*words)
        assert code == 2 and err.endswith(runs), words
    code, shown, _ = command("data", "show", str(out), "-n", "1")
    assert code == 0 and "target: " in shown, "the folder stands for its recipe"


def test_a_signal_prints_the_resume_command_of_all_stages(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(prepared: Any, *_: Any) -> None:
        from tunesmith.run.signals import Stopped

        raise Stopped("SIGTERM")

    monkeypatch.setattr(run, "_fit", asked)
    with pytest.raises(Interrupted, match=f"tunesmith.*train --resume {tmp_path / 'out'}$"):
        tunesmith.train(written, console=QUIET)
