"""Loss and scores of a language model at chosen tokens, without logits of all tokens (`ops/cross_entropy.py`).

Over a vocabulary of 30,000 the LM head costs more than the blocks. `logits_at` applies it to the chosen tokens alone.
`token_loss` and `token_log_probs` stop the forward pass at the LM head and continue from the hidden states.

A model may scale its logits, add a bias, or apply a soft cap. `lm_head_of` detects this by replacing the LM head's
output by known numbers. It returns an `LMHead` only if one of the three explains the model's logits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.kernels.edits import set_mode
from tunesmith.kernels.fast_path import fast_path
from tunesmith.kernels.ops.cross_entropy import chunked_cross_entropy, chunked_log_probs, label_log_probs

__all__ = [
    "IGNORE_INDEX",
    "LMHead",
    "hidden_at",
    "lm_head_of",
    "logits_at",
    "shift_tokens_right",
    "token_log_probs",
    "token_loss",
]

IGNORE_INDEX = -100
"""Padding of labels in transformers."""

MIN_PARAMETERS = 2**20
"""Minimum number of weights of an LM head for which the chunked loss is used."""


@dataclass
class LMHead:
    """A language model's LM head, and the scale, soft cap and bias that turn its output into logits."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None
    shift: Tensor | None = None
    """Bias that the model adds outside the layer.  # (vocabulary,)"""

    _cast: tuple[Any, Tensor] | None = field(default=None, repr=False)

    def forward(self, _: nn.Module, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """Return the output of the layer; a frozen weight is cast to the autocast dtype only once."""
        return F.linear(input, self.weight(), self.linear.bias)

    def weight(self) -> Tensor:
        """Return the weight; a frozen one is in the autocast dtype."""
        weight, device = self.linear.weight, self.linear.weight.device.type
        if weight.requires_grad or not torch.is_autocast_enabled(device):
            return weight
        frozen, dtype = weight.detach(), torch.get_autocast_dtype(device)
        if frozen.dtype == dtype:
            return frozen
        key = (dtype, weight.device, frozen.data_ptr(), weight._version)
        if self._cast is None or self._cast[0] != key:
            self._cast = key, frozen.to(dtype)
        return self._cast[1]

    def bias(self) -> Tensor | None:
        """Return the sum of both biases."""
        shift = None if self.shift is None else self.shift.to(self.linear.weight.device)
        if self.linear.bias is None or shift is None:
            return self.linear.bias if shift is None else shift
        return self.linear.bias + shift

    def loss(self, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the summed cross-entropy.  # (tokens, hidden), (tokens,)"""
        how: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "label_smoothing": label_smoothing}
        return chunked_cross_entropy(hidden, self.weight(), self.bias(), labels, **how)

    def log_probs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the log-probability of each label and of the most likely token.  # (tokens, 2)"""
        return chunked_log_probs(hidden, self.weight(), self.bias(), labels, scale=self.scale, softcap=self.softcap)


class _Reached(Exception):
    """The forward pass has reached the LM head."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def hidden_at(model: Any, head: LMHead, inputs: dict[str, Any], row: Tensor, position: Tensor) -> Tensor:
    """Run a model up to its LM head; return the hidden states of the tokens at (row, position).  # (tokens, hidden)"""

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args[0][row, position])

    handle = head.linear.register_forward_pre_hook(stop)
    try:
        with _reading_only(model, row, position):
            model(**inputs)
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise AssertionError("the model has not called its LM head")


def logits_at(model: Any, inputs: dict[str, Any], row: Tensor, position: Tensor) -> Tensor:
    """Return the logits in fp32 of the tokens at (row, position) of the LM head's input."""  # (tokens, vocabulary)

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][row, position][None], *args[1:])  # (1, tokens, hidden)

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        with _reading_only(model, row, position):
            logits: Tensor = model(**inputs).logits[0].float()
    finally:
        handle.remove()
    return logits


