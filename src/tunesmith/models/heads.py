"""What a language model's head says, at some tokens only."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


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
