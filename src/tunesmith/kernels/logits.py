"""What a model says at some tokens only: over a vocabulary of 30,000 the last map costs more than the blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def logits_at(model: Any, inputs: dict[str, Any], row: Tensor, place: Tensor) -> Tensor:
    """The logits in fp32 of the tokens at (row, place) of what enters the model's last map."""  # (tokens, vocabulary)

    def keep(last: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][row, place][None], *args[1:])  # (1, tokens, hidden)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        logits: Tensor = model(**inputs).logits[0].float()
    finally:
        hook.remove()
    return logits
