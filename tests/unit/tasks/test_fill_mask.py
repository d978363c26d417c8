"""Masked language modeling: masking, metrics, a base without a head, and the artifacts of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

import tunesmith
from tunesmith.console import Console
from tunesmith.data.batches import Batch, collate
from tunesmith.errors import DataError, RecipeError
from tunesmith.models import load as models
from tunesmith.models import sources
from tunesmith.recipe import Data
from tunesmith.run import train as run
from tunesmith.tasks.fill_mask import FillMask
from tunesmith.testing import Case, case, sample_row, tiny_model, tiny_tokenizer
from tunesmith.training import evaluate
from tunesmith.training.machine import Machine

CPU = Machine(torch.device("cpu"), None)
QUIET = Console(level=-1)


@pytest.fixture
def trial(tmp_path: Path) -> Case:
    return case("full", "fill-mask", "bert", tmp_path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(str(sample_row("fill-mask", number)["text"]))
    return folder


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("headless")
    tiny_model("bert", "AutoModel").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _recipe(recipe_of: Any, texts: Path, *words: str, **values: Any) -> Any:
    data = {"train": str(texts), "validation": 0.2, "max_length": 16}
    return recipe_of(*words, **({"task": "fill-mask", "data": data} | values))


def _drawn(trial: Case, rows: list[int], **how: int) -> Batch:
    indices = np.array(rows)
    return trial.bound.transform(collate(trial.encoded, indices), indices, **how)


def test_the_loss_is_that_of_transformers(trial: Case) -> None:
    batch = _drawn(trial, list(range(12)))
    ids, masked = batch.ragged("input_ids"), batch.ragged("masked")
    wanted = torch.full_like(ids.padded(0), -100)
    ends = masked.offsets.tolist()
    for row, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        wanted[row, masked.values[start:stop]] = batch.ragged("label").values[start:stop]
    with torch.no_grad():
        theirs = trial.model(input_ids=ids.padded(0), attention_mask=ids.mask(), labels=wanted)
        ours = trial.bound.loss(trial.model, batch, trial.bound.normalizers(batch))
        logits = trial.bound.outputs(trial.model, batch)
    assert float(ours) == pytest.approx(float(theirs.loss), abs=1e-5)
    torch.testing.assert_close(logits, theirs.logits[wanted != -100], atol=1e-5, rtol=1e-5)
    scores = trial.bound.metrics()
    scores.update(batch, logits)
    found = scores.compute()
    assert found["loss"] == pytest.approx(float(theirs.loss), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == batch.ragged("label").values).float().mean()))


def test_a_batch_of_unequal_shares_is_one_mean(trial: Case) -> None:
    whole = _drawn(trial, list(range(8)))
    normalizers = trial.bound.normalizers(whole)
    batches = [whole, *(_drawn(trial, rows) for rows in ([0], [1, 2, 3], [4, 5, 6, 7]))]
    with torch.no_grad():
        expected, *parts = [float(trial.bound.loss(trial.model, batch, normalizers)) for batch in batches]
    assert sum(parts) == pytest.approx(expected, abs=1e-5)


def test_each_epoch_hides_anew_and_scoring_the_same(trial: Case) -> None:
    def places(**how: int) -> list[int]:
        return _drawn(trial, [3, 4, 5], **how).ragged("masked").values.tolist()

    assert places(seed=1, epoch=0) == places(seed=1, epoch=0) != places(seed=1, epoch=1)
    assert places() == places(seed=0, epoch=0)
    alone = _drawn(trial, [4], seed=1, epoch=2).ragged("input_ids").values
    beside = _drawn(trial, [3, 4, 5], seed=1, epoch=2).ragged("input_ids")
    assert torch.equal(alone, beside.values[beside.offsets[1] : beside.offsets[2]])


def test_the_baseline_knows_frequencies_alone(trial: Case) -> None:
    found = evaluate.baseline(trial.bound, trial.encoded, trial.encoded)
    batch = _drawn(trial, list(range(len(trial.encoded))))
    labels = batch.ragged("label").values
    guesses = trial.bound.baseline(trial.encoded)(batch)
    prior = guesses[0]
    assert torch.equal(guesses, prior.expand(len(labels), -1))
    assert prior.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert found["loss"] == pytest.approx(float(F.nll_loss(prior.expand(len(labels), -1), labels)), abs=1e-5)
    assert found["accuracy"] == pytest.approx(float((labels == prior.argmax()).float().mean()))


def test_a_baseline_is_scored_in_bounded_memory(trial: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate.baseline(trial.bound, trial.encoded, trial.encoded)
    monkeypatch.setattr(evaluate, "MAX_NUMBERS", 400)
    assert evaluate.baseline(trial.bound, trial.encoded, trial.encoded) == pytest.approx(expected)
    assert evaluate.random_scores(trial.bound, trial.encoded, trial.encoded).keys() == expected.keys()


REFUSED = {
    "class weights": ({"data": {"class_weights": "balanced"}}, r"data\.class_weights: .*fill-mask"),
    "no segmenter": (
        {"task": {"name": "fill-mask", "segmenter": "jieba"}},
        r"^task\.segmenter: .*pip install 'tunesmith\[chinese\]'",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_meaning_is_refused(why: str, recipe_of: Any, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jieba", None)
    values, said = REFUSED[why]
    values = values | {"data": {"train": str(texts), **values.get("data", {})}}
    with pytest.raises(RecipeError, match=said):
        tunesmith.train(_recipe(recipe_of, texts, **values), console=QUIET)


def test_a_model_or_tokenizer_that_fills_no_masks_is_refused(recipe_of: Any, texts: Path, tmp_path: Path) -> None:
    tiny_model("gpt2", "AutoModelForCausalLM").save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(RecipeError, match="gpt2 .*MaskedLM"):
        tunesmith.train(_recipe(recipe_of, texts, model=str(tmp_path / "gpt2")), console=QUIET)
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(RecipeError, match="^model: .*mask"):
        FillMask().bind(tokenizer, tiny_model("bert", "AutoModelForMaskedLM").config, Data(max_length=16))


@pytest.fixture(scope="module")
def finished(texts: Path, headless: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run over a base without a head, with separate text for evaluation, and its output."""
    work = tmp_path_factory.mktemp("finished")
    general = work / "general.jsonl"
    rows = [{"sentence": sample_row("text-classification", n)["text"], "n": n} for n in range(30)]
    general.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(work / "home"))
        result = tunesmith.train(
            task={"name": "fill-mask", "head_warmup": 0.25, "general": str(general)},
            model=str(headless), technique="full", output=str(work / "run"),
            data={"train": str(texts), "validation": 0.2, "test": 0.1, "max_length": 16},
            train={"max_steps": 20, "batch_size": 8, "learning_rate": 3e-3, "head_learning_rate": 1e-2,
                   "precision": "fp32", "device": "cpu", "save_every": 5},
            console=QUIET,
        )  # fmt: skip
    return work / "run", result


