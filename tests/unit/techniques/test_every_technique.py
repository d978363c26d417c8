"""Tests of every technique: copies, activation checkpointing, storage in bf16, saving and loading."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith import registry
from tunesmith.console import Console
from tunesmith.errors import RecipeError
from tunesmith.models.anatomy import anatomy
from tunesmith.run import prepare
from tunesmith.techniques import Technique
from tunesmith.testing import tiny_model, tiny_tokenizer
from tunesmith.training import machine

CLASSIFIER = "AutoModelForSequenceClassification"
TOKENS = torch.tensor([[2, 9, 7, 11, 3], [2, 8, 13, 4, 3]])
VARIANTS: dict[str, Technique] = {
    " ".join([name, *(f"{key}={value}" for key, value in keys.items())]): technique(**keys)
    for name in registry.names("technique")
    for technique in [cast(type[Technique], registry.get("technique", name))]
    for keys in technique.variants()
}
LN_TUNING = cast(type[Technique], registry.get("technique", "peft"))(type="LN_TUNING")
ADAPTERS = [name for name, technique in VARIANTS.items() if technique.artifact == "adapter"]
FAMILIES = ("bert", "gpt2", "t5")
PREFIXES = [name for name in VARIANTS if name.startswith(("prompt", "prefix"))]


def adapted(technique: Technique, family: str, *, shake: bool = True) -> PreTrainedModel:
    """Return an adapted model whose trainable parameters are random, as after some steps."""
    return adapt(tiny_model(family, CLASSIFIER), technique, shake=shake)


def adapt(model: PreTrainedModel, technique: Technique, *, shake: bool) -> PreTrainedModel:
    torch.manual_seed(1)
    try:
        technique.apply(model, anatomy(model), tiny_tokenizer())
    except RecipeError as refusal:
        pytest.skip(str(refusal))  # tests/contract checks that docs/support.md has each refusal
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and shake:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def answers(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    answers(model).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_copy_is_equal_and_independent(variant: str, family: str) -> None:
    model = adapted(VARIANTS[variant], family)
    twin = copy.deepcopy(model)
    before = answers(model).detach()
    assert torch.equal(answers(twin), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    assert torch.equal(answers(model), before), "the copy shares no tensor with it"
    assert not torch.equal(answers(twin), before), "and uses its own"


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("variant", PREFIXES)
def test_a_disabled_prompt_or_prefix_gives_the_outputs_of_the_base(variant: str, family: str) -> None:
    model = tiny_model(family, CLASSIFIER).eval()
    before = answers(model).detach()
    technique = VARIANTS[variant]
    torch.manual_seed(1)
    technique.apply(model, anatomy(model), tiny_tokenizer())
    with_prefix = answers(model).detach()
    with technique.disabled(model):
        torch.testing.assert_close(answers(model), before)
    assert torch.equal(answers(model), with_prefix) and not torch.allclose(with_prefix, before, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_checkpointing_gives_the_same_gradients(variant: str, family: str) -> None:
    model = adapted(VARIANTS[variant], family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = gradients(model)
    assert set(expected) <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.activation_checkpointing_enable()
    recomputed = gradients(model)
    assert set(recomputed) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-5, rtol=1e-4)
    copy.deepcopy(model)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("variant", ADAPTERS)
def test_an_adapter_over_a_base_stored_in_bf16_is_saved_in_fp32_and_loaded(variant: str, autocast: bool) -> None:
    technique = VARIANTS[variant]
    model = adapt(tiny_model("bert", CLASSIFIER).bfloat16(), technique, shake=True)
    again = adapt(tiny_model("bert", CLASSIFIER).bfloat16(), technique, shake=False)
    for one in (model, again):
        machine.store_frozen(one, torch.bfloat16 if autocast else None)
        one.eval()
    tensors = technique.adapter_tensors(model)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    expected, before = (answers_in_bf16(one, autocast) for one in (model, again))
    technique.load_adapter(again, tensors)
    assert torch.equal(answers_in_bf16(again, autocast), expected) and not torch.equal(before, expected)
    answers_in_bf16(model, autocast).float().square().sum().backward()
    gradients_of_adapter = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients_of_adapter)


def answers_in_bf16(model: PreTrainedModel, autocast: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return answers(model)


@pytest.mark.parametrize(
    ("technique", "most"), [("lora", 64), ("prompt", 64 - 21), ("prefix", 64 - 20), ("adapter", 64)]
)
def test_a_text_leaves_room_for_virtual_tokens(technique: str, most: int, recipe_of: Any) -> None:
    def length(*words: str) -> int:
        recipe = recipe_of(*words, technique=technique)
        found = machine.find("cpu", "fp32")
        prepared = prepare.prepare(recipe, found, offline=True, allow_pickle=False, console=Console(level=-1))
        return int(prepared.recipe.data.max_length or 0)

    assert length() == most and length(f"data.max_length={most}") == most
    with pytest.raises(RecipeError, match=f"data.max_length: .*{most}"):
        length(f"data.max_length={most + 1}")


@pytest.mark.parametrize(("technique", "taken"), [("prompt", 63), ("prefix", 62)])
def test_virtual_tokens_that_leave_no_room_are_refused(technique: str, taken: int, recipe_of: Any) -> None:
    recipe = recipe_of("technique.num_virtual_tokens=62", technique={"name": technique})
    found = machine.find("cpu", "fp32")
    with pytest.raises(RecipeError) as caught:
        prepare.prepare(recipe, found, offline=True, allow_pickle=False, console=Console(level=-1))
    assert "technique.num_virtual_tokens: " in str(caught.value) and f"{taken} " in str(caught.value)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mistral", "gemma", "phi", "phi3"])
@pytest.mark.parametrize("variant", ["lora r=4", "adapter kind=parallel", *PREFIXES])
def test_a_decoder_generates_with_a_cache_as_without(variant: str, family: str) -> None:
    """Also with left padding, which does not change the tokens of a text."""
    model = adapt(tiny_model(family, "AutoModelForCausalLM"), VARIANTS[variant], shake=True).eval()
    padded, mask = torch.tensor([[5, 9, 7, 8], [0, 0, 6, 8]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = model.generate(input_ids=padded, attention_mask=mask, **options)[:, 4:]
    for row, tokens in zip(generated, ([5, 9, 7, 8], [6, 8]), strict=True):
        text = torch.tensor([tokens])
        for _ in range(5):
            with torch.no_grad():
                text = torch.cat([text, model(input_ids=text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert row.tolist() == text[0, len(tokens) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_ln_tuning_trains_norms(family: str) -> None:
    model = adapted(LN_TUNING, family, shake=False)
    parts = anatomy(tiny_model(family, CLASSIFIER))
    names = {name for name, p in model.named_parameters() if p.requires_grad} - parts.always_trainable
    assert names and all(any(path in name for path in parts.roles["norm"]) for name in names)
