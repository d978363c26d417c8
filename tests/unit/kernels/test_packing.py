"""Packing without attention across examples: each token has the output that it has in its example alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerating import accelerated, unpadded
from torch import Tensor, nn

from tunesmith import registry
from tunesmith.models.anatomy import anatomy
from tunesmith.testing import FAMILIES, tiny_model, tiny_tokenizer
from tunesmith.testing import contract as testing

FURTHER = {
    "qwen3": FAMILIES["qwen2"] | {"head_dim": 8},
    "gemma3_text": FAMILIES["gemma"] | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma2": FAMILIES["gemma"] | {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 4},
    "smollm3": FAMILIES["llama"],
}
"""Ways of attending that the families of the contract lack: normed heads, layers of two kinds, scores that are bent,
layers without places."""

CAUSAL = ["gpt2", "llama", "mistral", "qwen2", "gemma", "phi", "phi3", *FURTHER]
LENGTHS = ([12, 3, 7, 7, 1], [5, 5, 5], [9], [1, 2, 3, 40])


@pytest.fixture(autouse=True)
def further(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, keys in FURTHER.items():
        monkeypatch.setitem(testing.FAMILIES, name, keys)


def _texts(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(3, 64, (length,), generator=generator) for length in lengths]


def _alone(model: nn.Module, texts: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the logits of each text and the summed gradients, one unpadded text at a time."""
    model.zero_grad()
    found = []
    for text in texts:
        logits = model(input_ids=text[None]).logits[0, -len(text) :]
        logits.square().sum().backward()
        found.append(logits.detach())
    return found, _gradients(model)


def _together(model: nn.Module, texts: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad()
    longest = max(map(len, texts))
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = (torch.arange(longest) < torch.tensor([len(text) for text in texts])[:, None]).long()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -longest:]
    found = [row[: len(text)] for row, text in zip(logits, texts, strict=True)]
    torch.stack([one.square().sum() for one in found]).sum().backward()
    return [one.detach() for one in found], _gradients(model)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _check(plain: Any) -> None:
    packed = copy.deepcopy(plain)
    blocks = [packed.get_submodule(path) for path in anatomy(packed).blocks]
    unpadded(packed)
    tokens = []
    blocks[-1].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:2]))
    for lengths in LENGTHS:
        texts = _texts(lengths)
        ours, alone = _together(packed, texts), _alone(plain, texts)
        for one, expected in zip(ours[0], alone[0], strict=True):
            torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)
        assert ours[1].keys() == alone[1].keys()
        gradients, expected = (torch.cat([g.flatten() for g in found[1].values()]) for found in (ours, alone))
        assert torch.dist(gradients, expected) <= 1e-5 * expected.norm()
    assert all(rows == 1 for rows, _ in tokens)


@pytest.mark.parametrize("family", CAUSAL)
def test_logits_and_gradients_of_each_token_are_those_of_its_text_alone(family: str) -> None:
    _check(tiny_model(family, "AutoModelForCausalLM", sliding_window=4))


TECHNIQUES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear", "r": 4},
    "adapter": {},
    "prompt": {"num_virtual_tokens": 5},
    "prefix": {"num_virtual_tokens": 5},
}


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("family", CAUSAL)
def test_and_so_with_what_a_technique_adds(family: str, technique: str) -> None:
    if (family, technique) == ("gemma2", "prefix"):
        pytest.skip("its attention cannot be given keys from outside")
    model = tiny_model(family, "AutoModelForCausalLM", sliding_window=4)
    torch.manual_seed(0)
    made: Any = registry.get("technique", technique)
    made(**TECHNIQUES[technique]).apply(model, anatomy(model), tiny_tokenizer())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "adapter" in name):
            parameter.data += 0.1 * torch.randn_like(parameter)
    _check(model)


def test_a_batch_padded_beyond_its_longest_text_is_not_flattened_twice() -> None:
    plain = tiny_model("llama", "AutoModelForCausalLM")
    packed = copy.deepcopy(plain)
    unpadded(packed)
    ids = torch.randint(3, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(32) < torch.tensor([10, 22])[:, None]).long()
    with torch.no_grad():
        ours, expected = (model(input_ids=ids, attention_mask=mask).logits for model in (packed, plain))
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_attention_with_what_is_not_computed_here_keeps_padding() -> None:
    model = tiny_model("llama", "AutoModelForCausalLM")
    for block in model.model.layers:
        block.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"s_aux": torch.zeros(4)}), with_kwargs=True
        )
    status = accelerated(model).statuses["unpadded"]
    assert not status.on and "sinks" in status.reason
