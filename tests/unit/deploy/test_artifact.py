"""Artifacts on disk: trained weights, unchanged base weights, and the dtype of the base."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import tunesmith
from tunesmith.deploy import artifact as artefact
from tunesmith.models import load as models
from tunesmith.models import sources
from tunesmith.testing import case, tiny_model, tiny_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of third parties at import
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's

TECHNIQUES = ("full", {"name": "freeze", "last_n_blocks": 1}, "lora")
TOKENS = torch.tensor([[2, 5, 9, 7, 3], [2, 11, 3, 0, 0]])


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _stored(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - it has no iterator


def _answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, attention_mask=(TOKENS != 0).long()).logits


def test_what_is_put_is_what_was_learned(tmp_path: Path) -> None:
    trial = case({"name": "lora", "init": "pissa", "r": 2}, "text-classification", "bert", tmp_path)
    names = [name for name, parameter in trial.model.named_parameters() if parameter.requires_grad]
    names += [name for name, _ in trial.model.named_buffers() if "pissa" in name]
    kept = {name: value.clone() for name, value in artefact.trained_tensors(trial.model, names).items()}
    assert set(kept) == set(names) and any("pissa" in name for name in names)
    trial.train(trial.engine(), 0, 3)
    changed = artefact.trained_tensors(trial.model, names)
    assert not all(torch.equal(changed[name], kept[name]) for name in names)
    artefact.load_trained(trial.model, kept)
    assert all(torch.equal(value, kept[name]) for name, value in artefact.trained_tensors(trial.model, names).items())


def test_an_adapter_and_what_its_base_must_be_dressed_in(finish: Any, tiny_bert: Path, tmp_path: Path) -> None:
    finish("technique=lora")
    adapter, base = tmp_path / "run" / "adapter", tmp_path / "run" / "base"
    assert _names(adapter) == {"adapter_config.json", "adapter_model.safetensors", "tunesmith.json"}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= _names(base)
    assert not list(base.glob("*.safetensors"))
    config = json.loads((base / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"} and config["model_type"] == "bert"
    assert config["problem_type"] == "single_label_classification"
    about = json.loads((adapter / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(tiny_bert)
    assert about["modules_to_save"] == ["classifier", "bert.pooler.dense"]
    source = sources.resolve(str(tiny_bert))
    tokenizer = {"tokenizer": models.tokenizer_hash(models.load_processor(source)), "chat template": None}
    assert json.loads((adapter / "tunesmith.json").read_text()) == {
        "base_sha256": models.base_hash(source),
        "base": {"weights": {"model.safetensors": source.sha256()["model.safetensors"]}, **tokenizer},
        "dress": tokenizer,
        "quantization": {},
    }


def test_a_model_folder_stands_alone(finish: Any, tmp_path: Path) -> None:
    finish("technique=full")
    model = tmp_path / "run" / "model"
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= _names(model)
    config = AutoConfig.from_pretrained(model)
    assert config.id2label == {0: "negative", 1: "positive"} and config.architectures == [
        "BertForSequenceClassification"
    ]


def test_what_was_frozen_is_bit_for_bit_that_of_the_base(finish: Any, tiny_bert: Path, tmp_path: Path) -> None:
    finish(
        technique={"name": "freeze", "last_n_blocks": 1}, train={"max_steps": 2, "precision": "bf16", "device": "cpu"}
    )
    before, after = (
        load_file(tiny_bert / "model.safetensors"),
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
    )
    shared = before.keys() & after.keys()
    same = {name for name in shared if torch.equal(before[name], after[name])}
    assert same == {name for name in shared if "layer.2." not in name}
    assert any("layer.2." in name for name in shared)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=("full", "freeze", "lora"))
def test_final_scores_are_those_of_the_folder_on_disk(technique: Any, finish: Any, tmp_path: Path) -> None:
    result = finish(technique=technique)
    for split in ("validation", "test"):
        again = tunesmith.evaluate(tmp_path / "run", split=split)
        assert again["metrics"] == result["metrics"][split] and again["examples"] == (
            12 if split == "validation" else 15
        )


@pytest.mark.parametrize("has_bf16", (True, False))
@pytest.mark.parametrize(("technique", "precision"), (("full", "fp32"), ("freeze", "bf16"), ("lora", "bf16")))
def test_a_base_in_bf16_leaves_bf16_whose_scores_are_the_reported_ones(
    technique: Any, precision: str, has_bf16: bool, finish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    tiny_model("bert", "AutoModelForMaskedLM").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    train = {"epochs": 1, "batch_size": 8, "precision": precision, "device": "cpu"}
    result = finish(technique=technique, model=str(tmp_path / "base"), train=train)
    run = tmp_path / "run"
    tuned = tunesmith.load(run)
    backbone = {parameter.dtype for name, parameter in tuned.model.named_parameters() if "lora" not in name}
    assert backbone == {torch.bfloat16 if has_bf16 else torch.float32}, "a processor without bf16 answers in fp32"
    assert tunesmith.evaluate(run)["metrics"] == result["metrics"]["test"]
    if technique == "lora":
        assert _stored(run / "adapter" / "adapter_model.safetensors") == {"F32"}, "what was learned is not rounded"
        assert json.loads((run / "base" / "config.json").read_text())["dtype"] == "bfloat16"
    else:
        assert _stored(run / "model" / "model.safetensors") == {"BF16"}
        plain = AutoModelForSequenceClassification.from_pretrained(run / "model")
        assert plain.dtype == torch.bfloat16
        assert torch.equal(_answers(plain.to(tuned.model.dtype)), _answers(tuned.model))


def test_pissa_leaves_a_lora_of_twice_the_rank_over_the_untouched_base(
    finish: Any, tiny_bert: Path, tmp_path: Path
) -> None:
    finish(technique={"name": "lora", "r": 4, "init": "pissa", "rslora": True})
    run = tmp_path / "run"
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == 8
    ranks = {
        value.shape[0]
        for name, value in load_file(run / "adapter" / "adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert ranks == {8}
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, config=AutoConfig.from_pretrained(run / "base")
    )
    untouched = _answers(base)
    theirs = peft.PeftModel.from_pretrained(base, run / "adapter")
    ours = _answers(tunesmith.load(run).model)
    torch.testing.assert_close(_answers(theirs), ours, atol=1e-5, rtol=1e-5)
    assert (ours - untouched).abs().max() > 1e-2


def test_a_folder_that_cannot_be_written_whole_is_not_there(tmp_path: Path, tiny_bert: Path) -> None:
    trial = case("lora", "text-classification", "bert", tmp_path)
    source = sources.resolve(str(tiny_bert))

    class Unwritable:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "half.json").write_text("{")
            raise OSError(28, "No space left on device")

    given = (trial.anatomy, trial.technique, source)
    with pytest.raises(OSError, match="No space"):
        artefact.write_adapter(tmp_path / "run", trial.model, *given, Unwritable())
    assert list((tmp_path / "run").iterdir()) == []
    artefact.write_adapter(tmp_path / "run", trial.model, *given, tiny_tokenizer())
    with pytest.raises(OSError, match="No space"):
        artefact.write_adapter(tmp_path / "run", trial.model, *given, Unwritable())
    assert _names(tmp_path / "run") == {"adapter", "base"}, "the one before is still there"
