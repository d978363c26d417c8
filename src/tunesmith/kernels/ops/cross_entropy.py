"""Cross-entropy over a large vocabulary, a few tokens at a time, whose gradient is formed in the forward pass; and
what a language model is scored by, as many at a time.

    z = s W h + b,  with a soft cap c: z' = c tanh(z / c)      loss = sum over tokens of -log softmax(z')[label]
    dloss / dz' = softmax(z') - onehot(label)                  (smoothed: (1 - e) onehot + e / V)

What is kept for backward is the gradient of the states (and of W, b where they learn), never (tokens, vocabulary)
numbers: for 500 tokens over 49,152 words those are 100 MB a copy, and four copies. `plain_loss_sum` is the same
formula written plainly. (As Liger and Apple's cut cross-entropy do: arXiv 2410.10989, 2411.09009.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["log_shares", "loss_sum", "plain_loss_sum", "shares_said"]

CHUNK_BYTES = 30 * 2**20
"""Of the logits that are there at once: 320 tokens over 49,152 words in bf16. The weight is repacked for each chunk;
from 32 MiB on the system hands out fresh pages each time, and filling those takes longer than the arithmetic."""

CHUNK_BYTES_OF_GPU = 512 * 2**20
"""There the weight is read twice for each chunk, and pages are no matter."""

CHUNK_IF_WEIGHT_LEARNS = 1024
"""Tokens at least: the gradient of the whole weight is added up once for each chunk."""

PIECE = 2**20
"""Elements that the softmax passes over at a time, in fp32 within the processor's cache."""

ROUND = 16
"""Tokens of a chunk are rounded up to this: oneDNN compiles a kernel for each new shape."""


def shares_said(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, and of the likeliest word in its place.  # (tokens, vocabulary) -> (tokens, 2)"""
    said = torch.stack([logits.gather(1, labels[:, None])[:, 0], logits.amax(1)], 1)
    return said - logits.logsumexp(1, keepdim=True)


@torch.no_grad()
def log_shares(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`shares_said` of the module's logits z', in fp32, without all of them being there at once; works under autocast.

    (tokens, hidden), (vocabulary, hidden) -> (tokens, 2)
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    wide, count, words = torch.promote_types(dtype, torch.float32), len(labels), len(weight)
    found = torch.empty(count, 2, dtype=wide, device=hidden.device)
    with torch.autocast(device, enabled=False):
        states, weight_ = F.pad(hidden.to(dtype), (0, 0, 0, -count % ROUND)), weight.to(dtype)
        rows = _rows_at_once(len(states), words, dtype, device, ROUND)
        logits_ = torch.empty(rows, words, dtype=dtype, device=hidden.device)
        for start in range(0, count, rows):
            own, wanted = states[start : start + rows], labels[start : start + rows]
            logits = torch.mm(own, weight_.t(), out=logits_[: len(own)])
            for piece in _pieces(len(wanted), words, device):
                scores = _scores(logits[: len(wanted)][piece], wide, bias, scale, softcap)
                found[start : start + rows][piece] = shares_said(scores, wanted[piece])
    return found


def _rows_at_once(count: int, words: int, dtype: torch.dtype, device: str, least: int) -> int:
    """Tokens of a chunk."""
    most = CHUNK_BYTES if device == "cpu" else CHUNK_BYTES_OF_GPU
    rows = max(most // dtype.itemsize // words, least)
    return max(1, min(count, rows // ROUND * ROUND))


def _pieces(count: int, words: int, device: str) -> Iterator[slice]:
    """The tokens of a chunk that are passed over at a time."""
    step = max(1, PIECE // words) if device == "cpu" else max(1, count)
    return (slice(first, first + step) for first in range(0, count, step))


def _scores(logits: Tensor, wide: torch.dtype, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Z' of products W h, which are left alone."""
    scores = logits.to(wide, copy=True)
    if bias is not None:
        scores += bias
    if scale != 1:
        scores *= scale
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores


def plain_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The sum of the module's formula, in fp32 from the logits on.  # (tokens, hidden), (vocabulary, hidden)"""
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, reduction="sum", label_smoothing=label_smoothing)


def loss_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """What `plain_loss_sum` gives, and its gradients, without the logits being kept; works under autocast."""
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    found: Tensor = _LossSum.apply(hidden, weight, bias, labels, label_smoothing, scale, softcap)  # type: ignore[no-untyped-call]
    return found


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        label_smoothing: float,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        learns, count, words = ctx.needs_input_grad, len(labels), len(weight)
        with torch.autocast(device, enabled=False):
            states, weight_ = F.pad(hidden.to(dtype), (0, 0, 0, -count % ROUND)), weight.to(dtype)
            least = CHUNK_IF_WEIGHT_LEARNS if learns[1] else ROUND
            rows = _rows_at_once(len(states), words, dtype, device, least)
            logits_ = torch.empty(rows, words, dtype=dtype, device=hidden.device)
            total = torch.zeros((), dtype=wide, device=hidden.device)
            grad_hidden = torch.empty_like(states) if learns[0] else None
            grad_weight: Tensor | None = None
            grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and learns[2] else None
            form = _Losses(bias, grad_bias, label_smoothing, scale, softcap, any(learns))
            for start in range(0, count, rows):
                own, wanted = states[start : start + rows], labels[start : start + rows]
                logits = torch.mm(own, weight_.t(), out=logits_[: len(own)])
                logits[len(wanted) :] = 0  # what rounds up
                for piece in _pieces(len(wanted), words, device):
                    total += form(logits[: len(wanted)][piece], wanted[piece], wide)
                if grad_hidden is not None:
                    torch.mm(logits, weight_, out=grad_hidden[start : start + rows])
                if learns[1]:
                    part = logits.t() @ own
                    grad_weight = part.to(wide) if grad_weight is None else grad_weight.add_(part)
        ctx.grads = None if grad_hidden is None else grad_hidden[:count], grad_weight, grad_bias
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients that forward has formed, given away: a second time there are none."""
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, "a chunked loss has one backward pass"
        pairs = zip(grads, ctx.dtypes, strict=True)
        return (*(None if one is None else one.to(dtype).mul_(grad) for one, dtype in pairs), None, None, None, None)


@dataclass(frozen=True)
class _Losses:
    """From logits to losses and to the logits' gradient, which is left in their place."""

    bias: Tensor | None
    grad_bias: Tensor | None
    label_smoothing: float
    scale: float
    softcap: float | None
    learns: bool

    def __call__(self, logits: Tensor, labels: Tensor, wide: torch.dtype) -> Tensor:
        """The sum of the losses of a few tokens.  # (tokens, vocabulary), (tokens,)"""
        scores, wanted = _scores(logits, wide, self.bias, self.scale, self.softcap), labels[:, None]
        log_shares = torch.log_softmax(scores, -1)
        loss = -(1 - self.label_smoothing) * log_shares.gather(1, wanted).sum()
        if self.label_smoothing:
            loss -= self.label_smoothing * log_shares.mean(1).sum()
        if not self.learns:
            return loss
        grad = log_shares.exp_()
        grad.scatter_add_(1, wanted, grad.new_full(wanted.shape, self.label_smoothing - 1))
        if self.label_smoothing:
            grad -= self.label_smoothing / grad.shape[1]
        if self.softcap is not None:
            grad *= scores.div_(self.softcap).square_().neg_().add_(1)
        if self.scale != 1:
            grad *= self.scale
        if self.grad_bias is not None:
            self.grad_bias.add_(grad.sum(0))
        logits.copy_(grad)
        return loss
