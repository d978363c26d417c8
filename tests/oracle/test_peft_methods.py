"""(IA)3, prompts and prefixes against PEFT: the same vectors give the same logits, in both directions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.models.anatomy import Anatomy, anatomy
from tunesmith.recipe import load as load_recipe
from tunesmith.techniques import Technique
from tunesmith.testing import tiny_model, tiny_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of third parties at import
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's

CLASSIFIER, CAUSAL, SEQ2SEQ = "AutoModelForSequenceClassification", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
MODELS = [("bert", CLASSIFIER), ("gpt2", CLASSIFIER), ("llama", CLASSIFIER), ("gpt2", CAUSAL), ("llama", CAUSAL)]
MODELS += [("t5", SEQ2SEQ)]
TASKS = {CLASSIFIER: "SEQ_CLS", CAUSAL: "CAUSAL_LM", SEQ2SEQ: "SEQ_2_SEQ_LM"}
OURS: dict[str, dict[str, Any]] = {
    "ia3": {},
    "prompt": {"num_virtual_tokens": 5},
    "prefix": {"num_virtual_tokens": 5},
}
TOKENS = torch.tensor([[5, 9, 7, 11, 3], [6, 8, 4, 13, 3]])
MASK = torch.ones_like(TOKENS)


def technique(name: str, **more: Any) -> Technique:
    keys = {"name": name, **OURS[name], **more}
    read = load_recipe(None, (), {"task": "text-classification", "model": "m", "technique": keys})
    assert isinstance(read.technique, Technique)
    return read.technique


def base(family: str, kind: str) -> PreTrainedModel:
    return tiny_model(family, kind, num_labels=3)


def map_of(model: PreTrainedModel) -> Anatomy:
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    head = {name for name, parameter in model.named_parameters() if id(parameter) not in inside}
    return anatomy(model, new=frozenset(head) if "Classification" in type(model).__name__ else frozenset())


def logits(model: nn.Module, kind: str) -> Tensor:
    """Return the logits of the text; PEFT also returns those of virtual tokens."""
    more = {"decoder_input_ids": torch.tensor([[0, 7, 9], [0, 4, 6]])} if kind == SEQ2SEQ else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS, attention_mask=MASK, **more).logits
    return logits[:, -TOKENS.shape[1] :] if kind == CAUSAL else logits


def shaken(model: nn.Module) -> nn.Module:
    """Return a model with a random adapter."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def save(own: Technique, model: nn.Module, parts: Anatomy, folder: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in own.adapter_tensors(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    peft.PeftConfig.from_peft_type(**own.adapter_config(model, parts)).save_pretrained(folder)


@pytest.mark.parametrize(("family", "kind"), MODELS)
@pytest.mark.parametrize("name", list(OURS))
def test_peft_answers_as_ours(name: str, family: str, kind: str, tmp_path: Path) -> None:
    own, model = technique(name), base(family, kind)
    parts = map_of(model)
    own.apply(model, parts, tiny_tokenizer())
    shaken(model)
    expected = logits(model, kind)
    assert (expected - logits(base(family, kind), kind)).abs().max() > 1e-3
    save(own, model, parts, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(family, kind), tmp_path).eval()
    assert torch.allclose(logits(theirs, kind), expected, atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), MODELS)
@pytest.mark.parametrize("name", list(OURS))
def test_ours_answers_as_peft(name: str, family: str, kind: str, tmp_path: Path) -> None:
    configs = {"ia3": peft.IA3Config, "prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    many: dict[str, Any] = {"num_virtual_tokens": 5} if name != "ia3" else {"fan_in_fan_out": family == "gpt2"}
    theirs = shaken(peft.get_peft_model(base(family, kind), configs[name](task_type=TASKS[kind], **many)).eval())
    expected = logits(theirs, kind)
    theirs.save_pretrained(tmp_path)
    own: Any = type(technique(name)).from_adapter(tmp_path)  # type: ignore[attr-defined]
    model = base(family, kind)
    own.apply(model, map_of(model), tiny_tokenizer())
    own.load_adapter(model, load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.allclose(logits(model.eval(), kind), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["ia3", "prompt"])
def test_peft_answers_as_ours_on_bart(name: str, tmp_path: Path) -> None:
    test_peft_answers_as_ours(name, "bart", SEQ2SEQ, tmp_path)


def test_a_prefix_that_peft_would_answer_otherwise_with_is_not_called_its_own() -> None:
    """Past keys shift the positions of BART's decoder, which does not accept position ids."""
    own, model = technique("prefix"), base("bart", SEQ2SEQ)
    own.apply(model, map_of(model), tiny_tokenizer())
    assert own.adapter_config(model, map_of(base("bart", SEQ2SEQ)))["peft_type"] == "TUNESMITH_PREFIX"


def test_peft_answers_as_a_reparameterised_prefix(tmp_path: Path) -> None:
    own, model = technique("prefix", reparameterize=16), base("bert", CLASSIFIER)
    parts = map_of(model)
    own.apply(model, parts, tiny_tokenizer())
    shaken(model)
    save(own, model, parts, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base("bert", CLASSIFIER), tmp_path).eval()
    assert torch.allclose(logits(theirs, CLASSIFIER), logits(model, CLASSIFIER), atol=1e-5)
