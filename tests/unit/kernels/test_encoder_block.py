"""Blocks in few passes answer and learn as the blocks of the model do, under every technique."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith import registry
from tunesmith.kernels.encoder_block import use_encoder_blocks
from tunesmith.kernels.padding_free import use_padding_free_blocks
from tunesmith.models.anatomy import anatomy
from tunesmith.testing import tiny_model, tiny_tokenizer

LENGTHS = ([12, 3, 7, 7, 1], [5, 5, 5], [9], [1, 2, 3, 40])
FAMILIES = ("bert", "roberta", "distilbert", "electra")
TECHNIQUES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"target_modules": "all-linear"},
    "adapter": {},
    "prefix": {"num_virtual_tokens": 5},
    "prompt": {"num_virtual_tokens": 5},
    "bitfit": {},
    "ia3": {},
    "freeze": {"last_n_blocks": 1},
}


def _batch(lengths: list[int]) -> dict[str, Tensor]:
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(4, 64, (len(lengths), longest), generator=torch.Generator().manual_seed(len(lengths)))
    return {"input_ids": ids * mask, "attention_mask": mask}


def _answers_and_gradients(model: Any, lengths: list[int]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    batch = _batch(lengths)
    logits = model(**batch).logits
    if logits.ndim == 3:
        logits = logits * batch["attention_mask"][:, :, None]
    logits.square().sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _taken(model: Any) -> bool:
    map_ = anatomy(model)
    blocks = [model.get_submodule(path) for path in map_.blocks]
    assert use_padding_free_blocks(model, blocks)
    return use_encoder_blocks(model, blocks, [map_.roles_in(path) for path in map_.blocks])


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_gradients_are_those_of_the_model(family: str, technique: str, head: str) -> None:
    model = tiny_model(family, f"AutoModelFor{head}", num_labels=3)
    torch.manual_seed(0)
    adapt: Any = registry.get("technique", technique)
    adapt(**TECHNIQUES[technique]).apply(model, anatomy(model), tiny_tokenizer())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    padded = [_answers_and_gradients(model, lengths) for lengths in LENGTHS]
    assert _taken(model)
    assert model.tail.reads == ("begin" if head == "SequenceClassification" else "each")
    for lengths, (answers, gradients) in zip(LENGTHS, padded, strict=True):
        ours = _answers_and_gradients(model, lengths)
        assert torch.allclose(ours[0], answers, atol=1e-5, rtol=1e-5)
        assert torch.dist(ours[1], gradients) < 1e-5 * gradients.norm()
