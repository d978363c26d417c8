"""Predictions of a run equal those it was scored with; a run that cannot be loaded is refused with a fix."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith
from tunesmith.console import Console
from tunesmith.data.formats import Row
from tunesmith.errors import CheckpointError, DataError, RecipeError, UserError
from tunesmith.testing import tiny_tokenizer

TEXTS = ("the film was great", "bad", "a very very dull plot . not so very fine , it was", "lovely")


def _same(answers: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Return whether answers are equal up to rounding, which depends on the batch shape."""
    return len(answers) == len(others) and all(
        one["label"] == other["label"] and one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
        for one, other in zip(answers, others, strict=True)
    )


@pytest.mark.parametrize("technique", ("full", "freeze", "lora"))
def test_the_answers_of_the_test_split_come_again(technique: str, finish: Any, tmp_path: Path) -> None:
    finish(f"technique={technique}")
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions-test.jsonl").read_text().splitlines()]
    assert len(lines) == 15 and list(lines[0]) == ["row", "text", "label", "prediction"]
    again = tunesmith.load(tmp_path / "run").predict([line["text"] for line in lines])
    assert _same(again, [line["prediction"] for line in lines])
    for line in lines:
        file, _, number = line["row"].rpartition(":")
        assert f"{line['text']},{line['label']}" == Path(file).read_text().splitlines()[int(number) - 1]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, reviews_csv: Path) -> Any:
    """A loaded run."""
    folder = tmp_path_factory.mktemp("predict")
    given = {
        "task": "text-classification",
        "model": str(tiny_bert),
        "data": {"train": str(reviews_csv)},
        "technique": "full",
        "train": {"max_steps": 4, "batch_size": 8, "precision": "fp32", "device": "cpu"},
        "output": str(folder / "run"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(folder / "home"))
        tunesmith.train(given, console=Console(level=-1))
    return tunesmith.load(folder / "run")


def test_answers_stand_in_the_order_of_the_questions(tuned: Any) -> None:
    together = tuned.predict(TEXTS)
    assert _same(together, [tuned.predict([text])[0] for text in TEXTS])
    assert len({round(answer["score"], 6) for answer in together}) == len(TEXTS), "they can be told apart"


def test_what_can_be_asked(tuned: Any) -> None:
    plain = tuned.predict([TEXTS[0]])
    for asked in (TEXTS[0], {"text": TEXTS[0]}, [{"text": TEXTS[0], "label": "no such label"}], iter([TEXTS[0]])):
        assert tuned.predict(asked) == plain
    pair = tuned.predict([{"text": TEXTS[0], "text_pair": TEXTS[1]}, TEXTS[0]])
    assert not _same(pair[:1], plain) and _same(pair[1:], plain)
    assert tuned.predict([]) == []


def test_answers_write_nothing_to_disk(tuned: Any, home: Path, no_writes: Any) -> None:
    with no_writes(home):
        answers = tuned.predict(TEXTS)
        assert tuned.predict_rows([Row(f"input {n}", {"text": text}) for n, text in enumerate(TEXTS)]) == answers
    with pytest.raises(AssertionError), no_writes(home):
        tempfile.mkdtemp()


@pytest.mark.parametrize("asked", (7, None, {"review": "a"}, {"text": 7}, ["a"]))
def test_what_is_no_text_is_refused_by_its_number(asked: Any, tuned: Any) -> None:
    with pytest.raises(UserError, match="input 2: no text; .*'text'") as caught:
        tuned.predict(["a film", asked])
    assert caught.value.exit_code == 2


def test_a_text_of_which_nothing_is_left_is_refused_by_its_number(tuned: Any) -> None:
    with pytest.raises(DataError, match="input 2: text: .*no tokens"):
        tuned.predict(["a film", " "])


def test_the_command_line_answers_as_the_api(finish: Any, command: Any, tmp_path: Path) -> None:
    finish("technique=lora")
    run = str(tmp_path / "run")
    wanted = tunesmith.predict(run, TEXTS)
    code, out, _ = command("predict", run, *TEXTS)
    assert code == 0
    assert out.splitlines() == [
        f"{answer['label']}  {answer['score']:.3f}  {text}" for answer, text in zip(wanted, TEXTS, strict=True)
    ]
    (tmp_path / "asked.txt").write_text("\n".join(TEXTS))
    code, out, err = command(
        "predict", run, "--input", str(tmp_path / "asked.txt"), "--output", str(tmp_path / "answers.jsonl"), "--json"
    )
    assert code == 0 and json.loads(out)["answers"] == 4 and "wrote 4 " in err
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line.pop("text") for line in lines] == list(TEXTS) and _same(lines, wanted)


def _cut_short(run: Path) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def _lose_a_tensor(run: Path) -> None:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "classifier" in name))
    save_file(tensors, run / "adapter" / "adapter_model.safetensors")


