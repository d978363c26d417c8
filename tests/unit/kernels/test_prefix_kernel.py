from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tunesmith.kernels.prefix import attention, attention_inputs, prefixed, supports_attention_functions, use_prefixes
from tunesmith.testing import CLASSIFYING, tiny_model

CLASSIFIER = "AutoModelForSequenceClassification"
TOKENS = torch.tensor([[5, 9, 7, 11, 3], [6, 8, 13, 4, 3]])


class Given(nn.Module):
    """Prefix with the given keys and values."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self) -> Tensor:
        return self.states

    def bias(self, queries: int, keys: int) -> Tensor:
        """Return a bias that differs for each head, query and virtual token."""
        heads, tokens = self.states.shape[1:3]
        return torch.arange(heads * queries * tokens).view(1, heads, queries, tokens) / 7.0


class Attends(nn.Module):
    """Attention module with the attributes that attention functions read."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, prefix: nn.Module | None = None, *, causal: bool = False, groups: int = 1) -> None:
        super().__init__()
        if prefix is not None:
            self.prefix = prefix
        self.is_causal, self.num_key_value_groups = causal, groups


def by_hand(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Compute attention over the visible keys, as (batch, queries, heads, width) like transformers."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
    return (torch.softmax(scores.masked_fill(~seen, -math.inf), -1) @ value).transpose(1, 2)


def random(heads: int, queries: int, keys: int, prefix: int, kv_heads: int | None = None) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    kv_heads = kv_heads or heads
    sizes = [(2, heads, queries, 6), (2, kv_heads, keys, 6), (2, kv_heads, keys, 6), (2, kv_heads, prefix, 6)]
    return tuple(torch.randn(size) for size in sizes)


def in_front(states: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    own = states[:, None].expand(2, len(key), -1, -1, -1)
    return torch.cat([own[0], key], 2), torch.cat([own[1], value], 2)


def test_without_a_prefix_nothing_is_before() -> None:
    _, key, value, _ = random(4, 5, 5, 3)
    same_key, same_value, length = prefixed(Attends(), key, value)
    assert same_key is key and same_value is value and length == 0


def test_a_prefix_comes_first_in_the_format_of_the_keys() -> None:
    _, key, value, states = random(4, 5, 5, 3)
    keys, values, length = prefixed(Attends(Given(states)), key.bfloat16(), value.bfloat16())
    assert (keys.dtype, keys.shape, length) == (torch.bfloat16, (2, 4, 8, 6), 3)
    assert torch.equal(keys[1, :, :3], states[0].bfloat16()) and torch.equal(values[0, :, :3], states[1].bfloat16())
    assert torch.equal(keys[:, :, 3:], key.bfloat16())


@pytest.mark.parametrize("masked", ["no mask", "where", "added"])
def test_what_is_padded_stays_unseen_and_the_prefix_seen(masked: str) -> None:
    query, key, value, states = random(4, 5, 5, 3)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)[:, None, None]
    mask = {"no mask": None, "where": valid, "added": torch.zeros(2, 1, 5, 5).masked_fill(~valid, -1e9)}[masked]
    found, _ = attention(Attends(Given(states)), query, key, value, mask)
    seen = torch.cat([torch.ones(2, 1, 1, 3, dtype=torch.bool), valid if mask is not None else valid | True], -1)
    torch.testing.assert_close(found, by_hand(query, *in_front(states, key, value), seen))


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (2, 5), (1, 5)])
def test_a_causal_module_without_a_mask_sees_what_came_before(queries: int, keys: int) -> None:
    """With fewer queries than keys, the queries are the last positions: earlier ones are in a cache."""
    query, key, value, states = random(4, queries, keys, 3)
    found, _ = attention(Attends(Given(states), causal=True), query, key, value, None)
    seen = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    seen = torch.cat([torch.ones(queries, 3, dtype=torch.bool), seen], 1)
    torch.testing.assert_close(found, by_hand(query, *in_front(states, key, value), seen))
    free, _ = attention(Attends(Given(states), causal=True), query, key, value, None, is_causal=False)
    everything = torch.ones(queries, 3 + keys, dtype=torch.bool)
    torch.testing.assert_close(free, by_hand(query, *in_front(states, key, value), everything))


def test_queries_share_a_prefix_as_they_share_keys() -> None:
    query, key, value, states = random(4, 5, 5, 3, kv_heads=2)
    found, _ = attention(Attends(Given(states), groups=2), query, key, value, None)
    torch.testing.assert_close(found, by_hand(query, *in_front(states, key, value), torch.ones(5, 8, dtype=torch.bool)))


def test_a_position_bias_reaches_the_prefix() -> None:
    query, key, value, states = random(4, 5, 5, 3)
    bias, module = torch.randn(1, 4, 5, 5), Attends(Given(states))
    found, _ = attention(module, query, key, value, None, position_bias=bias)
    whole = torch.cat([module.prefix.bias(5, 5), bias], -1)
    everything = torch.ones(5, 8, dtype=torch.bool)
    torch.testing.assert_close(found, by_hand(query, *in_front(states, key, value), everything, whole))


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in CLASSIFYING if not family.startswith("deberta")])
def test_a_model_without_prefixes_answers_as_ever(family: str) -> None:
    model, plain = tiny_model(family, CLASSIFIER), tiny_model(family, CLASSIFIER)
    use_prefixes(model)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    asked = {"input_ids": TOKENS, "attention_mask": mask}
    torch.testing.assert_close(model(**asked).logits, plain(**asked).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "modules", "keys"), [("bert", 3, 5), ("albert", 3, 5), ("llama", 3, 5), ("t5", 9, 5)]
)
def test_looking_at_a_model_leaves_it_as_it_was(family: str, modules: int, keys: int) -> None:
    """Each of T5's three decoder blocks attends twice: to three tokens of its own, and to the encoder's."""
    model = tiny_model(family, CLASSIFIER).train()
    before = model.config._attn_implementation
    seen = attention_inputs(model, model.base_model, TOKENS[:1])
    assert len(seen) == modules and seen[0].key.shape[1] == seen[0].queries == keys
    assert model.training and model.config._attn_implementation == before
    assert all(isinstance(model.get_submodule(one.path), nn.Module) for one in seen)
    if family == "t5":
        assert [(one.queries, one.key.shape[1]) for one in seen[3:5]] == [(3, 3), (3, 5)]


def test_an_attention_that_calls_no_function_shows_nothing() -> None:
    model = tiny_model("deberta", CLASSIFIER)
    assert not supports_attention_functions(model) and attention_inputs(model, model.base_model, TOKENS[:1]) == []
    assert not supports_attention_functions(nn.Linear(2, 2))
