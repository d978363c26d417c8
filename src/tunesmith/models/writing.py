"""Batched text generation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from tunesmith.data.batches import Ragged
from tunesmith.kernels.logits import logits_at
from tunesmith.kernels.padding_free import with_padding
from tunesmith.models.quiet import quiet
from tunesmith.recipe_values import Generation

SEED = 0
"""Sampling seed: the same prompts in the same batch get the same texts."""


class CallbackStreamer(TextStreamer):  # type: ignore[misc]
    """Pass the generated text of one prompt to a callback, word by word."""

    def __init__(self, processor: Any, say: Callable[[str], None]) -> None:
        super().__init__(processor, skip_prompt=True, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on finished words."""
        if text:
            self._say(text)


def write(
    model: Any, prompts: Ragged, how: Generation, *, pad: int, stop: Collection[int], limit: int, **more: Any
) -> list[list[int]]:
    """Generate tokens for each prompt (an encoder-decoder: for each source text), up to the first of `stop`.

    `limit` is the maximum number of tokens with the prompt (an encoder-decoder: of generated tokens); `more` goes to
    transformers' `generate`.
    """
    encoder_decoder = bool(model.config.is_encoder_decoder)
    ids, mask = _pad(prompts, pad, left=not encoder_decoder)
    begin = 1 if encoder_decoder else ids.shape[1]  # the decoder start token, which may be the end token
    room = min(how.max_new_tokens, limit - begin)
    if room < 1:
        return [[] for _ in range(len(ids))]
    sampling = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=room,
        num_beams=how.num_beams,
        pad_token_id=pad,
        eos_token_id=list(stop) or None,
        repetition_penalty=1.0,
        use_cache=True,
        **(sampling if how.temperature > 0 else {"do_sample": False}),
    )
    devices = [ids.device] if ids.device.type == "cuda" else []
    with quiet(), with_padding(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(SEED)
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **more)
    return [_cut_at_stop(row, stop) for row in written[:, begin:].tolist()]


def most_likely(model: Any, prompt: Tensor, options: Sequence[Tensor], pad: int) -> int:
    """Return the index of the option with the highest probability after a prompt, end token included."""
    lengths = torch.tensor([len(option) for option in options], device=prompt.device)
    text = torch.repeat_interleave(torch.arange(len(options), device=prompt.device), lengths)
    within = torch.cat([torch.arange(len(option), device=prompt.device) for option in options])
    rows = Ragged(
        torch.cat([part for option in options for part in (prompt, option)]),
        torch.cat([lengths.new_zeros(1), (lengths + len(prompt)).cumsum(0)]),
    )
    inputs = {"input_ids": rows.padded(pad), "attention_mask": rows.mask()}
    log_probabilities = logits_at(model, inputs, text, len(prompt) - 1 + within).log_softmax(-1)
    each = log_probabilities.gather(1, torch.cat(list(options))[:, None])[:, 0]
    return int(each.new_zeros(len(options)).index_add(0, text, each).argmax())


def _pad(rows: Ragged, fill: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Pad rows on the left or right; return ids and attention mask."""  # each (rows, longest)
    if not left:
        return rows.padded(fill), rows.mask()
    lengths = rows.lengths
    longest = int(lengths.max())
    mask = torch.arange(longest, device=lengths.device) >= (longest - lengths)[:, None]
    ids = rows.values.new_full(mask.shape, fill)
    ids[mask] = rows.values
    return ids, mask.long()


def _cut_at_stop(row: list[int], stop: Collection[int]) -> list[int]:
    return row[: next((index for index, token in enumerate(row) if token in stop), len(row))]
