"""Translation: loss and generation equal transformers' in both directions, and the artifacts of a run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sacrebleu.metrics.bleu import BLEU
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import tunesmith
from tunesmith import recipe as recipes
from tunesmith.console import Console
from tunesmith.data.batches import Batch, collate
from tunesmith.data.encoded import encode
from tunesmith.data.formats import Row
from tunesmith.errors import DataError, RecipeError
from tunesmith.models import load as models
from tunesmith.models import sources
from tunesmith.recipe import Data
from tunesmith.studies import score
from tunesmith.tasks import BoundTask
from tunesmith.tasks._translators import translation_metrics
from tunesmith.tasks.translation import Translation
from tunesmith.techniques.full import Full
from tunesmith.testing import Case, case, sample_row, tiny_model, tiny_tokenizer
from tunesmith.training import evaluate
from tunesmith.training.machine import Machine

CPU = Machine(torch.device("cpu"), None)
QUIET = Console(level=-1)
SEQ2SEQ = ("t5", "bart", "marian")


def _batch(trial: Case, rows: list[int]) -> Batch:
    return collate(trial.encoded, np.array(rows))


def _generate(bound: BoundTask, model: Any, batch: Batch) -> list[str]:
    assert bound.generator is not None
    return bound.generator.generate(model, batch)


def _labels(batch: Batch) -> torch.Tensor:
    return batch.ragged("label").padded(-100)


@pytest.mark.parametrize("family", [*SEQ2SEQ, "mbart", "m2m_100"])
def test_the_loss_is_that_of_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.testing import FAMILIES

    monkeypatch.setitem(FAMILIES, family, FAMILIES.get(family, FAMILIES["marian"]))
    trial = case("full", "translation", family, tmp_path)
    batch = _batch(trial, list(range(12)))
    ids = batch.ragged("input_ids")
    with torch.no_grad():
        theirs = trial.base(input_ids=ids.padded(0), attention_mask=ids.mask(), labels=_labels(batch))
        ours = trial.bound.loss(trial.base, batch, trial.bound.normalizers(batch))
        found = trial.bound.outputs(trial.base, batch)
    assert float(ours) == pytest.approx(float(theirs.loss), abs=1e-5)
    wanted = theirs.logits.log_softmax(-1)[_labels(batch) != -100]
    own = wanted.gather(1, batch.ragged("label").values[:, None])[:, 0]
    torch.testing.assert_close(found, torch.stack([own, wanted.amax(1)], 1), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        smoothed = replace(trial.bound, label_smoothing=0.1).loss(trial.base, batch, trial.bound.normalizers(batch))
    expected = torch.nn.functional.cross_entropy(
        theirs.logits.flatten(0, 1), _labels(batch).flatten(), label_smoothing=0.1
    )
    assert float(smoothed) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_what_is_written_is_what_transformers_generates_for_each_alone(
    family: str, num_beams: int, tmp_path: Path
) -> None:
    task = {"name": "translation", "num_beams": num_beams, "max_new_tokens": 9, "prefix": "", **Translation.sample_keys}
    trial = case("full", task, family, tmp_path)
    trial.train(trial.engine(), 0, 60, total=60)  # a random model generates no words
    trial.model.eval()
    batch, tokenizer = _batch(trial, [3, 14, 5, 9]), tiny_tokenizer()
    with torch.no_grad():
        texts = _generate(trial.bound, trial.model, batch)
        for text, ids in zip(
            texts, batch.ragged("input_ids").values.split(batch.ragged("input_ids").lengths.tolist()), strict=True
        ):
            alone: Any = trial.model
            made = alone.generate(
                ids[None], num_beams=num_beams, max_new_tokens=9, do_sample=False, forced_bos_token_id=2
            )
            assert text == tokenizer.decode(made[0][1:], skip_special_tokens=True).strip()
    assert len(set(texts)) > 1


def test_fields_have_both_sides_the_end_and_the_reference_as_written(tmp_path: Path) -> None:
    rows = [
        Row("a:1", {"source": "  the film was great ", "target": "great Zoë, the film"}),
        Row("a:2", {"source": "a film " * 20, "target": "bad plot " * 20}),
        Row("a:3", {"source": "the plot", "target": "the plot"}),
    ]
    tokenizer, model = tiny_tokenizer(), tiny_model("t5", "AutoModelForSeq2SeqLM")
    task = Translation(source_lang="en", target_lang="de", prefix="so ")
    bound = task.bind(tokenizer, model.config, Data(max_length=12))
    first, second, third = bound.encode(rows)
    assert tokenizer.convert_ids_to_tokens(first["input_ids"]) == [
        "[CLS]",
        "so",
        "the",
        "film",
        "was",
        "great",
        "[SEP]",
    ]
    assert (
        tokenizer.convert_ids_to_tokens(first["label"])[-1] == "[SEP]"
        and bytes(first["reference"]).decode() == "great Zoë, the film"
    )
    assert first["length"] == len(first["input_ids"]) + len(first["label"]) and first["same"] == 0 == first["cut"]
    assert len(second["input_ids"]) == 12 == len(second["label"]) and second["cut"] == 1 == second["cut_target"]
    assert second["label"][-1] == 3 == second["input_ids"][-1], "what is cut ends as all do"
    assert third["same"] == 1
    encoded = encode(rows, bound.encode, tmp_path / "encoded", bound.costs)
    assert encoded.costs.tolist() == [first["length"], 24, third["length"]]
    sources, targets, same, *_ = bound.notes(encoded)
    assert all(note.startswith("1 of 3 ") for note in (sources, targets, same))
    assert "sources" in sources and "targets" in targets and "data.max_length" in sources and "sources" in same
    asked = bound.encode([bound.as_prompt(row) for row in rows])
    assert asked[0]["input_ids"] == first["input_ids"] and "label" not in asked[0]
    source, target = bound.preview(second).windows
    assert bound.preview(second).cut and not bound.preview(first).cut and len(source) == len(target) == 12
    assert [token.target for token in source] == [None] * 12
    assert [token.target for token in target] == tokenizer.convert_ids_to_tokens(second["label"])
    found = bound.inspect(rows)
    assert found is not None and found.limit == 12 and len(found.sizes) == 3 == len(found.unknown)
    assert [(fault.kind, fault.place) for fault in found.faults] == [("target-cut", "a:2")]


def test_a_tokenizer_that_adds_no_end_gets_one() -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()  # adds nothing
    config = tiny_model("marian", "AutoModelForSeq2SeqLM").config
    bound = Translation().bind(tokenizer, config, Data(max_length=8))
    rows = [Row("a:1", {"source": "the film", "target": target}) for target in ("a plot", "a plot " * 9)]
    ends = [fields["label"] for fields in bound.encode(rows)]
    assert [ids[-1] for ids in ends] == [3, 3] and [len(ids) for ids in ends] == [3, 8]


def test_a_text_that_is_nothing_to_the_tokenizer_is_refused_by_its_side() -> None:
    config = tiny_model("bart", "AutoModelForSeq2SeqLM").config
    bound = Translation().bind(tiny_tokenizer(), config, Data(max_length=8))
    for side in ("source", "target"):
        row = Row("a:2", {"source": "a", "target": "a"} | {side: "\u200b\ufeff"})
        with pytest.raises(DataError, match=f"^a:2: {side}: "):
            bound.encode([row])


def test_a_decoder_translates_as_it_answers(tmp_path: Path) -> None:
    trial = case("full", "translation", "llama", tmp_path)
    tokenizer, batch = trial.processor, _batch(trial, [0])
    row = sample_row("translation", 0)
    ids = batch.ragged("input_ids").values
    learned = batch.ragged("learned").values
    said = tokenizer.decode(ids[learned], skip_special_tokens=True)
    assert said == row["target"] and int(ids[learned][-1]) == tokenizer.eos_token_id
    prompt = tokenizer.decode(ids[: int(batch.tensor("prompt"))])
    assert str(row["source"]) in prompt and "[UNK]" in prompt, "Translate, from and to are no words of this tokenizer"
    asked = trial.bound.encode([trial.bound.as_prompt(Row("a:1", row))])[0]
    assert asked["input_ids"] == ids[: int(batch.tensor("prompt"))].tolist()
    texts = _generate(trial.bound, trial.base, _batch(trial, [0, 7, 2]))
    assert len(texts) == 3 and all(isinstance(text, str) for text in texts)


def test_scores_are_sacrebleus_with_its_signature(tmp_path: Path) -> None:
    trial = case("full", "translation", "marian", tmp_path)
    scores, answers = evaluate.scores_and_answers(trial.base, trial.bound, trial.encoded, CPU)
    said = [answer["translation"] for answer in answers]
    meant = [str(sample_row("translation", n)["target"]) for n in range(40)]
    assert scores["bleu"] == pytest.approx(BLEU().corpus_score(said, [meant]).score)
    assert scores["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert {"loss", "perplexity", "accuracy", "chrf", "chrf_signature"} <= scores.keys()
    plain = evaluate.scores(trial.base, trial.bound, trial.encoded, CPU)
    assert "bleu" not in plain, "nothing is generated unless answers are asked for"
    assert translation_metrics(Translation(target_lang="zho_Hans")).compute()["loss"] == 0.0
    some = replace(trial.bound, task=trial.bound.task.model_copy(update={"scored_rows": 3}))
    assert (
        some.metrics().answers_needed(trial.encoded) == 3 and trial.bound.metrics().answers_needed(trial.encoded) == 40
    )


def test_chinese_is_divided_as_sacrebleu_divides_it() -> None:
    metrics = translation_metrics(Translation(source_lang="en", target_lang="zh"))
    field = torch.tensor(list("今天天气很好。".encode()))
    from tunesmith.data.batches import Ragged

    batch = Batch({"reference": Ragged(field, torch.tensor([0, len(field)]))}, 1)
    metrics.update(batch, answers=[{"translation": "今天天气很好。"}])
    assert metrics.compute()["bleu"] == pytest.approx(100.0) and "tok:zh" in metrics.compute()["bleu_signature"]


def test_the_baseline_knows_how_frequent_tokens_are(tmp_path: Path) -> None:
    trial = case("full", "translation", "t5", tmp_path)
    counts = np.bincount(trial.encoded.column("label"), minlength=trial.base.config.vocab_size) + 1.0
    prior, batch = torch.from_numpy(counts / counts.sum()).log().float(), _batch(trial, [0, 5])
    found = trial.bound.baseline(trial.encoded)(batch)
    labels = batch.ragged("label").values
    assert found.shape == (len(labels), 2)
    torch.testing.assert_close(found, torch.stack([prior[labels], prior.max().expand(len(labels))], 1))


def test_positions_that_are_computed_never_learn(tmp_path: Path) -> None:
    folder = tmp_path / "marian"
    tiny_model("marian", "AutoModelForSeq2SeqLM").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    source = sources.resolve(str(folder))
    model, anatomy = models.load_model(source, model_class="AutoModelForSeq2SeqLM", config={}, seed=0)
    Full().apply(model, anatomy, None)
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert fixed == {f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [sample_row("translation", number) for number in range(60)]
    for side, role in (("en", "source"), ("de", "target")):
        (tmp_path / f"train.{side}").write_text("".join(f"{row[role]}\n" for row in rows))
    return tmp_path / "train"


def _recipe(tiny_marian: Path, pairs: Path, output: Path, *words: str, **values: Any) -> Any:
    given: dict[str, Any] = {
        "task": {"name": "translation", "source_lang": "en", "max_new_tokens": 12},
        "model": str(tiny_marian),
        "data": {"train": str(pairs), "validation": 0.2, "test": 0.2, "max_length": 16},
        "technique": "full",
        "train": {"max_steps": 12, "batch_size": 8, "learning_rate": 3e-3, "precision": "fp32", "device": "cpu"},
        "output": str(output),
    }
    return recipes.load(None, words, given | values)


@pytest.mark.parametrize("technique", ["full", "lora", "prompt"])
def test_a_run_from_files_to_answers(technique: str, tiny_marian: Path, pairs: Path, tmp_path: Path) -> None:
    result = tunesmith.train(_recipe(tiny_marian, pairs, tmp_path / "run", f"technique={technique}"), console=QUIET)
    scores = result["metrics"]
    assert {"loss", "bleu", "chrf", "bleu_signature"} <= scores["test"].keys() and "bleu" in scores["before"][
        "validation"
    ]
    assert scores["test"]["loss"] < scores["before"]["validation"]["loss"]
    kept = recipes.load(tmp_path / "run" / "recipe.yaml").task
    assert isinstance(kept, Translation) and (kept.source_lang, kept.target_lang) == ("en", "de"), "found by the files"
    tuned = tunesmith.load(tmp_path / "run")
    answers = tuned.predict(["the film was great", {"source": "a bad plot"}])
    assert [list(answer) for answer in answers] == [["translation"]] * 2
    assert score.evaluate(tmp_path / "run")["metrics"]["bleu"] == scores["test"]["bleu"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions-test.jsonl").read_text().splitlines()]
    assert lines[0].keys() == {"row", "source", "target", "prediction"} and "translation" in lines[0]["prediction"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert (
        "pipeline_tag: translation" in card
        and "AutoModelForSeq2SeqLM" in card
        and "## Answers before and after" in card
    )


def test_transformers_alone_writes_the_same(tiny_marian: Path, pairs: Path, tmp_path: Path) -> None:
    tunesmith.train(_recipe(tiny_marian, pairs, tmp_path / "run"), console=QUIET)
    ours = tunesmith.load(tmp_path / "run").predict("the film was great")[0]["translation"]
    folder = tmp_path / "run" / "model"
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the film was great", return_tensors="pt")["input_ids"]
    made = model.generate(ids, num_beams=4, max_new_tokens=12, forced_bos_token_id=2)
    assert tokenizer.decode(made[0][1:], skip_special_tokens=True).strip() == ours


def test_the_best_epoch_may_be_chosen_by_bleu(tiny_marian: Path, pairs: Path, tmp_path: Path) -> None:
    words = ("train.metric=bleu", "train.evaluate_every=6")
    result = tunesmith.train(_recipe(tiny_marian, pairs, tmp_path / "run", *words), console=QUIET)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["validation/bleu"] for line in lines if "validation/bleu" in line}
    assert found.keys() == {6, 12} and result["best_step"] in found


def test_keys_that_mean_nothing_here_are_refused(
    tiny_marian: Path, pairs: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    with pytest.raises(RecipeError, match=r"data\.class_weights: .*translation"):
        tunesmith.train(_recipe(tiny_marian, pairs, tmp_path / "run", "data.class_weights=balanced"), console=QUIET)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(RecipeError, match=r"\bbleu\b.*; pip install 'tunesmith\[text\]'"):
        tunesmith.train(_recipe(tiny_marian, pairs, tmp_path / "run"), console=QUIET)
