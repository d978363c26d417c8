from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerating import accelerated
from torch import Tensor, nn

from tunesmith.kernels import chunked_loss
from tunesmith.kernels.chunked_loss import lm_head_of, logits_at, token_log_probs, token_loss
from tunesmith.testing import FAMILIES, tiny_model
from tunesmith.testing import contract as testing
from tunesmith.training.machine import store_frozen

CAUSAL, MASKED, BOTH = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
FURTHER = {
    "gemma2": FAMILIES["gemma"] | {"final_logit_softcapping": 2.0},
    "granite": FAMILIES["llama"] | {"logits_scaling": 8.0},
    "cohere": FAMILIES["llama"] | {"logit_scale": 0.0625},
    "marian": FAMILIES["bart"],
}
MODELS = [(family, CAUSAL) for family in ("gpt2", "llama", "qwen2", "gemma", "phi", "gemma2", "granite", "cohere")]
MODELS += [(family, MASKED) for family in ("bert", "roberta", "distilbert", "albert", "electra", "modernbert")]
MODELS += [(family, BOTH) for family in ("t5", "bart", "marian")]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "MIN_PARAMETERS", 1)
    for name, keys in FURTHER.items():
        monkeypatch.setitem(testing.FAMILIES, name, keys)


def _asked(model: Any) -> tuple[Any, ...]:
    ids = torch.tensor([[4, 9, 5, 7], [8, 6, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs, torch.tensor([0, 0, 1]), torch.tensor([1, 3, 0]), torch.tensor([11, 3, 60])


def _both(family: str, model_class: str) -> tuple[Any, Any]:
    """Return a plain model, and one whose logits are computed in chunks."""
    plain: Any = tiny_model(family, model_class)
    if family == "marian":
        plain.final_logits_bias.normal_()
    ours = copy.deepcopy(plain)
    assert accelerated(ours, device="mps").statuses["chunked_loss"].on
    return plain, ours


def _loss_and_gradients(model: nn.Module, label_smoothing: float) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = token_loss(model, *_asked(model), label_smoothing)
    (loss / 3).backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "model_class"), MODELS)
def test_shares_of_tokens_are_those_of_their_logits(family: str, model_class: str) -> None:
    plain, ours = _both(family, model_class)
    with torch.inference_mode():
        torch.testing.assert_close(
            token_log_probs(ours, *_asked(ours)), token_log_probs(plain, *_asked(plain)), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("family", "model_class"), MODELS)
def test_the_loss_of_tokens_is_that_of_their_logits(family: str, model_class: str) -> None:
    plain, ours = _both(family, model_class)
    for label_smoothing in (0.0, 0.1):
        loss, gradients = _loss_and_gradients(ours, label_smoothing)
        expected, plain_gradients = _loss_and_gradients(plain, label_smoothing)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        assert gradients.keys() == plain_gradients.keys()
        for name, gradient in plain_gradients.items():
            assert torch.dist(gradients[name], gradient) <= 1e-5 * gradient.norm() + 1e-6, name
    *asked, _ = _asked(ours)
    assert torch.equal(logits_at(ours, *asked), logits_at(plain, *asked))


@pytest.mark.parametrize("bent", [torch.square, lambda logits: 30 * torch.tanh(logits / 30)])
def test_what_no_scale_and_no_cap_of_the_config_explains_keeps_its_logits(bent: Any) -> None:
    model: Any = tiny_model("llama", CAUSAL)
    model.register_forward_hook(lambda _, args, output: output | {"logits": bent(output.logits)})
    assert isinstance(lm_head_of(model), str)


def test_an_output_map_with_something_hooked_to_it_keeps_its_logits() -> None:
    model: Any = tiny_model("llama", CAUSAL)
    model.lm_head.register_forward_hook(lambda _, args, output: output.square())
    assert isinstance(lm_head_of(model), str)


def test_an_output_map_that_is_adapted_or_small_or_absent_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lm_head_of(tiny_model("bert", "AutoModelForSequenceClassification")) is None
    model: Any = tiny_model("llama", CAUSAL)
    monkeypatch.setattr(chunked_loss, "MIN_PARAMETERS", 2**20)
    assert isinstance(lm_head_of(model), str)
    monkeypatch.setattr(chunked_loss, "MIN_PARAMETERS", 1)
    model.lm_head.__class__ = type("Adapted", (nn.Linear,), {})
    assert isinstance(lm_head_of(model), str)


def test_frozen_weights_in_half_precision_are_no_obstacle() -> None:
    model: Any = tiny_model("llama", CAUSAL)
    store_frozen(model.requires_grad_(False), torch.bfloat16)
    assert accelerated(model, torch.bfloat16).statuses["chunked_loss"].on


def test_a_frozen_weight_is_cast_once_and_one_that_changes_again() -> None:
    model: Any = tiny_model("llama", CAUSAL)
    head, output = accelerated(model).lm_head, model.lm_head
    assert head is not None
    model.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=torch.tensor([[3, 4]]))
        (first,) = {head._cast[1].data_ptr()}  # type: ignore[index]
        before = model(input_ids=torch.tensor([[3, 4]])).logits
        assert head._cast[1].data_ptr() == first  # type: ignore[index]
        output.weight.mul_(2)
        torch.testing.assert_close(
            output(torch.ones(1, 32)), torch.ones(1, 32).bfloat16() @ output.weight.bfloat16().t()
        )
    assert before.dtype == torch.bfloat16
