"""Attention with learned keys and values before those of the text: prefix tuning's way into every attention.

An attention module that has a child `prefix` sees its keys and values first; others attend as ever. transformers'
registry of attention functions is the public way in; nothing is patched. `seen_by_attention` asks a model what its
attention modules look at, so that no name and no class has to be known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["Seen", "prefixed", "seen_by_attention", "takes_attention", "use_prefixes"]

NAME, LOOK = "tunesmith_prefix", "tunesmith_look"


@dataclass(frozen=True)
class Seen:
    """What one attention module saw of a probe."""

    path: str
    queries: int
    key: Tensor  # (kv heads, keys, width)
    value: Tensor  # (kv heads, keys, width)


def prefixed(module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keys and values (batch, kv heads, tokens, width) with the module's prefix before them, and its length."""
    prefix: Any = getattr(module, "prefix", None)
    if prefix is None:
        return key, value, 0
    own = prefix().to(key.dtype)[:, None].expand(2, key.shape[0], -1, -1, -1)
    return torch.cat([own[0], key], 2), torch.cat([own[1], value], 2), own.shape[3]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """An attention function for transformers: torch's own over prefix and text."""
    queries, keys = query.shape[2], key.shape[2]
    key, value, length = prefixed(module, key, value)
    if not length:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = options.pop("is_causal", None)
    if attention_mask is None and (getattr(module, "is_causal", False) if causal is None else causal) and queries > 1:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        attention_mask = attention_mask[None, None]
    if attention_mask is not None:
        open_ = True if attention_mask.dtype == torch.bool else 0.0
        attention_mask = _before(attention_mask, attention_mask.new_full((), open_).expand(length))
    if options.get("position_bias") is not None:
        bias = module.prefix.bias(queries, keys)  # type: ignore[union-attr, operator]
        options["position_bias"] = _before(options["position_bias"], bias)
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=False, **options)


def _before(columns: Tensor, more: Tensor) -> Tensor:
    """(..., keys) with more columns before them."""
    return torch.cat([more.expand(*columns.shape[:-1], more.shape[-1]).to(columns.dtype), columns], -1)


def use_prefixes(model: Any) -> None:
    """Let every attention of the model look for its prefix."""
    model.set_attn_implementation(NAME)


def takes_attention(model: Any) -> bool:
    """Whether the model's attention modules call a function that can be given from outside."""
    return hasattr(model, "set_attn_implementation") and bool(model._can_set_attn_implementation())


@torch.no_grad()
def seen_by_attention(model: Any, body: Any, ids: Tensor) -> list[Seen]:
    """What each attention module of the model sees of the tokens `ids` (1, tokens), in forward order.

    A decoder that stands on an encoder is given three tokens of its own. Empty where attention is not computed through
    transformers' interface.
    """
    if not takes_attention(model):
        return []
    seen: list[Seen] = []
    paths = {module: path for path, module in model.named_modules()}

    def look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        seen.append(Seen(paths[module], query.shape[2], key[0].clone(), value[0].clone()))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register(LOOK, look)
    AttentionMaskInterface.register(LOOK, sdpa_mask)
    before, was_training = model.config._attn_implementation, model.training
    decoder = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    model.eval()
    try:
        model.set_attn_implementation(LOOK)
        body(input_ids=ids, **decoder)
    except ValueError:  # what torch's attention cannot compute
        return []
    finally:
        model.set_attn_implementation(before)
        model.train(was_training)
    return seen


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
