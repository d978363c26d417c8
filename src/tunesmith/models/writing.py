"""How a model writes: the tokens that it puts behind prompts, many at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from tunesmith.data.batches import Ragged
from tunesmith.kernels.chunked_loss import logits_at
from tunesmith.kernels.fast_path import fast_path
from tunesmith.models.quiet import quiet
from tunesmith.recipe.fields import Generation

SEED = 0
"""Of what is drawn: the same prompts in the same batch get the same texts."""


class Spoken(TextStreamer):  # type: ignore[misc]
    """Tells what is written behind one prompt, word by word."""

    def __init__(self, processor: Any, say: Callable[[str], None]) -> None:
        super().__init__(processor, skip_prompt=True, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """What is certain by now."""
        if text:
            self._say(text)


def write(
    model: Any, prompts: Ragged, how: Generation, *, pad: int, stop: Collection[int], limit: int, **more: Any
) -> list[list[int]]:
    """The tokens that a model writes behind each prompt (an encoder-decoder: for each text), up to the first of `stop`.

    `limit`: how many tokens the model takes, prompt and all (an encoder-decoder: how many it writes); `more` goes to
    transformers' `generate`.
    """
    reader = bool(model.config.is_encoder_decoder)
    ids, mask = _rectangle(prompts, pad, left=not reader)
    begin = 1 if reader else ids.shape[1]  # a decoder starts from one token, which may be that which ends a text
    room = min(how.max_new_tokens, limit - begin)
    if room < 1:
        return [[] for _ in range(len(ids))]
    drawn = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=room,
        num_beams=how.num_beams,
        pad_token_id=pad,
        eos_token_id=list(stop) or None,
        repetition_penalty=1.0,
        use_cache=True,
        **(drawn if how.temperature > 0 else {"do_sample": False}),
    )
    devices = [ids.device] if ids.device.type == "cuda" else []
    with quiet(), fast_path(model).with_padding(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(SEED)
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **more)
    return [_up_to(row, stop) for row in written[:, begin:].tolist()]


def likeliest(model: Any, prompt: Tensor, options: Sequence[Tensor], pad: int) -> int:
    """Which of some answers has the highest probability behind a prompt, with what ends it."""
    lengths = torch.tensor([len(option) for option in options], device=prompt.device)
    text = torch.repeat_interleave(torch.arange(len(options), device=prompt.device), lengths)
    within = torch.cat([torch.arange(len(option), device=prompt.device) for option in options])
    rows = Ragged(
        torch.cat([part for option in options for part in (prompt, option)]),
        torch.cat([lengths.new_zeros(1), (lengths + len(prompt)).cumsum(0)]),
    )
    inputs = {"input_ids": rows.padded(pad), "attention_mask": rows.mask()}
    said = logits_at(model, inputs, text, len(prompt) - 1 + within).log_softmax(-1)
    each = said.gather(1, torch.cat(list(options))[:, None])[:, 0]
    return int(each.new_zeros(len(options)).index_add(0, text, each).argmax())


def _rectangle(rows: Ragged, fill: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows padded so that they end, or begin, together; and 1 where there is a token."""  # each (rows, longest)
    if not left:
        return rows.padded(fill), rows.mask()
    lengths = rows.lengths
    longest = int(lengths.max())
    mask = torch.arange(longest, device=lengths.device) >= (longest - lengths)[:, None]
    ids = rows.values.new_full(mask.shape, fill)
    ids[mask] = rows.values
    return ids, mask.long()


def _up_to(row: list[int], stop: Collection[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in stop), len(row))]
