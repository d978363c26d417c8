from __future__ import annotations

from typing import Any

import pytest
import torch
from adapting import trainable
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith import registry
from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.models.anatomy import anatomy
from tunesmith.techniques.prefix import LEARNING_RATE, REPARAMETERIZED_LEARNING_RATE, Prefix, PrefixStates
from tunesmith.testing import CLASSIFYING, tiny_model, tiny_tokenizer

CLASSIFIER, TOKEN_CLASSIFIER = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
TOKENIZER = tiny_tokenizer()
TOKENS = torch.tensor([[2, 9, 7, 11, 3], [2, 8, 13, 4, 3]])
REFUSED = ("deberta", "deberta-v2")
TAKEN = [family for family in CLASSIFYING if family not in REFUSED]
N = 4


def prefixed(
    family: str, kind: str = CLASSIFIER, keys: dict[str, Any] | None = None, **config: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return an adapted model and its base."""
    base, model = (tiny_model(family, kind, **config) for _ in range(2))
    torch.manual_seed(0)
    Prefix(num_virtual_tokens=N, **(keys or {})).apply(model, anatomy(model), TOKENIZER)
    return model, base


def prefixes(model: nn.Module) -> list[PrefixStates]:
    return [module for module in model.modules() if isinstance(module, PrefixStates)]


def test_the_registry_knows_it_by_its_file() -> None:
    assert registry.get("technique", "prefix") is Prefix


@pytest.mark.parametrize("family", TAKEN)
def test_keys_and_values_of_every_attention_and_the_head_learn(family: str) -> None:
    """2 n d_kv parameters per attention layer: of the decoder in an encoder-decoder, shared in ALBERT."""
    model, base = prefixed(family)
    found = anatomy(base)
    places = {"albert": 1, "bart": 2}.get(family, 3)
    width = 16 if family in ("llama", "qwen2", "mistral", "phi", "phi3", "gemma") else 32  # two of four heads have keys
    learned = trainable(model) - found.always_trainable
    assert len(learned) == places and trainable(model) == learned | found.always_trainable
    assert sum(model.get_parameter(name).numel() for name in learned) == places * 2 * N * width
    assert all(name.endswith(".prefix.states") for name in learned)
    assert all(".decoder." in name and "EncDec" not in name for name in learned) or family not in ("t5", "bart")


@torch.no_grad()
def test_they_start_as_what_the_model_makes_of_tokens() -> None:
    """In the first block they are linear in the embedding of some token at one of the first positions."""
    model, base = prefixed("bert")
    start = prefixes(model)[0].states  # (2, heads, n, width)
    ids = torch.arange(len(TOKENIZER))
    layer = base.bert.encoder.layer[0].attention.self
    for place in range(N):
        states = base.bert.embeddings(ids[:, None], position_ids=torch.tensor([[place]]))[:, 0]
        made = layer.key(states).view(-1, 4, 8)
        assert (made - start[0, :, place]).abs().amax((1, 2)).min() < 1e-5


def test_reparameterised_they_are_made_of_what_all_modules_share() -> None:
    """n d + (d b + b) shared, and for each of 3 modules b 2 d + 2 d."""
    model, base = prefixed("bert", keys={"reparameterize": 16})
    shared, made = prefixes(model)[0].shared, prefixes(model)[1]()
    assert shared is not None and all(prefix.shared is shared for prefix in prefixes(model))
    learned = trainable(model) - anatomy(base).always_trainable
    numbers = sum(model.get_parameter(name).numel() for name in learned)
    assert numbers == N * 32 + (32 * 16 + 16) + 3 * (16 * 64 + 64)
    up = prefixes(model)[1].up
    inner = torch.tanh(shared.weight @ shared.down.weight.t() + shared.down.bias)
    rows = inner @ up.weight.t() + up.bias  # (n, 2 * heads * width)
    assert made.shape == (2, 4, N, 8)
    torch.testing.assert_close(made[0, :, 2].flatten(), rows[2, :32])
    torch.testing.assert_close(made[1, :, 2].flatten(), rows[2, 32:])


@torch.no_grad()
def test_attention_is_over_prefix_and_text() -> None:
    """softmax(q [P_K; K] / sqrt(d)) [P_V; V], written out."""
    model, _ = prefixed("bert", "AutoModel")
    layer = model.encoder.layer[1].attention.self
    kept: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda _, args, out: kept.update(x=args[0], y=out[0]))
    model(input_ids=TOKENS)

    def heads(map_: nn.Module) -> Tensor:
        return map_(kept["x"]).view(2, 5, 4, 8).transpose(1, 2)

    own = layer.prefix.states
    keys, values = (
        torch.cat([own[k].expand(2, -1, -1, -1), heads(m)], 2) for k, m in ((0, layer.key), (1, layer.value))
    )
    weights = torch.softmax(heads(layer.query) @ keys.transpose(-1, -2) / 8**0.5, -1)
    torch.testing.assert_close((weights @ values).transpose(1, 2).flatten(2), kept["y"])


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_positions_of_the_text_begin_after_the_prefix(family: str) -> None:
    model, base = prefixed(family)
    entered: list[Tensor] = []
    for one in (model, base):
        block = one.get_submodule(anatomy(base).blocks[0])
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    getattr(base, base.base_model_prefix)(input_ids=TOKENS, position_ids=torch.arange(N, N + 5)[None])
    body = getattr(model, model.base_model_prefix)
    body(input_ids=TOKENS)
    body(input_ids=TOKENS, position_ids=torch.arange(5)[None])
    body(inputs_embeds=model.get_input_embeddings()(TOKENS))
    assert len(entered) == 4 and all(torch.equal(states, entered[0]) for states in entered)


@torch.no_grad()
def test_positions_are_counted_from_where_roberta_begins() -> None:
    model, base = prefixed("roberta", pad_token_id=1)
    kept: list[Tensor] = []
    for one in (model, base):
        one.roberta.encoder.layer[0].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    model(input_ids=TOKENS), base(input_ids=TOKENS, position_ids=torch.arange(2 + N, 7 + N)[None])
    assert torch.equal(kept[0], kept[1])


@torch.no_grad()
@pytest.mark.parametrize("family", TAKEN)
def test_padding_on_the_right_changes_nothing(family: str) -> None:
    model, _ = prefixed(family, num_labels=3)
    short, long = [2, 9, 7, 3], [2, 8, 13, 4, 11, 6, 3]
    alone = model(input_ids=torch.tensor([short]), attention_mask=torch.ones(1, 4, dtype=torch.long)).logits[0]
    unmasked = model(input_ids=torch.tensor([short])).logits[0]
    ids = torch.tensor([short + [0] * 3, long])
    together = model(input_ids=ids, attention_mask=(ids != 0).long()).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unmasked, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_one_output_for_each_token_and_it_heeds_the_prefix(family: str) -> None:
    model, base = prefixed(family, TOKEN_CLASSIFIER, num_labels=3)
    found, plain = (one(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits for one in (model, base))
    assert found.shape == plain.shape == (2, 5, 3)
    for place in range(5):
        assert (found[:, place] - plain[:, place]).abs().max() > 1e-4


@torch.no_grad()
def test_a_decoder_still_sees_no_later_token() -> None:
    model, _ = prefixed("llama", "AutoModelForCausalLM")
    one, other = TOKENS.clone(), TOKENS.clone()
    other[:, 3] = 21
    states = [model(input_ids=ids).logits for ids in (one, other)]
    assert torch.equal(states[0][:, :3], states[1][:, :3]) and not torch.equal(states[0][:, 3:], states[1][:, 3:])


@pytest.mark.parametrize("reparameterize", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_what_is_saved_is_what_was_learned(family: str, reparameterize: bool) -> None:
    """Any number of keys and values is loaded; the reparameterization network is dropped."""
    keys = {"reparameterize": 16} if reparameterize else {}
    model, base = prefixed(family, keys=keys)
    technique = Prefix(num_virtual_tokens=N, **keys)
    tensors = technique.adapter_tensors(model)
    width = 16 if family == "llama" else 32
    assert tensors["prompt_embeddings"].shape == (N, 3 * 2 * width)
    other = Prefix(num_virtual_tokens=2, **keys)
    other.apply(base, anatomy(base), TOKENIZER)
    other.load_adapter(base, tensors)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, base(input_ids=TOKENS).logits)
    config = technique.adapter_config(model, anatomy(tiny_model(family, CLASSIFIER)))
    assert config["num_virtual_tokens"] == N and config["token_dim"] == width
    assert config["peft_type"] == ("TUNESMITH_PREFIX" if family == "t5" else "PREFIX_TUNING")


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    model, _ = prefixed("bert")
    technique = Prefix(num_virtual_tokens=N)
    tensors = technique.adapter_tensors(model)
    with pytest.raises(CheckpointError, match="128.*192"):
        technique.load_adapter(model, tensors | {"prompt_embeddings": torch.zeros(N, 128)})
    with pytest.raises(CheckpointError, match="prompt_embeddings"):
        technique.load_adapter(model, {name: value for name, value in tensors.items() if name != "prompt_embeddings"})


@pytest.mark.parametrize("family", REFUSED)
def test_an_attention_of_its_own_is_refused(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(family, CLASSIFIER)
    with pytest.raises(RecipeError) as caught:
        Prefix().apply(model, anatomy(model), TOKENIZER)
    assert caught.value.where == "technique" and "technique=prompt" in str(caught.value)
    assert not caplog.records, "transformers has nothing to add"


def test_it_cannot_be_merged_and_says_why() -> None:
    with pytest.raises(RecipeError, match=Prefix.cannot_merge):
        Prefix().merge(prefixed("bert")[0])


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"num_virtual_tokens": 0}, "greater than or equal to 1"),
        ({"reparameterize": True}, "valid integer"),
        ({"reparameterize": 0}, "greater than or equal to 1"),
        ({"prefix_projection": True}, "Extra inputs"),
    ],
)
def test_what_is_no_setting_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Prefix(**keys)


def test_what_was_resolved_may_be_given_again() -> None:
    assert Prefix.model_validate(Prefix().model_dump()) == Prefix()
    assert Prefix(num_virtual_tokens=7).virtual_tokens == 7


def test_only_the_network_has_a_rate_that_falls_with_the_width() -> None:
    for width in (32, 64):
        parts = anatomy(tiny_model("bert", CLASSIFIER, hidden_size=width))
        assert Prefix().learning_rate(parts) == LEARNING_RATE
        rate = Prefix(reparameterize=512).learning_rate(parts)
        assert rate == pytest.approx(REPARAMETERIZED_LEARNING_RATE * 384 / width)
