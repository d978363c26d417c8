"""What a model says at some tokens only: over a vocabulary of 30,000 the last map costs more than the blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
"""What transformers' families shift into padding."""


def logits_at(model: Any, inputs: dict[str, Any], row: Tensor, place: Tensor) -> Tensor:
    """The logits in fp32 of the tokens at (row, place) of what enters the model's last map."""  # (tokens, vocabulary)

    def keep(last: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][row, place][None], *args[1:])  # (1, tokens, hidden)

    hook, tail = model.get_output_embeddings().register_forward_pre_hook(keep), getattr(model, "block_tail", None)
    try:
        if tail is not None:
            tail.asked = row, place
        logits: Tensor = model(**inputs).logits[0].float()
    finally:
        hook.remove()
        if tail is not None:
            tail.asked = None
    return logits


def shifted(model: Any, labels: Tensor) -> Tensor:
    """What the decoder of an encoder-decoder reads to write labels (padded by -100), as its family shifts them."""
    # (targets, tokens)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        made: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return made
    start = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)  # M2M-100, NLLB, Blenderbot
    moved = torch.cat([start, labels[:, :-1]], 1)
    return moved.masked_fill(moved == IGNORED, model.config.pad_token_id)
