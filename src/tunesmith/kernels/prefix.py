"""Attention with trained keys and values in front of those of the text, for prefix tuning.

An attention module with a child `prefix` attends to its keys and values as well; others are unchanged. The
function is registered in transformers' public attention interface; nothing is patched. `attention_inputs` records the
inputs of a model's attention modules, so that no module name or class needs to be known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["AttentionInputs", "attention_inputs", "prefixed", "supports_attention_functions", "use_prefixes"]

NAME, RECORD = "tunesmith_prefix", "tunesmith_record"


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of one attention module in a trial forward pass."""

    path: str
    queries: int
    key: Tensor  # (kv heads, keys, width)
    value: Tensor  # (kv heads, keys, width)


def prefixed(module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Prepend a module's prefix to keys and values (batch, kv heads, tokens, width); return its length as well."""
    prefix: Any = getattr(module, "prefix", None)
    if prefix is None:
        return key, value, 0
    own = prefix().to(key.dtype)[:, None].expand(2, key.shape[0], -1, -1, -1)
    return torch.cat([own[0], key], 2), torch.cat([own[1], value], 2), own.shape[3]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend over prefix and text with PyTorch's attention (an attention function for transformers)."""
    queries, keys = query.shape[2], key.shape[2]
    key, value, length = prefixed(module, key, value)
    if not length:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = options.pop("is_causal", None)
    if attention_mask is None and (getattr(module, "is_causal", False) if causal is None else causal) and queries > 1:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        attention_mask = attention_mask[None, None]
    if attention_mask is not None:
        visible = True if attention_mask.dtype == torch.bool else 0.0
        attention_mask = _prepend(attention_mask, attention_mask.new_full((), visible).expand(length))
    if options.get("position_bias") is not None:
        bias = module.prefix.bias(queries, keys)  # type: ignore[union-attr, operator]
        options["position_bias"] = _prepend(options["position_bias"], bias)
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=False, **options)


def _prepend(columns: Tensor, more: Tensor) -> Tensor:
    """Prepend columns.  # (..., keys) -> (..., more + keys)"""
    return torch.cat([more.expand(*columns.shape[:-1], more.shape[-1]).to(columns.dtype), columns], -1)


def use_prefixes(model: Any) -> None:
    """Make every attention module of a model attend to its prefix."""
    model.set_attn_implementation(NAME)


def supports_attention_functions(model: Any) -> bool:
    """Return whether a model's attention modules call a registered attention function."""
    return hasattr(model, "set_attn_implementation") and bool(model._can_set_attn_implementation())


@torch.no_grad()
def attention_inputs(model: Any, body: Any, ids: Tensor) -> list[AttentionInputs]:
    """Return the inputs of each attention module for the tokens `ids` (1, tokens), in forward order.

    The decoder of an encoder-decoder gets the first three tokens. Empty if the model does not compute attention through
    transformers' interface.
    """
    if not supports_attention_functions(model):
        return []
    recorded: list[AttentionInputs] = []
    paths = {module: path for path, module in model.named_modules()}

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        recorded.append(AttentionInputs(paths[module], query.shape[2], key[0].clone(), value[0].clone()))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register(RECORD, record)
    AttentionMaskInterface.register(RECORD, sdpa_mask)
    before, was_training = model.config._attn_implementation, model.training
    decoder = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    model.eval()
    try:
        model.set_attn_implementation(RECORD)
        body(input_ids=ids, **decoder)
    except ValueError:  # PyTorch's attention cannot compute it
        return []
    finally:
        model.set_attn_implementation(before)
        model.train(was_training)
    return recorded


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
