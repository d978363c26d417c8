"""Several runs share one base with unchanged answers; merged runs follow the papers' formulas."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from tunesmith.console import Console
from tunesmith.deploy import merge as merging
from tunesmith.deploy.multi_adapter import MultiAdapterModel
from tunesmith.errors import CheckpointError, RecipeError, UserError

TEXTS = ["the film was great", "bad", "a very very dull plot", "lovely"]
TECHNIQUES = ("lora", "adapter", "prompt", "prefix", "ia3")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, reviews_csv: Path) -> Any:
    """Folder with one run per technique, a second LoRA and a full run, all over the same base."""
    folder = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(folder / "home"))
        for name, technique in {**{name: name for name in TECHNIQUES}, "lora2": "lora", "full": "full"}.items():
            train = {"max_steps": 4, "batch_size": 8, "precision": "fp32", "device": "cpu", "learning_rate": 0.02}
            tunesmith.train(
                task="text-classification",
                model=str(tiny_bert),
                data={"train": str(reviews_csv)},
                technique=technique,
                train=train | {"seed": len(name)},
                output=str(folder / name),
                console=Console(level=-1),
            )
        yield folder


def _probabilities(answers: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([list(answer["probabilities"].values()) for answer in answers])


def test_each_answers_as_it_does_alone(runs: Path, tiny_bert: Path) -> None:
    several = tunesmith.load(tiny_bert, adapters=[runs / name for name in TECHNIQUES])
    assert isinstance(several, MultiAdapterModel)
    for name in TECHNIQUES:
        alone = tunesmith.load(runs / name).predict(TEXTS)
        assert torch.allclose(_probabilities(several.predict(TEXTS, name)), _probabilities(alone), atol=1e-6)
    mixed = several.predict(TEXTS, ["lora", "prompt", "ia3", "lora"])
    asked = zip(TEXTS, ("lora", "prompt", "ia3", "lora"), strict=True)
    expected = [several.predict([text], name)[0] for text, name in asked]
    assert torch.allclose(_probabilities(mixed), _probabilities(expected), atol=1e-6)


def test_what_is_frozen_is_held_once(runs: Path, tiny_bert: Path) -> None:
    several = tunesmith.load(tiny_bert, adapters=[runs / "lora", runs / "prefix"])
    first, second = (dict(tuned.model.named_parameters()) for tuned in several.runs.values())
    frozen = [name for name, parameter in first.items() if not parameter.requires_grad]
    assert frozen and all(first[name].data_ptr() == second[name].data_ptr() for name in frozen)


def test_it_says_in_a_line_what_it_is(runs: Path, tiny_bert: Path) -> None:
    several = tunesmith.load(tiny_bert, adapters=[runs / "lora", runs / "ia3"])
    assert repr(several) == "<2 runs with one base: lora, ia3>"
    assert repr(several.runs["lora"]) == f"<text-classification with lora, run {runs / 'lora'}>"


def test_the_only_run_need_not_be_named(runs: Path, tiny_bert: Path) -> None:
    several = tunesmith.load(tiny_bert, adapters=[runs / "lora"])
    assert several.predict(TEXTS) == several.predict(TEXTS, "lora")


def test_what_several_refuses(runs: Path, tiny_bert: Path, tmp_path: Path) -> None:
    several = tunesmith.load(tiny_bert, adapters=[runs / "lora"])
    with pytest.raises(UserError, match="did you mean 'lora'"):
        several.predict(TEXTS, "lorra")
    with pytest.raises(UserError, match="adapter: missing; .*lora, ia3"):
        tunesmith.load(tiny_bert, adapters=[runs / "lora", runs / "ia3"]).predict(TEXTS)
    with pytest.raises(UserError, match="2 adapters for 4 inputs"):
        several.predict(TEXTS, ["lora", "lora"])
    with pytest.raises(UserError, match="whole model"):
        tunesmith.load(tiny_bert, adapters=[runs / "full"])
    with pytest.raises(UserError, match="two adapters"):
        tunesmith.load(tiny_bert, adapters=[runs / "lora", runs / "lora"])
    with pytest.raises(CheckpointError, match="other weights"):
        tunesmith.load(runs / "full", adapters=[runs / "lora"])


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(tunesmith.load(folder).model.named_parameters())


def test_one_run_is_merged_into_its_base(runs: Path, tmp_path: Path, command: Command) -> None:
    code, out, _ = command("merge", str(runs / "lora"), "--output", str(tmp_path / "alone"))
    assert code == 0 and f"{runs / 'lora'} into {tmp_path / 'alone'}; " in out


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_run_merged_with_nothing_is_itself(name: str, runs: Path, tmp_path: Path) -> None:
    merging.merge([runs / name], tmp_path / "merged")
    merged = tunesmith.load(tmp_path / "merged").predict(TEXTS)
    assert torch.allclose(_probabilities(merged), _probabilities(tunesmith.load(runs / name).predict(TEXTS)), atol=1e-5)


def test_a_weighted_sum_is_one(runs: Path, tiny_bert: Path, tmp_path: Path) -> None:
    for share in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.7)):
        merging.merge([runs / "lora", runs / "lora2"], tmp_path / "merged", weights=share, overwrite=True)
        parts = []
        for name in ("lora", "lora2"):
            if not (runs / name / "model").exists():
                merging.merge_adapter(runs / name)
            shutil.copytree(runs / name, tmp_path / name, dirs_exist_ok=True)
            shutil.rmtree(tmp_path / name / "adapter")
            parts.append(_weights(tmp_path / name))
        for path, found in _weights(tmp_path / "merged").items():
            wanted = share[0] * parts[0][path] + share[1] * parts[1][path]
            assert torch.allclose(found, wanted, atol=1e-5), path


def test_ties_and_dare_by_hand() -> None:
    one, other = torch.tensor([4.0, -1.0, 3.0, 0.5]), torch.tensor([-2.0, -3.0, 1.0, 0.1])
    draw = torch.Generator().manual_seed(0)
    ties = merging.combine([one, other], [1.0, 1.0], "ties", 0.5, draw)
    assert ties.tolist() == [4.0, -3.0, 3.0, 0.0]  # kept: 4 and 3, -2 and -3; the sign of 4 - 2 is plus
    halves = merging.combine([one, other], [0.5, 0.5], "ties", 1.0, draw)
    assert torch.allclose(halves, torch.tensor([4.0, -2.0, 2.0, 0.3]))
    many = torch.ones(20_000)
    dare = merging.combine([many], [1.0], "dare", 0.25, draw)
    assert set(dare.unique().tolist()) == {0.0, 4.0} and float(dare.mean()) == pytest.approx(1.0, abs=0.05)


def test_what_merging_refuses(runs: Path, tmp_path: Path, command: Command) -> None:
    with pytest.raises(RecipeError, match="prompt cannot be merged"):
        merging.merge([runs / "lora", runs / "prompt"], tmp_path / "merged")
    code, _, said = command("merge", str(runs / "lora"), str(runs / "lora2"), "--output", "m", "--weights", "a,b")
    assert code == 2 and "--weights" in said
    code, _, said = command("merge", str(runs / "lora"), str(runs / "lora2"), "--output", "m", "--weights", "1")
    assert code == 2 and "--weights: 1 weight for 2 runs" in said
    for weights in ("1,-1", "nan,1"):
        code, _, said = command("merge", str(runs / "lora"), str(runs / "lora2"), "--output", "m", "--weights", weights)
        assert code == 2 and "--weights: " in said and "sum 0" in said
    for density, method in (("0.5", "linear"), ("2", "ties"), ("0", "dare")):
        words = ("--output", "m", "--density", density, "--method", method)
        code, _, said = command("merge", str(runs / "lora"), str(runs / "lora2"), *words)
        assert code == 2 and "--density: " in said
    assert not (tmp_path / "merged").exists() and not Path("m").exists()
    code, _, said = command("merge", str(runs / "lora"), "--output", str(runs / "lora"), "--overwrite")
    assert code == 2 and "--output: " in said and "one of the runs" in said and "another folder" in said


def test_the_verb_writes_a_run(runs: Path, tmp_path: Path, command: Command) -> None:
    merged = tmp_path / "merged"
    words = ("merge", str(runs / "lora"), str(runs / "full"), "--method", "ties", "--output", str(merged))
    code, out, _ = command(*words)
    assert code == 0 and out == f'merged 2 runs into {merged}; try it: tunesmith predict {merged} "..."\n'
    card = (merged / "README.md").read_text(encoding="utf-8")
    assert f"- 0.5 x `{runs / 'lora'}`\n- 0.5 x `{runs / 'full'}`\n" in card and "- merge\n" in card
    assert "Merged (ties, 20% of entries kept, seed 0)" in card and f"`tunesmith evaluate {merged}`" in card
    lines = re.findall(r"```python\n(.*?)```", card, re.S)
    assert len(lines) == 2
    for code_of_card in lines:
        exec(code_of_card, {})
    assert command("evaluate", str(merged), "--split", "validation")[0] == 0
    code, out, _ = command("predict", str(merged), "lovely")
    assert code == 0 and out
    code, _, said = command(*words)
    assert code == 2 and str(merged) in said and "; " in said and "--overwrite" in said


def test_a_run_with_an_adapter_is_a_base(runs: Path, reviews_csv: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "lora", tmp_path / "first", ignore=shutil.ignore_patterns("model"))
    given = {"task": "text-classification", "data": {"train": str(reviews_csv)}, "output": str(tmp_path / "second")}
    train = {"max_steps": 1, "batch_size": 8, "precision": "fp32", "device": "cpu", "learning_rate": 1e-12}
    tunesmith.train(
        given | {"model": str(tmp_path / "first"), "technique": "bitfit", "train": train}, console=Console(level=-1)
    )
    first, second = (_probabilities(tunesmith.load(tmp_path / name).predict(TEXTS)) for name in ("first", "second"))
    assert torch.allclose(first, second, atol=1e-5)
