"""Tokens that a recipe adds to a vocabulary: rows of their own beside a table that stays.

    look-up: E[id] for an old token, N[id - first] for a new one        output: x [E; N]^T

E (V, d) is the base's, N (n, d) learns under every technique, with E's scale, and alone of the two is saved; an output
tied to the input shares N too. Each row of N starts as the mean of the old ones, so that what the model said of old
tokens keeps all but the share of about n / V (Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html). No row is
added that no token has: products with E keep their size, whatever n is.
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
"""What N is called in the modules that have one."""

LEARNING_RATE = 5e-3
"""Of N, at least: at the rates of pretrained weights its rows hardly leave the mean (docs/tasks/text-generation.md)."""


def add(processor: Any, tokens: Sequence[str]) -> None:
    """Let the tokenizer read each of these as one token.

    Raises:
        RecipeError: one of them is no word, or a token of the model's own.
    """
    known, where = processor.get_vocab() if tokens else {}, "task.add_tokens"
    for number, token in enumerate(tokens):
        if not token or token != token.strip() or token in tokens[:number]:
            what = (
                f"{shorten(token)} is there twice" if token.strip() == token else f"{shorten(token)} has blanks around"
            )
            raise RecipeError(f"{where}: {what}", hint="give each once, without blanks before and behind it")
        if token in known:
            raise RecipeError(f"{where}: {shorten(token)} is a token of this model already", hint="leave it out")
    if tokens:
        processor.add_tokens(list(tokens))


def ids(processor: Any, tokens: Sequence[str]) -> range:
    """The ids of added tokens, which stand one behind the other; empty where they have not been added."""
    known = processor.get_vocab() if tokens else {}
    found = [known.get(token, -1) for token in tokens]
    together = range(found[0], found[0] + len(found)) if found and found[0] >= 0 else range(0)
    return together if found == list(together) else range(0)


def extend(model: Any, added: range) -> None:
    """Give a model rows for these ids, in place; the same rows wherever one weight looks up and multiplies.

    Raises:
        RecipeError: the model reads and writes different vocabularies.
    """
    if not added:
        return
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    if added.start > len(table.weight):
        what = f"model: its tokenizer has {added.start:,} tokens, its embedding {len(table.weight):,}"
        raise RecipeError(what, hint="the tokenizer belongs to another model")
    if model.config.is_encoder_decoder and model.get_decoder().get_input_embeddings().weight is not table.weight:
        what = "task.add_tokens: this model reads one vocabulary and writes another"
        raise RecipeError(what, hint="leave the key out")
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
    """How many tokens the model can look up."""
    table = model.get_input_embeddings()
    return max(len(table.weight), getattr(table, "added_ids", range(0)).stop)


def has_bias(model: Any) -> bool:
    """Whether the output of a model with added tokens adds a bias."""
    return any(getattr(module, "bias", None) is not None for _, module in _extended(model))


@torch.no_grad()
def fold(model: Any) -> None:
    """Make the rows part of ordinary tables, in place: nothing of this module is left."""
    found = list(_extended(model))
    if not found:
        return
    added: range = found[0][1].added_ids
    kept = {path: (getattr(module, ROWS).detach(), len(module.weight)) for path, module in found}
    for _, module in found:
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
    return ((path, module) for path, module in model.named_modules() if isinstance(module, _Reads | _Writes))


def _fit_bias_of_logits(model: Any, size: int) -> None:
    """BART and its kin add a buffer to all logits."""
    bias = getattr(model, "final_logits_bias", None)
    if isinstance(bias, Tensor):
        model.final_logits_bias = F.pad(bias, (0, size - bias.shape[-1]))


@lru_cache(maxsize=64)
def _with_rows(kind: type) -> type:
    """A module's class with rows of its own, under the name that it had."""
    before = _Reads if issubclass(kind, nn.Embedding) else _Writes
    return type(kind.__name__, (before, kind), {})


class _Reads:
    """Before an embedding's class: new ids are looked up in N."""

    added: Tensor
    added_ids: range

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Embedding's name
        """Rows of E or N.  # (...) -> (..., width)"""
        place = input - self.added_ids.start
        new = (place >= 0) & (place < len(self.added_ids))
        old: Tensor = super().forward(input.masked_fill(new, 0))  # type: ignore[misc]
        found = F.embedding(place.clamp(0, len(self.added_ids) - 1), self.added)
        scale = getattr(self, "embed_scale", 1.0)  # what some embeddings multiply their rows by
        return torch.where(new[..., None], (found * scale).to(old.dtype), old)


class _Writes:
    """Before an output's class: the logits of new tokens stand at their ids."""

    added: Tensor
    added_ids: range

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """(..., width) -> (..., tokens)."""
        old: Tensor = super().forward(input)  # type: ignore[misc]
        new = F.linear(input, self.added.to(input.dtype)).to(old.dtype)
        return torch.cat([old[..., : self.added_ids.start], new, old[..., self.added_ids.stop :]], -1)
