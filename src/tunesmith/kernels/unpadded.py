"""Blocks that compute on valid tokens only: padding is dropped before the first block and put back after the last.

Outside, a model stays as it is: (batch, tokens) in, padded states out, so that no head and no task knows. Between the
blocks the states are one row of tokens; the model's own attention mask is replaced by a `Layout`, which travels where
the mask would, and attention runs over groups of sequences of like length. Which query may see which key is asked of
the model's own mask function, so that causal and sliding windows are what the model says. transformers' registries of
attention and mask functions are the public way in; nothing is patched. On a GPU the sequences lie one after another for
PyTorch's own kernel, in half precision and without dropout; what that does not compute goes by groups there too.

A decoder's blocks are given the states of its encoder as one row of tokens as well, and in the place of the mask over
them an `Across`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function

from tunesmith.kernels.layout import Across, Between, Group, Layout, Put
from tunesmith.kernels.ops.attention import attend
from tunesmith.kernels.ops.dropout import keep_scale
from tunesmith.kernels.ops.relative_bias import has_distances, use_distances
from tunesmith.kernels.prefix import prefixed, takes_attention

__all__ = ["computes_without_padding", "use_padding_free_blocks", "with_padding"]

NAME = "tunesmith_padding_free"
WRITTEN_OUT = 512
"""Up to which length the scores are written out: PyTorch's fused attention then takes one and a half to three times as
long forward and backward (9 heads of 64, bf16), from 1,024 on less."""

SEEN = "encoder_"
"""What the names of a block's arguments begin with that are of the encoder a decoder looks at."""


def layout_as_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Layout:
    """A mask function for transformers that gives the layout of what is seen instead of a mask."""
    whole = q_length == kv_length or mask_function is bidirectional_mask_function  # a decoder looks at its encoder
    assert whole, "blocks without padding serve whole sequences, not one more token"
    return Layout(attention_mask, batch_size, kv_length, mask_function)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout | Across,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers over (1, heads, total tokens, width).

    Raises:
        ValueError: the model wants what is not computed here, a bias for each pair of tokens or sinks.
    """
    across, distances = isinstance(attention_mask, Across), others.get("position_bias")
    if distances is not None and across and not has_distances(module):  # T5 has zeros there
        distances = None
    wrong = distances is not None and (distances.ndim != 2 or across or hasattr(module, "prefix"))
    if wrong or others.get("s_aux") is not None:
        raise ValueError(f"attention without padding has no such {'position_bias' if wrong else 's_aux'}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (total, heads, width)
    dropout = dropout if module.training else 0.0
    longest = max(group.longest for group in attention_mask.groups)
    written_out = longest <= WRITTEN_OUT or attention_mask.together.sequences is not None or distances is not None
    if softcap is None and written_out:
        prefix: Any = getattr(module, "prefix", None)
        seen = attend(
            q.flatten(1),
            k.flatten(1),
            v.flatten(1),
            attention_mask.together,
            width=q.shape[2],
            scaling=q.shape[2] ** -0.5 if scaling is None else scaling,
            dropout=dropout,
            prefix=None if prefix is None else prefix(),
            distances=distances,
        )
        return seen.view(1, *q.shape), None
    parts = [_attend(module, group, q, k, v, dropout, scaling, softcap) for group in attention_mask.groups]
    if attention_mask.groups[0].tokens is None:
        back = torch.cat([group.indices for group in attention_mask.groups])
        return Put.apply(torch.cat(parts), back, attention_mask.total)[None], None  # type: ignore[no-untyped-call]
    return torch.cat([*parts, parts[0].new_zeros(attention_mask.spare, *parts[0].shape[1:])])[None], None


def _attend(
    module: nn.Module,
    group: Group | Between,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    q, k, v = group.gather_queries(q), group.gather(k), group.gather(v)
    k, v, length = prefixed(module, k, v)
    if k.shape[1] != q.shape[1]:  # grouped queries
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    plain = dropout == 0.0 and softcap is None
    if plain and group.causal and not length:
        return group.release(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
    mask = F.pad(group.mask, (length, 0), value=True) if length and group.mask is not None else group.mask
    if plain:
        return group.release(F.scaled_dot_product_attention(q, k, v, mask, scale=scaling))
    scores = (q * (scaling if scaling is not None else q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=scores.dtype)
    if dropout:
        weights = weights * keep_scale(weights, dropout)
    return group.release(weights @ v)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, layout_as_mask)


def use_padding_free_blocks(model: Any, blocks: Sequence[nn.Module]) -> bool:
    """Let the blocks of a model on a CPU compute without padding, in place; whether it does.

    A model is taken only when its answers to two short texts of unequal length stay the same; others keep padding.
    """
    if next(model.parameters()).device.type != "cpu" or not blocks or not takes_attention(model):
        return False
    paths = {module: path for path, module in model.named_modules()}
    last = {paths[block].rpartition(".")[0]: block for block in blocks}  # of each stack
    before: str = model.config._attn_implementation
    hooks: list[Any] = []
    of_distances: list[Any] = [module for module in model.modules() if has_distances(module)]

    def take() -> None:
        for module in of_distances:
            use_distances(module, lambda: computes_without_padding(model))
        hooks.extend(block.register_forward_pre_hook(_drop_padding, with_kwargs=True) for block in blocks)
        hooks.extend(block.register_forward_hook(_put_back, with_kwargs=True) for block in last.values())
        model.attention_with_padding = before
        model.set_attn_implementation(NAME)

    def leave() -> None:
        model.set_attn_implementation(before)
        del model.attention_with_padding
        for hook in hooks:
            hook.remove()
        for module in of_distances:
            del module.compute_bias

    return same_answers(model, take, leave)


def same_answers(model: Any, take: Callable[[], None], leave: Callable[[], None]) -> bool:
    """Change how a model computes by `take`, or `leave` it as it was where its answers to two short texts changed."""
    expected = _probe(model)
    try:
        take()
        found = _probe(model)
        same = found.shape == expected.shape and bool(torch.dist(found, expected) <= 0.01 * expected.norm())
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, AssertionError):
        same = False  # its blocks do not pass the layout on
    if not same:
        leave()
    return same


def computes_without_padding(model: Any) -> bool:
    """Whether rows of unequal length cost no more than their tokens."""
    return bool(model.config._attn_implementation == NAME)


@contextmanager
def with_padding(model: Any) -> Iterator[None]:
    """For a while a model attends as it came, as writing token by token with a cache needs."""
    padding_free = computes_without_padding(model)
    if padding_free:
        model.set_attn_implementation(model.attention_with_padding)
    try:
        yield
    finally:
        if padding_free:
            model.set_attn_implementation(NAME)


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """The backbone's last states for two texts of 3 and 5 tokens; of a decoder on them, of 4 and 2."""
    batch, was_training = probe_batch(model), model.training
    mask = batch["attention_mask"]
    if model.config.is_encoder_decoder:
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        batch |= {"decoder_input_ids": batch["input_ids"][1:, :4].expand(2, -1), "decoder_attention_mask": mask}
    model.eval()
    states: Tensor = model.base_model(**batch)[0]
    model.train(was_training)
    return (states.float() * mask[:, :, None]).flatten()


