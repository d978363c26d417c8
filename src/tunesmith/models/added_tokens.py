"""Tokens that a recipe adds to the vocabulary: separate trainable rows next to the frozen embedding.

    look-up: E[id] for an old token, N[id - first] for a new one        output: x [E; N]^T

E (V, d) belongs to the base. N (n, d) is trained under every technique and saved; a tied output layer shares it. Each
row of N is initialized to the mean of the old rows, so that old tokens lose only about n / V of their probability
(Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html). N has no padding rows, and E keeps its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.errors import RecipeError, shorten

ROWS = "added"
"""Name of the parameter N in a module."""

LEARNING_RATE = 5e-3
"""Minimum for N; at lower learning rates its rows stay close to the mean (docs/tasks/text-generation.md)."""


def add(processor: Any, tokens: Sequence[str]) -> None:
    """Add tokens to the tokenizer.

    Raises:
        RecipeError: a token is empty, repeated, has spaces around it, or exists already.
    """
    known, where = processor.get_vocab() if tokens else {}, "task.add_tokens"
    for number, token in enumerate(tokens):
        if not token or token != token.strip() or token in tokens[:number]:
            what = (
                f"{shorten(token)} is repeated" if token.strip() == token else f"{shorten(token)} has spaces around it"
            )
            raise RecipeError(f"{where}: {what}", hint="give each token once, without surrounding spaces")
        if token in known:
            raise RecipeError(f"{where}: {shorten(token)} is already a token of this model", hint="remove it")
    if tokens:
        processor.add_tokens(list(tokens))


def ids(processor: Any, tokens: Sequence[str]) -> range:
    """Return the contiguous ids of added tokens; empty if they have not been added."""
    known = processor.get_vocab() if tokens else {}
    numbers = [known.get(token, -1) for token in tokens]
    contiguous = range(numbers[0], numbers[0] + len(numbers)) if numbers and numbers[0] >= 0 else range(0)
    return contiguous if numbers == list(contiguous) else range(0)


def extend(model: Any, added: range) -> None:
    """Add rows for these ids to a model, in place; tied weights share them.

    Raises:
        RecipeError: encoder and decoder have different vocabularies.
    """
    if not added:
        return
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    if added.start > len(table.weight):
        what = f"model: its tokenizer has {added.start:,} tokens, its embedding {len(table.weight):,}"
        raise RecipeError(what, hint="the tokenizer belongs to another model")
    if model.config.is_encoder_decoder and model.get_decoder().get_input_embeddings().weight is not table.weight:
        what = "task.add_tokens: encoder and decoder of this model have different vocabularies"
        raise RecipeError(what, hint="remove the key")
    weights = [table.weight] if output is None or output.weight is table.weight else [table.weight, output.weight]
    users = [[module for module in model.modules() if getattr(module, "weight", None) is weight] for weight in weights]
    for weight, modules in zip(weights, users, strict=True):
        mean = weight.detach()[: added.start].mean(0, dtype=torch.float32)
        rows = nn.Parameter(mean.repeat(len(added), 1))
        for module in modules:
            module.added_ids = added
            module.register_parameter(ROWS, rows)
            kind: type = type(module)
            module.__class__ = _with_rows(kind)
    _fit_bias_of_logits(model, max(len(table.weight), added.stop))


def rows(model: Any) -> int:
    """Return the number of tokens that the model has embeddings for."""
    table = model.get_input_embeddings()
    return max(len(table.weight), getattr(table, "added_ids", range(0)).stop)


def has_bias(model: Any) -> bool:
    """Return whether the output layer of a model with added tokens has a bias."""
    return any(getattr(module, "bias", None) is not None for _, module in _extended(model))


@torch.no_grad()
def fold(model: Any) -> None:
    """Merge the rows into ordinary embeddings and output layers, in place."""
    extended = list(_extended(model))
    if not extended:
        return
    added: range = extended[0][1].added_ids
    kept = {path: (getattr(module, ROWS).detach(), len(module.weight)) for path, module in extended}
    for _, module in extended:
        delattr(module, ROWS)
        del module.added_ids
        module.__class__ = type(module).__mro__[2]
    if added.stop > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(added.stop, mean_resizing=False)
    for path, (new, _) in kept.items():
        module = model.get_submodule(path)
        module.weight[added.start : added.stop] = new.to(module.weight.dtype)
        if getattr(module, "bias", None) is not None:
            module.bias[added.start : added.stop] = 0


def _extended(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return (
        (path, module) for path, module in model.named_modules() if isinstance(module, _EmbeddingRows | _OutputRows)
    )


def _fit_bias_of_logits(model: Any, size: int) -> None:
    """Extend the buffer that BART-like models add to the logits."""
    bias = getattr(model, "final_logits_bias", None)
    if isinstance(bias, Tensor):
        model.final_logits_bias = F.pad(bias, (0, size - bias.shape[-1]))


@lru_cache(maxsize=64)
def _with_rows(kind: type) -> type:
    """Return a subclass with added rows, under the name of the module's class."""
    mixin = _EmbeddingRows if issubclass(kind, nn.Embedding) else _OutputRows
    return type(kind.__name__, (mixin, kind), {})


class _EmbeddingRows:
    """Mixin of an embedding: looks up new ids in N."""

    added: Tensor
    added_ids: range

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Embedding's name
        """Return rows of E or N."""  # (...) -> (..., width)
        index = input - self.added_ids.start
        new = (index >= 0) & (index < len(self.added_ids))
        old: Tensor = super().forward(input.masked_fill(new, 0))  # type: ignore[misc]
        added = F.embedding(index.clamp(0, len(self.added_ids) - 1), self.added)
        scale = getattr(self, "embed_scale", 1.0)  # factor of scaled embeddings
        return torch.where(new[..., None], (added * scale).to(old.dtype), old)


class _OutputRows:
    """Mixin of an output layer: returns the logits of new tokens at their ids."""

    added: Tensor
    added_ids: range

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """Return the logits of old and new tokens."""  # (..., width) -> (..., tokens)
        old: Tensor = super().forward(input)  # type: ignore[misc]
        new = F.linear(input, self.added.to(input.dtype)).to(old.dtype)
        return torch.cat([old[..., : self.added_ids.start], new, old[..., self.added_ids.stop :]], -1)
