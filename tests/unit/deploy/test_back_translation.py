"""Back-translation with two runs: computed once, equal in each run and after a resume, errors with their key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith import registry
from tunesmith.console import Console
from tunesmith.data.formats import Row
from tunesmith.data.text.augment import Augmenter, texts_of
from tunesmith.deploy import back_translation, predict
from tunesmith.deploy.back_translation import back_translate
from tunesmith.errors import RecipeError
from tunesmith.recipe.fields import Augmentation
from tunesmith.testing import sample_row

QUIET = Console(level=-1)
Runs = tuple[Path, Path]


@pytest.fixture(scope="module")
def translators(tiny_marian: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two translation runs of opposite directions."""
    folder = tmp_path_factory.mktemp("translators")
    rows = [sample_row("translation", number) for number in range(60)]
    lines = ["en\tde", *(f"{row['source']}\t{row['target']}" for row in rows)]
    (folder / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    for source, target in (("en", "de"), ("de", "en")):
        tunesmith.train(
            task={"name": "translation", "source_lang": source, "target_lang": target, "max_new_tokens": 10},
            model=str(tiny_marian),
            data={"train": str(folder / "pairs.tsv"), "validation": None, "max_length": 16},
            technique="full",
            train={"max_steps": 60, "batch_size": 16, "learning_rate": 5e-3, "precision": "fp32", "device": "cpu"},
            output=str(folder / source),
            console=QUIET,
        )
    return folder / "en", folder / "de"


def _step(runs: Runs, probability: float = 0.5) -> Augmentation:
    names = [str(run) for run in runs]
    return Augmentation.model_validate({"name": "back-translation", "probability": probability, "runs": names})


def test_texts_go_there_and_back_once(translators: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [str(sample_row("translation", number)["source"]) for number in range(5)]
    said: list[str] = []
    found = back_translate(texts, [_step(translators)], tmp_path, device="cpu", say=said.append)
    there, back = (predict.load(run, device="cpu") for run in translators)
    halfway = [answer["translation"] for answer in there.predict(sorted(set(texts)))]
    wanted = [answer["translation"] for answer in back.predict(halfway)]
    assert found == dict(zip(sorted(set(texts)), wanted, strict=True)) and len(said) == 2
    monkeypatch.setattr(predict, "load", lambda *_, **__: pytest.fail("it is kept"))
    assert back_translate(reversed(texts), [_step(translators, 0.9)], tmp_path) == found
    assert back_translate(texts, [], tmp_path) == {}


def test_a_text_that_is_nothing_stays_as_it_is(translators: Runs, tmp_path: Path) -> None:
    found = back_translate(["the film was great", "\u200b"], [_step(translators)], tmp_path, device="cpu", say=str)
    assert found["\u200b"] == "\u200b" and found["the film was great"] != ""


def test_a_share_of_the_texts_is_said_otherwise_anew_in_each_epoch(translators: Runs) -> None:
    classified, translated = (registry.get("task", name)().columns for name in ("text-classification", "translation"))
    augmenter = Augmenter.of([_step(translators)], 0, classified, {"a b": "c d"})
    row = Row("a:1", {"text": "a b", "label": "x"})
    drawn = [[augmenter.row(row, epoch, index).values["text"] for index in range(100)] for epoch in range(2)]
    assert {text for texts in drawn for text in texts} == {"a b", "c d"} and drawn[0] != drawn[1]
    assert 30 < drawn[0].count("c d") < 70
    assert drawn[0] == [augmenter.row(row, 0, index).values["text"] for index in range(100)]
    every = {"text": "a", "text_pair": "b", "label": "c", "source": "d", "target": "e"}
    assert list(texts_of([Row("a:1", every)], classified)) == ["a", "b"]
    assert list(texts_of([Row("a:1", every)], translated)) == ["d"], "what is to be learned stays as it is"


def test_a_run_learns_from_them_and_a_resume_goes_on_bit_for_bit(recipe_of: Any, translators: Runs) -> None:
    steps = [_step(translators).model_dump()]
    recipe = recipe_of(
        "train.epochs=2", "data.validation=null", data={"train": recipe_of().data.train, "augment": steps}
    )

    def losses(*words: str, **how: Any) -> list[float]:
        tunesmith.train(recipe, *words, console=QUIET, **how)
        lines = Path(recipe.output, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    whole = losses()
    assert losses(overwrite=True) == whole
    plain = recipe_of("train.epochs=2", "data.validation=null")
    tunesmith.train(plain, overwrite=True, console=QUIET)
    lines = Path(plain.output, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert whole != [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_runs_that_are_none_are_refused(recipe_of: Any, tmp_path: Path, translators: Runs) -> None:
    with pytest.raises(RecipeError, match=r"data\.augment: no run in .*nowhere"):
        back_translation.fingerprints([_step((tmp_path / "nowhere", tmp_path))])
    recipe = recipe_of("train.max_steps=1", "train.epochs=null")
    tunesmith.train(recipe, console=QUIET)
    with pytest.raises(RecipeError, match=r"text-classification, not .*translation"):
        back_translate(["a"], [_step((Path(recipe.output), translators[1]))], tmp_path, say=str)
    tagged = Row("a:1", {"tokens": ["a"], "label": ["O"]})
    with pytest.raises(RecipeError, match=r"back-translation .*tags"):
        Augmenter.of([_step(translators)], 0, registry.get("task", "token-classification")().columns).row(tagged, 0, 0)
