"""Cross-entropy and log-probabilities over a large vocabulary in chunks of tokens.

    z = s W h + b,  with a soft cap c: z' = c tanh(z / c)      loss = sum over tokens of -log softmax(z')[label]
    dloss / dz' = softmax(z') - onehot(label)                  (smoothed: (1 - e) onehot + e / V)

The forward pass computes the gradient of the hidden states (and of trainable W and b), so that no tensor of (tokens,
vocabulary) is ever kept: for 500 tokens over 49,152 words each would take 100 MB, and plain PyTorch keeps four. Liger
(arXiv 2410.10989) and Apple's cut cross-entropy (arXiv 2411.09009) do the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.ops.linear import compute_dtype

__all__ = ["chunked_cross_entropy", "chunked_log_probs", "label_log_probs", "plain_cross_entropy"]

CHUNK_BYTES = 30 * 2**20
"""Size of the logits of one chunk: 320 tokens over 49,152 words in bf16. Larger chunks repack the weight less often;
but from 32 MiB on each chunk gets new memory pages, and filling these takes longer than the arithmetic."""

GPU_CHUNK_BYTES = 512 * 2**20
"""The same on a GPU: larger, because each chunk reads the weight twice, and PyTorch's allocator reuses memory."""

MIN_CHUNK_TRAINABLE = 1024
"""Minimum tokens of a chunk if the weight is trainable: each chunk adds to the gradient of the whole weight."""

PIECE_ELEMENTS = 2**20
"""Elements per softmax call, so that fp32 scores stay in the processor's cache."""

ROUND_TOKENS = 16
"""Token counts of chunks are multiples of this: oneDNN compiles a kernel for each new shape."""


def label_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of each label and of the most likely token.  # (tokens, vocabulary) -> (tokens, 2)"""
    scores = torch.stack([logits.gather(1, labels[:, None])[:, 0], logits.amax(1)], 1)
    return scores - logits.logsumexp(1, keepdim=True)


@torch.no_grad()
def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the result of `label_log_probs` in fp32, in chunks of tokens; works under autocast.

    (tokens, hidden), (vocabulary, hidden) -> (tokens, 2)
    """
    device, dtype = hidden.device.type, compute_dtype(hidden)
    wide, count, words = torch.promote_types(dtype, torch.float32), len(labels), len(weight)
    log_probs = torch.empty(count, 2, dtype=wide, device=hidden.device)
    with torch.autocast(device, enabled=False):
        states, weight_ = F.pad(hidden.to(dtype), (0, 0, 0, -count % ROUND_TOKENS)), weight.to(dtype)
        rows = _rows_at_once(len(states), words, dtype, device, ROUND_TOKENS)
        logits_ = torch.empty(rows, words, dtype=dtype, device=hidden.device)
        for start in range(0, count, rows):
            own, targets = states[start : start + rows], labels[start : start + rows]
            logits = torch.mm(own, weight_.t(), out=logits_[: len(own)])
            for piece in _pieces(len(targets), words, device):
                scores = _scores(logits[: len(targets)][piece], wide, bias, scale, softcap)
                log_probs[start : start + rows][piece] = label_log_probs(scores, targets[piece])
    return log_probs


def _rows_at_once(count: int, words: int, dtype: torch.dtype, device: str, min_rows: int) -> int:
    """Return the number of tokens per chunk."""
    max_bytes = CHUNK_BYTES if device == "cpu" else GPU_CHUNK_BYTES
    rows = max(max_bytes // dtype.itemsize // words, min_rows)
    return max(1, min(count, rows // ROUND_TOKENS * ROUND_TOKENS))


def _pieces(count: int, words: int, device: str) -> Iterator[slice]:
    """Cut the tokens of a chunk into pieces for the softmax."""
    step = max(1, PIECE_ELEMENTS // words) if device == "cpu" else max(1, count)
    return (slice(first, first + step) for first in range(0, count, step))


def _scores(logits: Tensor, wide: torch.dtype, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Return z' for products W h, which stay unchanged."""
    scores = logits.to(wide, copy=True)
    if bias is not None:
        scores += bias
    if scale != 1:
        scores *= scale
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores


def plain_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the summed loss by the plain formula, in fp32 from the logits on.

    # (tokens, hidden), (vocabulary, hidden)
    """
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, reduction="sum", label_smoothing=label_smoothing)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the result of `plain_cross_entropy`, with gradients, in chunks of tokens; works under autocast."""
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    loss: Tensor = _ChunkedLoss.apply(hidden, weight, bias, labels, label_smoothing, scale, softcap)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedLoss(torch.autograd.Function):
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
        device, dtype = hidden.device.type, compute_dtype(hidden)
        wide = torch.promote_types(dtype, torch.float32)
        needs, count, words = ctx.needs_input_grad, len(labels), len(weight)
        with torch.autocast(device, enabled=False):
            states, weight_ = F.pad(hidden.to(dtype), (0, 0, 0, -count % ROUND_TOKENS)), weight.to(dtype)
            min_rows = MIN_CHUNK_TRAINABLE if needs[1] else ROUND_TOKENS
            rows = _rows_at_once(len(states), words, dtype, device, min_rows)
            logits_ = torch.empty(rows, words, dtype=dtype, device=hidden.device)
            total = torch.zeros((), dtype=wide, device=hidden.device)
            grad_hidden = torch.empty_like(states) if needs[0] else None
            grad_weight: Tensor | None = None
            grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None
            losses = _Losses(bias, grad_bias, label_smoothing, scale, softcap, any(needs))
            for start in range(0, count, rows):
                own, targets = states[start : start + rows], labels[start : start + rows]
                logits = torch.mm(own, weight_.t(), out=logits_[: len(own)])
                logits[len(targets) :] = 0  # rows of padding
                for piece in _pieces(len(targets), words, device):
                    total += losses(logits[: len(targets)][piece], targets[piece], wide)
                if grad_hidden is not None:
                    torch.mm(logits, weight_, out=grad_hidden[start : start + rows])
                if needs[1]:
                    part = logits.t() @ own
                    grad_weight = part.to(wide) if grad_weight is None else grad_weight.add_(part)
        ctx.grads = None if grad_hidden is None else grad_hidden[:count], grad_weight, grad_bias
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients that the forward pass computed, once."""
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, "a chunked loss has one backward pass"
        pairs = zip(grads, ctx.dtypes, strict=True)
        return (*(None if one is None else one.to(dtype).mul_(grad) for one, dtype in pairs), None, None, None, None)


@dataclass(frozen=True)
class _Losses:
    """Compute losses, and write the gradient of the logits in their place."""

    bias: Tensor | None
    grad_bias: Tensor | None
    label_smoothing: float
    scale: float
    softcap: float | None
    needs_grad: bool

    def __call__(self, logits: Tensor, labels: Tensor, wide: torch.dtype) -> Tensor:
        """Return the sum of the losses of a few tokens.  # (tokens, vocabulary), (tokens,)"""
        scores, targets = _scores(logits, wide, self.bias, self.scale, self.softcap), labels[:, None]
        log_probs = torch.log_softmax(scores, -1)
        loss = -(1 - self.label_smoothing) * log_probs.gather(1, targets).sum()
        if self.label_smoothing:
            loss -= self.label_smoothing * log_probs.mean(1).sum()
        if not self.needs_grad:
            return loss
        grad = log_probs.exp_()
        grad.scatter_add_(1, targets, grad.new_full(targets.shape, self.label_smoothing - 1))
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