def _reading_only(model: Any, row: Tensor, position: Tensor) -> AbstractContextManager[None]:
    """Let the last block compute only these positions, if it has a fast path for that."""
    last_block = fast_path(model).last_block
    return nullcontext() if last_block is None else last_block.only(row, position)


def token_loss(
    model: Any, inputs: dict[str, Any], row: Tensor, position: Tensor, labels: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Return the sum of the cross-entropies of the tokens at (row, position), each against its label."""
    head = fast_path(model).lm_head
    if head is not None:
        return head.loss(hidden_at(model, head, inputs, row, position), labels, label_smoothing)
    logits = logits_at(model, inputs, row, position)
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)


def token_log_probs(model: Any, inputs: dict[str, Any], row: Tensor, position: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of the label of each token at (row, position), and of the most likely token there."""
    # (tokens, 2)
    head = fast_path(model).lm_head
    if head is not None:
        return head.log_probs(hidden_at(model, head, inputs, row, position), labels)
    return label_log_probs(logits_at(model, inputs, row, position), labels)


def shift_tokens_right(model: Any, labels: Tensor) -> Tensor:
    """Return a decoder's input for labels (padded by -100), shifted as the model's family shifts them."""
    # (targets, tokens)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return shifted
    start = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)  # M2M-100, NLLB, Blenderbot
    moved = torch.cat([start, labels[:, :-1]], 1)
    return moved.masked_fill(moved == IGNORE_INDEX, model.config.pad_token_id)


# --- detection of scale, bias and soft cap


def lm_head_of(model: Any) -> LMHead | str | None:
    """Return a model's LM head, the reason why its loss needs logits, or None for a model without an LM head."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is None:
        return None
    if type(output) is not nn.Linear:
        return f"the LM head is a {type(output).__name__}"
    if output.weight.numel() < MIN_PARAMETERS:
        return f"the LM head has fewer than {MIN_PARAMETERS:,} weights"
    if output._forward_hooks or output._forward_pre_hooks:
        return "the LM head has hooks"
    return _fit_head(model, output)


@torch.no_grad()
def _fit_head(model: Any, output: nn.Linear) -> LMHead | str:
    """Return the LM head with the scale, soft cap or bias that explains the model's logits; a reason if none does."""
    values = torch.linspace(-100, 100, output.out_features, device=output.weight.device)
    plus, minus = (_logits_for(model, output, one) for one in (values, -values))
    if plus is None or minus is None:
        return "the model does not return one logit per output of its LM head"
    shift, odd = (plus + minus) / 2, (plus - minus) / 2
    scale, softcap = float(odd[-1] / values[-1]), getattr(model.config, "final_logit_softcapping", None)
    shifted = bool(shift.abs().max() > 1e-3)
    if torch.allclose(odd, values, rtol=1e-4, atol=1e-3):
        return LMHead(output, shift=shift if shifted else None)
    if not shifted and torch.allclose(odd, scale * values, rtol=1e-4, atol=1e-3):
        return LMHead(output, scale=scale)
    if not shifted and softcap and torch.allclose(odd, softcap * torch.tanh(values / softcap), rtol=1e-4, atol=1e-3):
        return LMHead(output, softcap=float(softcap))
    return "neither a scale nor a bias nor the soft cap of its config explains the model's logits"


def _logits_for(model: Any, output: nn.Linear, values: Tensor) -> Tensor | None:
    """Return a model's logits if `values` replaces the output of its LM head."""  # (vocabulary,)
    handle = output.register_forward_hook(lambda *_: values[None, None])
    ids = torch.ones(1, 1, dtype=torch.long, device=output.weight.device)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    try:
        with set_mode(model, training=False):
            logits: Tensor = model(input_ids=ids, **more).logits.float()
    finally:
        handle.remove()
    return logits[0, 0] if logits.shape == (1, 1, len(values)) else None
