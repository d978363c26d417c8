from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.ops import cross_entropy as losses
from tunesmith.kernels.ops.cross_entropy import (
    chunked_cross_entropy,
    chunked_log_probs,
    label_log_probs,
    plain_cross_entropy,
)

FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"label_smoothing": 0.1},
    {"scale": 0.25},
    {"softcap": 3.0},
    {"label_smoothing": 0.2, "scale": 2.0, "softcap": 5.0},
)
SHAPES = ((1, 8, 7), (37, 16, 50), (64, 24, 33), (200, 8, 100), (0, 8, 5))
"""(tokens, hidden, vocabulary)"""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 50 * 40 * 4)
    monkeypatch.setattr(losses, "MIN_CHUNK_TRAINABLE", 48)
    monkeypatch.setattr(losses, "PIECE_ELEMENTS", 500)


def _drawn(shape: tuple[int, int, int], dtype: torch.dtype, *, biased: bool) -> tuple[Any, ...]:
    tokens, hidden, words = shape
    states = torch.randn(tokens, hidden, dtype=dtype)
    weight, bias = torch.randn(words, hidden, dtype=dtype), torch.randn(words, dtype=dtype) if biased else None
    return states, weight, bias, torch.randint(0, words, (tokens,))


def _all(form: Any, given: tuple[Any, ...], learn: tuple[bool, bool, bool], **keys: Any) -> list[Tensor | None]:
    """Return the loss, and the gradients of a third of it for states, weight and bias."""
    *tensors, labels = given
    tensors = [None if t is None else t.clone().requires_grad_(on) for t, on in zip(tensors, learn, strict=True)]
    loss = form(*tensors, labels, **keys)
    (loss / 3).backward()
    return [loss.detach(), *(None if t is None else t.grad for t in tensors)]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("keys", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_are_those_of_the_formula(
    shape: tuple[int, int, int], keys: dict[str, Any], biased: bool
) -> None:
    given = _drawn(shape, torch.float32, biased=biased)
    for learn in ((True, True, True), (True, False, False), (False, True, False)):
        ours, plain = _all(chunked_cross_entropy, given, learn, **keys), _all(plain_cross_entropy, given, learn, **keys)
        torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=1e-6)
        for one, expected in zip(ours[1:], plain[1:], strict=True):
            if expected is None or not shape[0]:
                assert one is None or not one.any()
            else:
                assert one is not None and one.dtype == expected.dtype
                assert torch.dist(one, expected) <= 1e-6 * expected.norm() + 1e-7


def test_in_fp64_all_of_it_is_in_fp64() -> None:
    given = _drawn((37, 16, 50), torch.float64, biased=True)
    ours, plain = (
        _all(form, given, (True, True, True), softcap=2.0) for form in (chunked_cross_entropy, plain_cross_entropy)
    )
    for one, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("keys", [{}, {"scale": 0.25}, {"scale": 2.0, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shares_are_those_of_the_logits(shape: tuple[int, int, int], keys: dict[str, float], biased: bool) -> None:
    states, weight, bias, labels = _drawn(shape, torch.float32, biased=biased)
    logits = (states @ weight.T + (0 if bias is None else bias)) * keys.get("scale", 1.0)
    if "softcap" in keys:
        logits = keys["softcap"] * torch.tanh(logits / keys["softcap"])
    log_probabilities = torch.log_softmax(logits, -1)
    expected = torch.stack([log_probabilities.gather(1, labels[:, None])[:, 0], log_probabilities.amax(1)], 1)
    torch.testing.assert_close(label_log_probs(logits, labels), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(chunked_log_probs(states, weight, bias, labels, **keys), expected, rtol=1e-6, atol=1e-5)


def test_under_autocast_it_is_the_plain_form_under_autocast() -> None:
    given = _drawn((200, 64, 500), torch.float32, biased=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = (_all(form, given, (True, True, False)) for form in (chunked_cross_entropy, plain_cross_entropy))
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=1e-6)
    for one, expected in zip(ours[1:3], plain[1:3], strict=True):
        assert one is not None and expected is not None and one.dtype == torch.float32
        assert torch.dist(one, expected) <= 5e-3 * expected.norm()


def test_a_label_that_has_no_chance_costs_what_it_costs() -> None:
    states, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [300.0]])
    for label, cost in ((0, 300.0), (1, 0.0)):
        assert float(chunked_cross_entropy(states, weight, None, torch.tensor([label]))) == cost


def test_without_gradients_none_are_formed() -> None:
    states, weight, _, labels = _drawn((37, 16, 50), torch.float32, biased=False)
    states.requires_grad_()
    with torch.no_grad():
        loss = chunked_cross_entropy(states, weight, None, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain_cross_entropy(states, weight, None, labels).detach(), rtol=1e-6, atol=0)


def test_a_second_backward_pass_is_refused() -> None:
    states, weight, _, labels = _drawn((5, 6, 9), torch.float32, biased=False)
    loss = chunked_cross_entropy(states.requires_grad_(), weight, None, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward pass"):
        loss.backward()