def test_what_was_learned_and_forgotten_is_said(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    metrics = result["metrics"]
    assert set(metrics) == {"before", "general", "validation", "test", "baseline"}
    assert metrics["validation"]["loss"] < metrics["before"]["validation"]["loss"]
    assert set(metrics["before"]) == {"general", "validation"}
    head = "| | general before | general | validation before | validation | test | token-frequency baseline"
    assert head in (folder / "README.md").read_text()
    assert 'print(model.predict(["... [MASK] ..."]))' in (folder / "README.md").read_text()
    assert "<th>general before</th><th>general</th>" in (folder / "report.html").read_text()
    assert not (folder / "predictions-test.jsonl").exists(), "an example is no row"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (before,) = [line for line in lines if "before/general/loss" in line]
    assert before["step"] == 5 and before["before/general/loss"] == metrics["before"]["general"]["loss"]


def test_the_head_alone_learns_first(recipe_of: Any, texts: Path, headless: Path) -> None:
    recipe = _recipe(
        recipe_of, texts, "train.max_steps=10", "train.epochs=null", "task.head_warmup=0.3", model=str(headless)
    )
    prepared = run.prepare(recipe, CPU, offline=True, allow_pickle=False, console=QUIET)
    new = prepared.anatomy.new
    assert new and all(name.startswith("cls.") for name in new) and prepared.head_warmup_steps == 3
    for step, alone in ((0, True), (2, True), (3, False), (9, False)):
        prepared.update_trainable(step)
        learns = {name for name, parameter in prepared.model.named_parameters() if parameter.requires_grad}
        assert learns == (new if alone else set(prepared.learned)), step


def test_what_is_left_loads_without_us_and_keeps_the_pooler(
    finished: tuple[Path, dict[str, Any]], headless: Path
) -> None:
    folder, result = finished
    plain = AutoModelForMaskedLM.from_pretrained(folder / "model")
    decoder, embeddings = plain.get_output_embeddings().weight, plain.get_input_embeddings().weight
    assert decoder is embeddings, "tied"
    tuned = tunesmith.load(folder)
    text = "the film was [MASK] . very [MASK] acting"
    ids = tiny_tokenizer()(text, return_tensors="pt")
    with torch.no_grad():
        logits = plain.eval()(**ids).logits[ids["input_ids"] == tiny_tokenizer().mask_token_id]
    (answer,) = tuned.predict([text])
    assert len(answer["masks"]) == 2 and all(len(mask) == 5 for mask in answer["masks"])
    for mask, row in zip(answer["masks"], logits.softmax(-1), strict=True):
        best = row.topk(5)
        assert [one["token"] for one in mask] == tiny_tokenizer().convert_ids_to_tokens(best.indices.tolist())
        assert [one["score"] for one in mask] == pytest.approx(best.values.tolist(), abs=1e-5)
    kept = load_file(folder / "model" / "model.safetensors")
    assert torch.equal(
        kept["bert.pooler.dense.weight"], load_file(headless / "model.safetensors")["pooler.dense.weight"]
    )


def test_a_text_without_a_mask_is_no_question(finished: tuple[Path, dict[str, Any]]) -> None:
    tuned = tunesmith.load(finished[0])
    with pytest.raises(DataError, match=r"^input 1: text: no \[MASK\]; "):
        tuned.predict(["the film was great"])
    with pytest.raises(DataError, match=r"^input 1: text: no \[MASK\] .*\b16 tokens; "):
        tuned.predict(["the film " * 20 + "[MASK]"])


def test_the_untouched_base_is_scored_as_it_came(
    recipe_of: Any, texts: Path, tiny_bert: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    result = tunesmith.train(_recipe(recipe_of, texts, "train.max_steps=6", "train.epochs=null"), console=QUIET)
    scored = tunesmith.evaluate(result["run"], split="validation", base=True)
    assert scored["probe"] is False and scored["notes"] == []
    assert scored["metrics"]["loss"] == pytest.approx(result["metrics"]["before"]["validation"]["loss"], abs=1e-5)
    assert scored["run_metrics"]["loss"] == pytest.approx(result["metrics"]["validation"]["loss"], abs=1e-5)
    new = tunesmith.evaluate(finished[0], split="general", base=True)
    assert len(new["notes"]) == 1 and "head" in new["notes"][0] and new["run_metrics"]["loss"] < new["metrics"]["loss"]


@pytest.mark.parametrize("technique", ("full", "lora"))
def test_a_run_is_the_base_of_one_with_another_head(
    technique: str, recipe_of: Any, texts: Path, headless: Path, reviews_csv: Path, tmp_path: Path, capsys: Any
) -> None:
    first = _recipe(recipe_of, texts, model=str(headless), technique=technique, output=str(tmp_path / "first"))
    tunesmith.train(first, console=QUIET)
    second = recipe_of(model=str(tmp_path / "first"), output=str(tmp_path / "second"))
    tunesmith.train(second, "train.max_steps=1", "train.epochs=null", console=Console())
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("new head")]
    assert "(classifier)" in line and line.count("cls.predictions") == 3, "with what is unused of the checkpoint"
    about = json.loads((tmp_path / "second" / "run.json").read_text())["model"]
    assert about["kind"] == "run"
    (earlier,) = about["lineage"]
    assert (earlier["task"], earlier["technique"]) == ("fill-mask", technique)
    assert earlier["model"]["sha256"] == sources.resolve(str(headless)).sha256()
    source = sources.resolve(str(tmp_path / "first"))
    model, anatomy = models.load_model(
        source, model_class="AutoModelForSequenceClassification", config={"num_labels": 2}, seed=0
    )
    assert anatomy.new == {"classifier.weight", "classifier.bias"}, "the pooler came along"


@pytest.mark.parametrize("technique", ("full", {"name": "lora", "r": 4, "dropout": 0.1}), ids=("full", "lora"))
def test_stopped_and_resumed_is_undisturbed(
    technique: Any, recipe_of: Any, texts: Path, headless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train.max_steps=12", "train.epochs=null", "train.save_every=2", "task.head_warmup=0.3")
    given = {"model": str(headless), "technique": technique}
    whole = tunesmith.train(_recipe(recipe_of, texts, *words, **given, output=str(tmp_path / "whole")), console=QUIET)
    stop_at, save = iter((3, 5)), run._save

    def killed(now: Any) -> None:
        save(now)
        if now.state.step >= killed.at:
            killed.at = next(stop_at, 99)
            raise KeyboardInterrupt

    killed.at = next(stop_at)
    monkeypatch.setattr(run, "_save", killed)
    recipe = _recipe(recipe_of, texts, *words, **given, output=str(tmp_path / "parts"))
    for attempt in range(3):
        try:
            parts = tunesmith.train(recipe, resume=tmp_path / "parts" if attempt else None, console=QUIET)
        except KeyboardInterrupt:
            continue
    assert parts["metrics"] == whole["metrics"]
    kind = "model/model.safetensors" if technique == "full" else "adapter/adapter_model.safetensors"
    assert (tmp_path / "parts" / kind).read_bytes() == (tmp_path / "whole" / kind).read_bytes()
    lines = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("parts", "whole")
    ]
    assert lines[0] == lines[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
def test_adapters_over_a_new_head_load_in_peft(recipe_of: Any, texts: Path, headless: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    given = {"model": str(headless), "technique": {"name": "lora", "r": 4}, "output": str(tmp_path / "run")}
    tunesmith.train(_recipe(recipe_of, texts, **given), console=QUIET)
    base = AutoModelForMaskedLM.from_pretrained(headless)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    ids = tiny_tokenizer()("the film was [MASK] . very [MASK] acting", return_tensors="pt")
    ours = tunesmith.load(tmp_path / "run").model
    with torch.no_grad():
        torch.testing.assert_close(theirs(**ids).logits, ours(**ids).logits, atol=1e-5, rtol=1e-5)