def probe_batch(model: Any) -> dict[str, Tensor]:
    """Two texts of 3 and 5 tokens."""
    pad = model.config.pad_token_id or 0
    known = [token for token in range(min(12, model.get_input_embeddings().num_embeddings)) if token != pad]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    ids = torch.tensor([known[n % len(known)] for n in range(10)]).view(2, 5)
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


def layout_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout | None:
    """The layout among what a block is called with, once padding is dropped."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Layout)), None)


def across_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Across | None:
    """Likewise how its tokens attend to those of an encoder."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Across)), None)


@cache
def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what a class's `forward` is called with, in order."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _drop_padding(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = [*zip(chain(argument_names(type(block).forward), repeat("")), args, strict=False), *kwargs.items()]
    layouts = [(name, value) for name, value in named if isinstance(value, Layout)]
    own = next((value for name, value in layouts if not name.startswith(SEEN)), None)
    seen = next((value for name, value in layouts if name.startswith(SEEN)), None)
    if own is None:
        return None
    across = None if seen is None else own.across(seen)
    again = getattr(block, "gradient_checkpointing", False)  # what is computed twice must do the same twice

    def flat(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(flat(name, part) for part in value)
        if across is not None and name.startswith(SEEN):
            if not isinstance(value, Tensor) or value.ndim != 3:
                return across if value is seen else value
            return across.seen.flat(value) if again else across.states(value)
        padded = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == own.tokens
        return own.flat(value) if padded and value.shape[0] in (1, own.batch_size) else value

    values = [flat(name, value) for name, value in named]
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def _put_back(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    layout = layout_in(args, kwargs)
    if layout is None:
        return output
    if isinstance(output, tuple):
        return (layout.padded(output[0]), *output[1:])
    return layout.padded(output)
