"""What every technique must bear: to be copied, recomputed, stored in bf16, saved and loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith import prepare, registry
from tunesmith.errors import RecipeError
from tunesmith.models.anatomy import anatomy
from tunesmith.talk import Talk
from tunesmith.techniques import Technique
from tunesmith.testing import tiny_model, tiny_tokenizer
from tunesmith.training import machine

CLASSIFIER = "AutoModelForSequenceClassification"
TOKENS = torch.tensor([[2, 9, 7, 11, 3], [2, 8, 13, 4, 3]])
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "freeze": ("freeze", {"last_n_blocks": 2}),
    "lora": ("lora", {"r": 2}),
    "dora": ("lora", {"r": 2, "dora": True}),
    "houlsby": ("adapter", {"kind": "houlsby"}),
    "pfeiffer": ("adapter", {"kind": "pfeiffer"}),
    "parallel": ("adapter", {"kind": "parallel"}),
    "bitfit": ("bitfit", {}),
    "ia3": ("ia3", {}),
    "prompt": ("prompt", {"num_virtual_tokens": 4}),
    "prefix": ("prefix", {"num_virtual_tokens": 4}),
    "prefix network": ("prefix", {"num_virtual_tokens": 4, "reparameterize": 16}),
    "peft": ("peft", {"type": "LOHA"}),
    "peft norms": ("peft", {"type": "LN_TUNING"}),
}
ADAPTERS = [kind for kind in KINDS if kind not in ("full", "freeze", "bitfit")]
FAMILIES = ("bert", "gpt2", "t5")
CASES = [
    (kind, family)
    for kind in KINDS
    for family in FAMILIES
    if (kind, family) not in (("bitfit", "t5"), ("peft", "gpt2"))
]


def technique_of(kind: str) -> Technique:
    name, keys = KINDS[kind]
    found = registry.get("technique", name)(**keys)
    assert isinstance(found, Technique)
    return found


def adapted(kind: str, family: str, *, shake: bool = True) -> PreTrainedModel:
    """What learns, moved at random: as it is after some steps."""
    model = tiny_model(family, CLASSIFIER)
    return adapt(model, kind, shake=shake)


def adapt(model: PreTrainedModel, kind: str, *, shake: bool) -> PreTrainedModel:
    torch.manual_seed(1)
    technique_of(kind).apply(model, anatomy(model), tiny_tokenizer())
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


def test_every_technique_is_here() -> None:
    assert {name for name, _ in KINDS.values()} == set(registry.names("technique"))


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_a_copy_answers_the_same_and_learns_on_its_own(kind: str, family: str) -> None:
    model = adapted(kind, family)
    twin = copy.deepcopy(model)
    before = answers(model).detach()
    assert torch.equal(answers(twin), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    assert torch.equal(answers(model), before), "the copy shares nothing with it"
    assert not torch.equal(answers(twin), before), "and hears its own"


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_without_what_stands_before_the_text_the_base_answers(kind: str, family: str) -> None:
    model = tiny_model(family, CLASSIFIER).eval()
    before = answers(model).detach()
    technique = technique_of(kind)
    torch.manual_seed(1)
    technique.apply(model, anatomy(model), tiny_tokenizer())
    beside = answers(model).detach()
    with technique.absent(model):
        torch.testing.assert_close(answers(model), before)
    assert torch.equal(answers(model), beside) and not torch.allclose(beside, before, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize(("kind", "family"), CASES)
def test_what_is_recomputed_gives_the_same_gradients(kind: str, family: str) -> None:
    model = adapted(kind, family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = gradients(model)
    assert set(expected) <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.activation_checkpointing_enable()
    found = gradients(model)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    copy.deepcopy(model)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_over_a_base_stored_in_bf16_is_saved_in_fp32_and_loaded(kind: str, autocast: bool) -> None:
    technique = technique_of(kind)
    model = adapt(tiny_model("bert", CLASSIFIER).bfloat16(), kind, shake=True)
    again = adapt(tiny_model("bert", CLASSIFIER).bfloat16(), kind, shake=False)
    for one in (model, again):
        machine.store_frozen(one, torch.bfloat16 if autocast else None)
        one.eval()
    tensors = technique.adapter_tensors(model)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    expected, before = (answers_in_bf16(one, autocast) for one in (model, again))
    technique.load_adapter(again, tensors)
    assert torch.equal(answers_in_bf16(again, autocast), expected) and not torch.equal(before, expected)
    answers_in_bf16(model, autocast).float().square().sum().backward()
    gradients_found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients_found)


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
        prepared = prepare.prepare(recipe, found, offline=True, allow_pickle=False, talk=Talk(level=-1))
        return int(prepared.recipe.data.max_length or 0)

    assert length() == most and length(f"data.max_length={most}") == most
    with pytest.raises(RecipeError, match=f"data.max_length: {most + 1} tokens, but this model reads at most {most}"):
        length(f"data.max_length={most + 1}")


@pytest.mark.parametrize(("technique", "taken"), [("prompt", 63), ("prefix", 62)])
def test_virtual_tokens_that_leave_no_room_are_refused(technique: str, taken: int, recipe_of: Any) -> None:
    recipe = recipe_of("technique.num_virtual_tokens=62", technique={"name": technique})
    found = machine.find("cpu", "fp32")
    with pytest.raises(RecipeError) as caught:
        prepare.prepare(recipe, found, offline=True, allow_pickle=False, talk=Talk(level=-1))
    said = f"technique.num_virtual_tokens: {taken} virtual positions leave no room for a text in a model that reads 64"
    assert said in str(caught.value)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mistral", "gemma", "phi", "phi3"])
@pytest.mark.parametrize("kind", ["lora", "parallel", "prompt", "prefix"])
def test_a_decoder_generates_with_a_cache_as_without(kind: str, family: str) -> None:
    """Left padding as well: a text's own tokens are what a padded one's are."""
    model = adapt(tiny_model(family, "AutoModelForCausalLM"), kind, shake=True).eval()
    padded, mask = torch.tensor([[5, 9, 7, 8], [0, 0, 6, 8]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    asked: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(input_ids=padded, attention_mask=mask, **asked)[:, 4:]
    for row, tokens in zip(found, ([5, 9, 7, 8], [6, 8]), strict=True):
        text = torch.tensor([tokens])
        for _ in range(5):
            with torch.no_grad():
                text = torch.cat([text, model(input_ids=text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert row.tolist() == text[0, len(tokens) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_of_norms_tunes_norms(family: str) -> None:
    model = adapted("peft norms", family, shake=False)
    parts = anatomy(tiny_model(family, CLASSIFIER))
    learned = {name for name, one in model.named_parameters() if one.requires_grad} - parts.learns_always
    assert learned and all(any(path in name for path in parts.roles["norm"]) for name in learned)
