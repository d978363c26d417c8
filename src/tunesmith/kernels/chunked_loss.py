"""The last map of a language model, which can be asked for a loss, or for scores, instead of logits
(`kernels/ops/cross_entropy.py`).

What a model does to the numbers that its last map gives out (a scale, a bias, a soft cap) is found by giving it
others in their place: `use_chunked_loss` takes the map only where one of these explains what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.kernels.logits import logits_at
from tunesmith.kernels.ops.cross_entropy import log_shares, loss_sum, shares_said

__all__ = ["Vocabulary", "token_loss", "token_shares", "use_chunked_loss"]

WORTH_IT = 2**20
"""Weights from which it is worth it."""


class Vocabulary(nn.Linear):
    """The last map of a language model, which can be asked for what is made of its logits instead of these."""

    scale: float
    softcap: float | None
    shift: Tensor | None
    """What the model adds to what this map gives.  # (vocabulary,)"""

    asked: Callable[..., Tensor] | None = None
    """(hidden, weight, bias, scale=, softcap=) -> what is wanted."""

    given: Tensor | None = None
    cast: tuple[Any, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """(..., hidden) -> (..., vocabulary), or, asked for something else, nothing worth having."""
        weight = self._multiplied(input.device.type)
        if self.asked is None:
            return F.linear(input, weight, self.bias)
        self.given = self.asked(input.flatten(0, -2), weight, self._shifted(), scale=self.scale, softcap=self.softcap)
        return input.new_zeros(1, 1, 1)

    def _shifted(self) -> Tensor | None:
        """All that is added to the products."""
        shift = None if self.shift is None else self.shift.to(self.weight.device)
        if self.bias is None or shift is None:
            return self.bias if shift is None else shift
        return self.bias + shift

    @contextmanager
    def instead_of_logits(self, ask: Callable[..., Tensor]) -> Iterator[None]:
        """For a while what `ask` makes of its input is `given`."""
        self.asked, self.given = ask, None
        try:
            yield
        finally:
            self.asked = None

    def _multiplied(self, device: str) -> Tensor:
        """The weight; one that is frozen as autocast wants it, cast once."""
        if self.weight.requires_grad or not torch.is_autocast_enabled(device):
            return self.weight
        weight, dtype = self.weight.detach(), torch.get_autocast_dtype(device)
        if weight.dtype == dtype:
            return weight
        key = (dtype, weight.device, weight.data_ptr(), self.weight._version)
        if self.cast is None or self.cast[0] != key:
            self.cast = key, weight.to(dtype)
        return self.cast[1]


def token_loss(
    model: Any, inputs: dict[str, Any], row: Tensor, place: Tensor, labels: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """The sum of the cross-entropies of the tokens at (row, place), each against its label."""
    ask = partial(loss_sum, labels=labels, label_smoothing=label_smoothing)
    if (given := _given(model, inputs, row, place, ask)) is not None:
        return given
    logits = logits_at(model, inputs, row, place)
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)


def token_shares(model: Any, inputs: dict[str, Any], row: Tensor, place: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the label of each token at (row, place), and of the likeliest word there."""  # (tokens, 2)
    given = _given(model, inputs, row, place, partial(log_shares, labels=labels))
    return shares_said(logits_at(model, inputs, row, place), labels) if given is None else given


def _given(model: Any, inputs: dict[str, Any], row: Tensor, place: Tensor, ask: Callable[..., Tensor]) -> Tensor | None:
    """What the model's last map makes of these tokens; None where it can only be asked for logits."""
    output = model.get_output_embeddings()
    if not isinstance(output, Vocabulary):
        return None
    with output.instead_of_logits(ask):
        logits_at(model, inputs, row, place)
    assert output.given is not None, "the model has not called its output map"
    given, output.given = output.given, None  # a graph hangs on it
    return given


def use_chunked_loss(model: Any) -> bool:
    """Let a language model's last map be asked for losses, in place; whether it is."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if type(output) is not nn.Linear or output.weight.numel() < WORTH_IT or output._forward_hooks:
        return False
    found = _after(model, output)
    if found is None:
        return False
    output.__class__ = Vocabulary
    output.scale, output.softcap, output.shift = found  # type: ignore[assignment]
    return True


@torch.no_grad()
def _after(model: Any, output: nn.Linear) -> tuple[float, float | None, Tensor | None] | None:
    """The scale, soft cap and shift that a model lays upon what its last map gives; None where that is not all."""
    given = torch.linspace(-100, 100, output.out_features, device=output.weight.device)
    plus, minus = (_logits(model, output, one) for one in (given, -given))
    if plus is None or minus is None:
        return None
    shift, odd = (plus + minus) / 2, (plus - minus) / 2
    scale, softcap = float(odd[-1] / given[-1]), getattr(model.config, "final_logit_softcapping", None)
    shifted = bool(shift.abs().max() > 1e-3)
    if torch.allclose(odd, given, rtol=1e-4, atol=1e-3):
        return 1.0, None, shift if shifted else None
    if not shifted and torch.allclose(odd, scale * given, rtol=1e-4, atol=1e-3):
        return scale, None, None
    if not shifted and softcap and torch.allclose(odd, softcap * torch.tanh(given / softcap), rtol=1e-4, atol=1e-3):
        return 1.0, float(softcap), None
    return None


def _logits(model: Any, output: nn.Linear, given: Tensor) -> Tensor | None:
    """The logits that a model makes of a row of numbers given in the place of its last map's."""  # (vocabulary,)
    hook = output.register_forward_hook(lambda *_: given.to(output.weight.dtype)[None, None])
    ids = torch.ones(1, 1, dtype=torch.long, device=output.weight.device)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    was_training = model.training
    model.eval()
    try:
        found: Tensor = model(input_ids=ids, **more).logits.float()
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    finally:
        hook.remove()
        model.train(was_training)
    return found[0, 0] if found.shape == (1, 1, len(given)) else None
