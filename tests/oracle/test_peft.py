"""LoRA against PEFT: the same weights give the same logits and gradients, in both directions."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.models.anatomy import anatomy
from tunesmith.techniques import PEFT_PREFIX
from tunesmith.techniques.lora import Lora
from tunesmith.testing import tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of third parties at import
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's

CLASSIFIER, CAUSAL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
MODELS = [
    ("bert", CLASSIFIER),
    ("roberta", CLASSIFIER),
    ("distilbert", CLASSIFIER),
    ("modernbert", CLASSIFIER),
    ("gpt2", CLASSIFIER),
    ("llama", CLASSIFIER),
    ("gpt2", CAUSAL),
    ("llama", CAUSAL),
]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear", "r": 4},
    "rslora": {"rslora": True, "alpha": 12},
    "dora": {"dora": True, "target_modules": ["query", "attention_output"]},
    "pissa": {"init": "pissa", "r": 4},
    "pissa-rslora": {"init": "pissa", "r": 4, "rslora": True},
}
THEIR_OWN_STEPS = re.compile(r"\.modules_to_save\.default|(?<=vector)\.default\.weight|\.default")
TOKENS = torch.tensor([[5, 9, 7, 11, 2], [6, 8, 3, 4, 2]])


def same_base(family: str, kind: str) -> PreTrainedModel:
    return tiny_model(family, kind, num_labels=3)


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of every trainable parameter, under PEFT's names."""
    model.zero_grad()
    logits = model(input_ids=TOKENS).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {THEIR_OWN_STEPS.sub("", name): gradient for name, gradient in gradients.items()}


def ours_trained(family: str, kind: str, technique: Lora) -> PreTrainedModel:
    """Return a model with a random adapter."""
    model = same_base(family, kind)
    technique.apply(model, anatomy(model), None)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save(folder: Path, technique: Lora, model: PreTrainedModel, base: PreTrainedModel) -> None:
    config = technique.adapter_config(model, anatomy(base)) | {"base_model_name_or_path": ""}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(technique.adapter_tensors(model), folder / "adapter_model.safetensors")


@pytest.mark.parametrize("variant", KINDS)
@pytest.mark.parametrize(("family", "kind"), MODELS)
def test_peft_reads_what_we_save(family: str, kind: str, variant: str, tmp_path: Path) -> None:
    technique = Lora(**KINDS[variant])
    model, base = ours_trained(family, kind, technique), same_base(family, kind)
    assert (answers(model) - answers(base)).abs().max() > 1e-2
    save(tmp_path, technique, model, base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(answers(theirs), answers(model), atol=1e-5, rtol=1e-5)
    if technique.init == "default":
        gradients, reference = learned(model), learned(theirs)
        assert {PEFT_PREFIX + name for name in gradients} == set(reference)
        for name, gradient in gradients.items():
            other = reference[PEFT_PREFIX + name]  # a sum over tokens with cancellation
            assert torch.dist(gradient, other) <= 1e-5 * (1 + other.norm()), name
    plain = theirs.merge_and_unload()
    technique.merge(model)
    torch.testing.assert_close(answers(plain), answers(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "all-linear", "rslora", "dora"])
@pytest.mark.parametrize(("family", "kind"), MODELS)
def test_we_read_what_peft_saves(family: str, kind: str, variant: str, tmp_path: Path) -> None:
    technique, base = Lora(**KINDS[variant]), same_base(family, kind)
    parts = anatomy(base)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if kind == CAUSAL else "SEQ_CLS",
        r=technique.r,
        lora_alpha=technique.alpha,
        target_modules=technique.target_modules
        if technique.target_modules == "all-linear"
        else sorted({".".join(path.split(".")[-2:]) for path in parts.targets(technique.target_modules)}),
        modules_to_save=list(parts.head) or None,
        use_rslora=technique.rslora,
        use_dora=technique.dora,
        fan_in_fan_out=family == "gpt2",
    )
    theirs = peft.get_peft_model(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path)
    read, model = Lora.from_adapter(tmp_path), same_base(family, kind)
    read.apply(model, anatomy(model), None)
    read.load_adapter(model, load_file(tmp_path / "adapter_model.safetensors"))
    model, theirs = model.double(), theirs.double()  # in fp32 processors round differently
    torch.testing.assert_close(answers(model), answers(theirs), atol=1e-5, rtol=1e-5)
    gradients, reference = learned(model), learned(theirs)
    assert {PEFT_PREFIX + name for name in gradients} == set(reference)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[PEFT_PREFIX + name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_files_hold_the_same_keys(tmp_path: Path) -> None:
    technique, base = Lora(dora=True), same_base("bert", CLASSIFIER)
    model = ours_trained("bert", CLASSIFIER, technique)
    save(tmp_path, technique, model, base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    ours, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert set(ours) == set(again) and all(torch.equal(ours[name], again[name]) for name in ours)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    understood = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    del written["base_model_name_or_path"]
    for key, value in written.items():
        assert set(value) <= set(understood[key]) if isinstance(value, list) else understood[key] == value, key


def test_pissa_starts_and_pulls_where_peft_does() -> None:
    ours, theirs = same_base("bert", CLASSIFIER), same_base("bert", CLASSIFIER)
    Lora(init="pissa", r=4).apply(ours, anatomy(ours), None)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=["query", "value"])
    theirs = peft.get_peft_model(theirs, config).eval()
    torch.testing.assert_close(answers(ours), answers(theirs), atol=1e-5, rtol=1e-5)
    factors = {name: parameter for name, parameter in ours.named_parameters() if ".lora_" in name}
    reference = {THEIR_OWN_STEPS.sub("", name): p for name, p in theirs.named_parameters() if p.requires_grad}
    gradients, pulls = learned(ours), learned(theirs)
    assert len(factors) == 12 and {PEFT_PREFIX + name for name in factors} == set(reference)
    for name, factor in factors.items():
        torch.testing.assert_close(factor, reference[PEFT_PREFIX + name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(gradients[name], pulls[PEFT_PREFIX + name], atol=1e-5, rtol=1e-4)
