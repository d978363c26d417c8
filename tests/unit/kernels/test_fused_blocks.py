"""Fused blocks give the outputs and gradients of the model's blocks under every technique."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerating import accelerated
from adapting import TECHNIQUES, VARIANTS, adapt
from torch import Tensor

from tunesmith import registry
from tunesmith.kernels import block_pattern
from tunesmith.kernels.chunked_loss import logits_at
from tunesmith.kernels.fast_path import fast_path
from tunesmith.models.anatomy import anatomy
from tunesmith.testing import tiny_model

LENGTHS = ([12, 3, 7, 7, 1], [5, 5, 5], [9], [1, 2, 3, 40])
FAMILIES = ("bert", "roberta", "distilbert", "electra", "modernbert", "gpt2", "llama", "mistral", "qwen2", "phi3")
READ_AT_THE_END = ("gpt2", "llama", "mistral", "qwen2", "phi3")
NOT_THERE = {"llama": ("bitfit",), "mistral": ("bitfit",), "phi3": ("bitfit",), "modernbert": ("bitfit",)}
"""Techniques that do not apply to a family."""


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


def _fused(model: Any) -> bool:
    status = accelerated(model).statuses
    assert status["unpadded"].on
    return status["fused_blocks"].blocks == anatomy(model).blocks


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_gradients_are_those_of_the_model(family: str, technique: str, head: str) -> None:
    if technique in NOT_THERE.get(family, ()):
        pytest.skip("it has no biases")
    model = tiny_model(family, f"AutoModelFor{head}", num_labels=3, sliding_window=4, pad_token_id=0)
    adapt(model, technique)
    padded = [_answers_and_gradients(model, lengths) for lengths in LENGTHS]
    assert _fused(model)
    read = "end" if family in READ_AT_THE_END else "begin"
    assert fast_path(model).last_block.reads == (read if head == "SequenceClassification" else "each")
    for lengths, (answers, gradients) in zip(LENGTHS, padded, strict=True):
        ours = _answers_and_gradients(model, lengths)
        assert torch.allclose(ours[0], answers, atol=1e-5, rtol=1e-5)
        assert torch.dist(ours[1], gradients) < 1e-5 * gradients.norm()


def test_a_head_that_takes_an_end_for_padding_reads_what_it_read() -> None:
    """Qwen's tokenizers may end a text with the padding token: the head reads the last other token."""
    model: Any = tiny_model("qwen2", "AutoModelForSequenceClassification", num_labels=3, pad_token_id=0)
    batch = _batch([12, 3, 7])
    batch["input_ids"][torch.arange(3), torch.tensor([11, 2, 6])] = 0
    expected = model(**batch).logits
    assert _fused(model) and fast_path(model).last_block.reads == "end"
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("technique", ["prompt", "prefix"])
def test_without_what_stands_before_a_text_it_answers_as_the_base(family: str, technique: str) -> None:
    heads = {"bert": "MaskedLM", "llama": "CausalLM"}
    model: Any = tiny_model(family, f"AutoModelFor{heads[family]}", pad_token_id=0)
    batch, row, place = _batch([12, 3, 7]), torch.tensor([0, 1, 2, 2]), torch.tensor([11, 2, 0, 6])
    expected = logits_at(model, batch, row, place)
    adapt(model, technique)
    assert _fused(model)
    assert not torch.allclose(logits_at(model, batch, row, place), expected, atol=1e-3)
    with registry.get("technique", technique)().disabled(model):  # type: ignore[attr-defined]
        torch.testing.assert_close(logits_at(model, batch, row, place), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("technique", "keys"), VARIANTS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "qwen2"])
def test_whatever_a_technique_is_told_all_of_it_learns(family: str, technique: str, keys: dict[str, Any]) -> None:
    model: Any = tiny_model(family, "AutoModelForSequenceClassification", num_labels=3, pad_token_id=0)
    adapt(model, technique, keys)
    answers, gradients = _answers_and_gradients(model, LENGTHS[0])
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    _fused(model)  # may have no effect: some techniques do not allow it
    ours = _answers_and_gradients(model, LENGTHS[0])
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == without
    torch.testing.assert_close(ours[0], answers, atol=1e-5, rtol=1e-5)
    assert torch.dist(ours[1], gradients) < 1e-5 * gradients.norm()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_loss_of_few_tokens_computes_the_last_block_there_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, "AutoModelForCausalLM" if family == "llama" else "AutoModelForMaskedLM")
    batch, row, place = _batch([12, 3, 7]), torch.tensor([2, 0, 0]), torch.tensor([1, 11, 4])
    expected = model(**batch).logits[row, place]
    assert _fused(model)
    seen: list[int] = []
    apply_linears = block_pattern.apply_linears

    def watched(x: Tensor, *modules: Any, **how: Any) -> tuple[Tensor, ...]:
        seen.append(len(x))
        return apply_linears(x, *modules, **how)

    monkeypatch.setattr(block_pattern, "apply_linears", watched)
    found = logits_at(model, batch, row, place)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert seen[-1] == 3, "the MLP sees three tokens"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_is_computed_again_in_the_backward_pass_is_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model(family, "AutoModelForSequenceClassification", num_labels=3, pad_token_id=0)
    assert _fused(model)
    model.train()
    for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.2
    found, called = [], [0]
    attend = block_pattern.attend

    def counted(*args: Any, **how: Any) -> Tensor:
        called[0] += 1
        return attend(*args, **how)

    monkeypatch.setattr(block_pattern, "attend", counted)
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(0)
        found.append(_answers_and_gradients(model, [12, 3, 7, 7, 1]))
    assert called == [3 * len(anatomy(model).blocks)], "once, and then twice"
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("where", ["attn_pdrop", "resid_pdrop"])
def test_dropout_falls_where_gpt2_has_it(where: str) -> None:
    """Mean and standard deviation of the outputs over draws equal those of the model's blocks."""
    model, found = tiny_model("gpt2", "AutoModelForCausalLM", **{where: 0.3}), []
    batch = {name: one.repeat(800, 1) for name, one in _batch([5, 3]).items()}
    model.train()
    for taken in (False, True):
        assert not taken or _fused(model)
        torch.manual_seed(0)
        with torch.no_grad():
            drawn = model(**batch).logits[batch["attention_mask"] == 1].view(800, 8, -1)
        assert not torch.equal(drawn[0, 7], drawn[1, 7])
        found.append((drawn.mean(0), drawn.std(0)))
    (mean, spread), (ours, our_spread) = found
    assert ((ours - mean).abs() < 5 * spread * (2 / 800) ** 0.5 + 1e-6).all()
    assert ((our_spread - spread).abs() < 0.25 * spread + 1e-6).all()


def test_dropout_that_the_formula_has_no_place_for_keeps_a_block_its_own_way() -> None:
    assert _fused(tiny_model("llama", "AutoModelForCausalLM"))
    assert not _fused(tiny_model("llama", "AutoModelForCausalLM", attention_dropout=0.1))
    model = tiny_model("bert", "AutoModelForMaskedLM")
    model.get_submodule(anatomy(model).blocks[0]).more = torch.nn.Dropout(0.1)
    assert not _fused(model)
