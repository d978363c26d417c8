"""Minimum number of multiply-adds of a training run, and the machine's rate for them.

For each linear layer, the count includes the forward pass in every epoch (once only below all trainable parameters),
the gradient of the input if an earlier layer is trainable, and the gradient of the weight if it is trainable. Attention
has two matrix products forward and four backward. Computations that do not affect the loss are not counted: the last
block computes keys and values at all tokens, and everything else, like the task head or LM head, only at positions with
a loss. Operations other than matrix products (norms, dropout, softmax, AdamW) are not counted, so no implementation
reaches the floor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.models.anatomy import Anatomy

M, K, N = 2048, 768, 3072
"""Sizes of the matrix product that measures the machine: 2048 tokens through the first FFN layer of a BERT."""

SECONDS = 0.5


@dataclass(frozen=True)
class Row:
    """One example: input tokens, decoder tokens of an encoder-decoder (`written`, else 0), positions with a loss."""

    read: int
    written: int
    losses: int


class Model:
    """Structure of a model after its technique is applied, for counting."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, virtual_tokens: int) -> None:
        self.anatomy, self.virtual = anatomy, virtual_tokens
        config: Any = model.config
        self.two_stacks = bool(config.is_encoder_decoder)
        self.causal = self.two_stacks or "causal" in type(model).__name__.lower()
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.order = {name: place for place, name in enumerate(self.parameters)}
        self.learning = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        self.lowest = min(map(anatomy.depth_of, self.learning))
        self.enters = {path for role in ("query", "key", "value") for path in anatomy.roles[role]}
        self.given = {path for role in ("key", "value") for path in anatomy.roles[role]}

    def maps(self) -> dict[str, str]:
        """Return weight name -> linear layer of the base model that it belongs to or adapts."""
        own = {f"{path}.weight": path for path in self.anatomy.linears}
        beside = {
            name: next((path for path in self.anatomy.linears if name.startswith(f"{path}.")), name)
            for name in self.learning
            if self.parameters[name].ndim == 2 and 0 < self.anatomy.depth_of(name) and name not in own
        }
        return own | beside

    def multiply_adds(self, rows: Sequence[Row], epochs: int) -> int:
        """Return the multiply-adds of a whole run."""
        total = 0
        for name, path in self.maps().items():
            weight, depth = self.parameters[name], self.anatomy.depth_of(name)
            after, learns = self._after_learning(name, path), weight.requires_grad
            in_lowest = depth == self.lowest <= len(self.anatomy.blocks)
            passes = (epochs if after or learns or in_lowest else 1) + epochs * (after + learns)
            total += weight.numel() * passes * sum(self._places(path, depth, row) for row in rows)
        for depth, block in enumerate(self.anatomy.blocks, start=1):
            queries = [path for path in self.anatomy.roles["query"] if path.startswith(f"{block}.")]
            for path in queries:
                width = self.parameters[f"{path}.weight"].shape[0]
                passes = 3 * epochs if depth >= self.lowest else 1
                total += 2 * width * passes * sum(self._pairs(path, depth, row) for row in rows)
        return total

    def _after_learning(self, name: str, path: str) -> bool:
        """Return True if a trainable parameter comes before a weight, so that its input needs a gradient."""
        depth = self.anatomy.depth_of(name)
        if self.lowest < depth:
            return True
        before = (other for other in self.learning if self.anatomy.depth_of(other) == depth)
        before = (other for other in before if self.order[other] < self.order[name])
        siblings = self.enters - {path} if path in self.enters else set()  # they share their input
        return any(not any(other.startswith(f"{sibling}.") for sibling in siblings) for other in before)

    def _stack(self, depth: int, row: Row) -> int:
        """Return the number of tokens that a block processes."""
        if self.two_stacks and "decoder" in self.anatomy.blocks[depth - 1]:
            return row.written
        return row.read + self.virtual

    def _places(self, path: str, depth: int, row: Row) -> int:
        """Return the number of tokens that a linear layer processes."""
        last = len(self.anatomy.blocks)
        if path in self.given and _across(path):
            return row.read + self.virtual
        if depth > last or (depth == last and path not in self.given):
            return row.losses
        return self._stack(depth, row)

    def _pairs(self, path: str, depth: int, row: Row) -> int:
        """Return the number of query-key pairs."""
        tokens = self._stack(depth, row)
        queries = row.losses if depth == len(self.anatomy.blocks) else tokens
        if _across(path):
            return queries * (row.read + self.virtual)
        if self.causal and (not self.two_stacks or "decoder" in path):
            return queries * tokens - queries * (queries - 1) // 2  # the last positions; each sees those before it
        return queries * tokens


def _across(path: str) -> bool:
    """Return True if a layer belongs to cross-attention."""
    return "encoder_attn" in path or "EncDecAttention" in path


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the multiply-adds per second of M x K by K x N matrix products, the median over half a second."""
    x: Tensor = torch.randn(M, K, device=device).to(dtype)
    weight: Tensor = torch.randn(N, K, device=device).to(dtype)
    rates: list[float] = []
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until or len(rates) < 3:
        began = time.perf_counter()
        for _ in range(10):
            nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(10 * M * K * N / (time.perf_counter() - began))
    return statistics.median(rates)