def _forget_the_origin(run: Path) -> None:
    (run / "adapter" / "tunesmith.json").unlink()


def _an_old_origin(run: Path) -> None:
    (run / "adapter" / "tunesmith.json").write_text('{"base_sha256": "0"}')


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (
        _cut_short,
        "adapter_model.safetensors: cannot be read .*; write it again with `tunesmith train --resume .*`",
    ),
    "a tensor lost": (_lose_a_tensor, "the adapter lacks 1 of "),
    "origin of old": (_an_old_origin, "tunesmith.json: cannot be read .it has no fingerprint .*; write it again"),
    "origin lost": (_forget_the_origin, "tunesmith.json: cannot be read .No such file or directory.; "),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_adapter_is_refused(
    damage: Callable[[Path], None], said: str, finish: Any, command: Any, tmp_path: Path
) -> None:
    finish("technique=lora")
    damage(tmp_path / "run")
    with pytest.raises(CheckpointError, match=said):
        tunesmith.load(tmp_path / "run")
    assert command("predict", str(tmp_path / "run"), "a film")[0] == 6
    if "anew" in said:
        tunesmith.train(resume=tmp_path / "run", console=Console(level=-1))
        assert tunesmith.predict(tmp_path / "run", ["a film"])


def test_an_adapter_on_other_weights_is_refused(finish: Any, tiny_bert: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_bert, tmp_path / "base")
    finish("technique=lora", model=str(base))
    weights = load_file(base / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"other weights .*model.safetensors differs \(sha256 .*, was .*\); .*base",
    ):
        tunesmith.load(tmp_path / "run")


def _other_words(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"great"', '"grand"'))


def _another_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


OTHER: dict[str, tuple[Callable[[Path], None], str]] = {
    "tokenizer": (_other_words, r"the tokenizer differs \(sha256 \w{12}, was \w{12}\)"),
    "template": (_another_template, r"the chat template differs \(sha256 \w{12}, was none\)"),
}


@pytest.mark.parametrize(("change", "said"), OTHER.values(), ids=OTHER)
def test_an_adapter_over_another_tokenizer_or_template_is_refused(
    change: Callable[[Path], None], said: str, finish: Any, command: Any, tiny_bert: Path, tmp_path: Path
) -> None:
    base, run = shutil.copytree(tiny_bert, tmp_path / "base"), tmp_path / "run"
    finish("technique=lora", model=str(base))
    moved = shutil.copytree(base, tmp_path / "moved")
    assert tunesmith.load(run, base=moved)
    change(moved)
    with pytest.raises(CheckpointError, match=f"moved has changed since training: {said}; .*base"):
        tunesmith.load(run, base=moved)
    change(run / "base")
    with pytest.raises(CheckpointError, match=f"run/base: .*changed since training: {said}"):
        tunesmith.load(run)
    assert command("predict", str(run), "a film")[0] == 6


def test_what_is_no_finished_run_is_refused(recipe_of: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a run folder"):
        tunesmith.load(tmp_path)
    tunesmith.train(recipe_of(), console=Console(level=-1))
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(RecipeError, match="run is not finished; .*`tunesmith train --resume .*run`"):
        tunesmith.load(tmp_path / "run")


def test_a_base_of_pickled_weights_is_read_where_that_is_allowed(
    finish: Any, command: Any, recipe_of: Any, tiny_bert: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_bert, tmp_path / "base")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    recipe = recipe_of("technique=lora", "data.test=0.25", model=str(base))
    result = tunesmith.train(recipe, allow_pickle=True, console=Console(level=-1))
    run = str(tmp_path / "run")
    code, out, err = command("predict", run, "a film")
    assert code == 2 and out == "" and "--allow-pickle" in err
    assert command("predict", run, "a film", "--allow-pickle")[0] == 0
    assert tunesmith.evaluate(run, allow_pickle=True)["metrics"] == result["metrics"]["test"]
    code, out, _ = command("evaluate", run, "--allow-pickle", "--base", "--json")
    assert code == 0 and json.loads(out)["base"] is True


def test_windows_answer_long_texts_as_they_were_trained(finish: Any, tmp_path: Path) -> None:
    finish("data.max_length=8", task={"name": "text-classification", "windows": 4})
    tuned = tunesmith.load(tmp_path / "run")
    first, second = "the film was great and lovely", "bad plot dull story awful acting"
    apart = [tuned.predict([text])[0]["probabilities"] for text in (first, second)]
    assert len(tiny_tokenizer()(first)["input_ids"]) == 8, "each fills a window"
    logits = torch.tensor([list(one.values()) for one in apart]).log()
    mean = logits.log_softmax(1).mean(0).softmax(0)
    answer = tuned.predict([f"{first} {second}"])[0]
    assert list(answer["probabilities"].values()) == pytest.approx(mean.tolist(), abs=1e-5)
