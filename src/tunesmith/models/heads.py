"""What a language model's head says, at some tokens only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.data.batches import Ragged

IGNORED = -100
"""What transformers' families shift into padding."""


def logits_at(model: Any, inputs: dict[str, Tensor], text: Tensor, place: Tensor) -> Tensor:
    """Logits in fp32 at tokens `place` of texts `text`: over a vocabulary of 30,000 they cost more than the blocks."""
    # (places, vocabulary)

    def keep(body: nn.Module, args: Any, output: Any) -> Any:
        states = output[0][text, place][None]  # (1, places, hidden)
        if isinstance(output, tuple):
            return (states, *output[1:])
        output["last_hidden_state"] = states
        return output

    hook = model.base_model.register_forward_hook(keep)
    try:
        logits: Tensor = model(**inputs).logits[0].float()
    finally:
        hook.remove()
    return logits


def written_logits_at(model: Any, inputs: dict[str, Any], labels: Ragged) -> Tensor:
    """Logits in fp32 of an encoder-decoder at its targets' tokens alone, all targets in a row; the decoder reads each
    target shifted by one, as its family shifts it.
    """  # (tokens, vocabulary)
    row, place = labels.mask().nonzero(as_tuple=True)

    def keep(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][row, place][None], *args[1:])  # (1, tokens, hidden)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        logits: Tensor = model(**inputs, decoder_input_ids=_shifted(model, labels), use_cache=False).logits[0].float()
    finally:
        hook.remove()
    return logits


def _shifted(model: Any, labels: Ragged) -> Tensor:
    """What a decoder reads to write the labels."""  # (targets, tokens)
    padded = labels.padded(IGNORED)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        made: Tensor = model.prepare_decoder_input_ids_from_labels(labels=padded)
        return made
    start = padded.new_full((len(padded), 1), model.config.decoder_start_token_id)  # M2M-100, NLLB, Blenderbot
    moved = torch.cat([start, padded[:, :-1]], 1)
    return moved.masked_fill(moved == IGNORED, model.config.pad_token_id)
