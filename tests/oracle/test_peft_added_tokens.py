"""Added tokens against PEFT: over the resized base it gives the same logits and gradients."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.deploy import artifact as artefact
from tunesmith.models import added_tokens, load, sources
from tunesmith.techniques.ia3 import Ia3
from tunesmith.techniques.lora import Lora
from tunesmith.testing import tiny_model, tiny_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of third parties at import
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's

CAUSAL, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
MODELS = (
    ("llama", CAUSAL, {"tie_word_embeddings": True}),
    ("llama", CAUSAL, {"tie_word_embeddings": False}),
    ("gpt2", CAUSAL, {}),
    ("gemma", CAUSAL, {"tie_word_embeddings": True}),
    ("llama", CAUSAL, {"tie_word_embeddings": True, "vocab_size": 80}),
    ("t5", SEQ2SEQ, {"tie_word_embeddings": True}),
    ("bart", SEQ2SEQ, {}),
)
TOKENS = ("greatly", "<mark>")


def _logits(model: Any, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits  # type: ignore[no-any-return]


def _trained(folder: Path, family: str, kind: str, config: dict[str, Any], technique: Any) -> tuple[Any, Any, Any, Any]:
    """Return a model on disk, and one with added tokens and a random adapter."""
    tokenizer = tiny_tokenizer()
    config = {"vocab_size": len(tokenizer), **config}
    tiny_model(family, kind, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = sources.resolve(str(folder))
    processor = load.load_processor(source, None, TOKENS)
    ids = added_tokens.ids(processor, TOKENS)
    model, anatomy = load.load_model(source, model_class=kind, config={}, seed=0, added=ids)
    technique.apply(model, anatomy, processor)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval(), anatomy, source, processor


def _over_peft(folder: Path, kind: str, processor: Any) -> Any:
    base = getattr(transformers, kind).from_pretrained(folder / "model")
    if len(processor) > base.config.vocab_size:
        base.resize_token_embeddings(len(processor), mean_resizing=False)
    return peft.PeftModel.from_pretrained(base, folder / "run" / "adapter", is_trainable=True).eval()


@pytest.mark.parametrize(("family", "kind", "config"), MODELS)
def test_peft_reads_the_rows_of_added_tokens(family: str, kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    technique = Lora()
    model, anatomy, source, processor = _trained(tmp_path / "model", family, kind, config, technique)
    artefact.write_adapter(tmp_path / "run", model, anatomy, technique, source, processor)
    theirs, model = _over_peft(tmp_path, kind, processor).double(), model.double()  # processors round fp32 differently
    ids = torch.tensor([[5, len(processor) - 2, 7, len(processor) - 1, 9]])
    torch.testing.assert_close(_logits(theirs, ids), _logits(model, ids), atol=1e-5, rtol=1e-5)
    for one in (model, theirs):
        _logits(one, ids)[..., -3:].log_softmax(-1)[..., 0].sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if "trainable_tokens_delta" in name}
    mine = [model.get_parameter(name).grad for name in sorted(anatomy.added, reverse=True)]
    assert len(gradients) == len(mine) == (2 if config.get("tie_word_embeddings") is False else 1)
    for ours, reference in zip(mine, gradients.values(), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    held = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert max(len(value) for name, value in held.items() if "embed" in name or "token" in name) == 2, "new rows alone"


@pytest.mark.parametrize("family", ("llama", "phi"))
def test_what_peft_has_no_place_for_is_ours_to_load(family: str, tmp_path: Path) -> None:
    technique = Ia3() if family == "llama" else Lora()  # PEFT forgets the bias of phi's output
    model, anatomy, source, processor = _trained(tmp_path / "model", family, CAUSAL, {}, technique)
    artefact.write_adapter(tmp_path / "run", model, anatomy, technique, source, processor)
    about = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert about["peft_type"] == ("TUNESMITH_IA3" if family == "llama" else "TUNESMITH_LORA")
    ids = added_tokens.ids(processor, TOKENS)
    again, map_ = load.load_model(source, model_class=CAUSAL, config={}, seed=0, added=ids)
    technique.apply(again, map_, processor)
    held = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    technique.load_adapter(again, artefact.own_names(held))
    asked = torch.tensor([[5, *ids, 9]])
    torch.testing.assert_close(_logits(again.eval(), asked), _logits(model, asked), atol=1e-5, rtol=1e-5)
