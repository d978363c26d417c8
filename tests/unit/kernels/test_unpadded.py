from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerating import accelerated, unpadded
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function

from tunesmith import registry
from tunesmith.kernels.layout import ROUND_TOKENS, Layout
from tunesmith.models.anatomy import anatomy
from tunesmith.testing import CLASSIFYING, tiny_model, tiny_tokenizer

LENGTHS = ([12, 3, 7, 7, 1], [5, 5, 5], [9], [1, 2, 3, 40])


KEEP_PADDING = ("deberta", "deberta-v2")
"""Families with attention of their own."""

TAKEN = [family for family in CLASSIFYING if family not in (*KEEP_PADDING, "bart", "t5")]
"""The two families in test_encoder_decoders.py."""


def _batch(lengths: list[int]) -> dict[str, Tensor]:
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(4, 64, (len(lengths), longest), generator=torch.Generator().manual_seed(len(lengths)))
    return {"input_ids": ids * mask, "attention_mask": mask}


def _answers_and_gradients(model: torch.nn.Module, lengths: list[int]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    logits = model(**_batch(lengths)).logits
    logits.square().sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", TAKEN)
def test_answers_and_gradients_are_those_of_the_padded_model(family: str) -> None:
    model = tiny_model(family, "AutoModelForSequenceClassification", num_labels=3, local_attention=6, sliding_window=4)
    padded = [_answers_and_gradients(model, lengths) for lengths in LENGTHS]
    unpadded(model)
    seen = []
    model.get_submodule(anatomy(model).blocks[-1]).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    for lengths, (answers, gradients) in zip(LENGTHS, padded, strict=True):
        ours = _answers_and_gradients(model, lengths)
        assert torch.allclose(ours[0], answers, atol=1e-5, rtol=1e-5)
        assert torch.dist(ours[1], gradients) < 1e-5 * gradients.norm()
        rounded = -(-sum(lengths) // ROUND_TOKENS) * ROUND_TOKENS
        assert seen.pop() == (1, rounded, 32), "the blocks compute on valid tokens only, rounded up"


@pytest.mark.parametrize("name", ["prompt", "prefix"])
@pytest.mark.parametrize("family", TAKEN)
def test_virtual_tokens_change_nothing_of_that(family: str, name: str) -> None:
    model = tiny_model(family, "AutoModelForSequenceClassification", num_labels=3, local_attention=6, sliding_window=4)
    torch.manual_seed(0)
    technique: Any = registry.get("technique", name)
    technique(num_virtual_tokens=5).apply(model, anatomy(model), tiny_tokenizer())
    padded = [_answers_and_gradients(model, lengths) for lengths in LENGTHS]
    unpadded(model)
    for lengths, (answers, gradients) in zip(LENGTHS, padded, strict=True):
        ours = _answers_and_gradients(model, lengths)
        assert torch.allclose(ours[0], answers, atol=1e-5, rtol=1e-5)
        assert torch.dist(ours[1], gradients) < 1e-5 * gradients.norm()


@pytest.mark.parametrize("family", KEEP_PADDING)
def test_a_family_that_cannot_keeps_padding(family: str) -> None:
    model = tiny_model(family, "AutoModelForSequenceClassification")
    before = dict(model.config.to_dict()), model.config._attn_implementation
    status = accelerated(model).statuses["unpadded"]
    assert not status.on and "attention interface" in status.reason
    assert (model.config.to_dict(), model.config._attn_implementation) == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_dropout_of_attention_has_the_right_mean() -> None:
    model = tiny_model("bert", "AutoModel", attention_probs_dropout_prob=0.3)
    batch = _batch([12, 3, 7])
    unpadded(model)
    layer = model.encoder.layer[0].attention.self
    layout = Layout(batch["attention_mask"], 3, 12, bidirectional_mask_function)
    states = torch.randn(1, layout.total, 32)
    model.eval()
    exact = layer(states, layout)[0].detach()
    model.train()
    torch.manual_seed(0)
    drawn = torch.stack([layer(states, layout)[0].detach() for _ in range(800)])
    assert not torch.equal(drawn[0], drawn[1])
    standard_error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - exact).abs() < 5 * standard_error + 1e-6)[:, :22].all()


def test_a_model_that_does_not_pass_its_mask_on_keeps_padding() -> None:
    model = tiny_model("bert", "AutoModelForSequenceClassification")
    blocks = [model.get_submodule(path) for path in anatomy(model).blocks]
    before = _answers_and_gradients(model, LENGTHS[0])[0]
    own = blocks[1].forward
    blocks[1].forward = lambda states, mask=None, *args, **kwargs: own(states)  # type: ignore[method-assign]
    status = accelerated(model).statuses["unpadded"]
    assert not status.on and status.reason
    blocks[1].forward = own  # type: ignore[method-assign]
    assert torch.equal(_answers_and_gradients(model, LENGTHS[0])[0], before)


def test_gradient_checkpointing_recomputes_the_same() -> None:
    model = tiny_model("bert", "AutoModelForSequenceClassification")
    unpadded(model)
    model.train()
    plain = _answers_and_gradients(model, LENGTHS[0])
    model.activation_checkpointing_enable()
    again = _answers_and_gradients(model, LENGTHS[0])
    assert torch.equal(plain[0], again[0]) and torch.allclose(plain[1], again[1], atol=1e-6)
