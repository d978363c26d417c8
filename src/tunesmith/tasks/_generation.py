"""Text generation, composed by the tasks whose answers are texts (text-generation, translation)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, TextStreamer

from tunesmith.data.batches import Batch, Ragged
from tunesmith.data.formats import Row
from tunesmith.data.text.conversations import conversation
from tunesmith.kernels.chunked_loss import logits_at
from tunesmith.kernels.fast_path import fast_path
from tunesmith.models.load import UNBOUNDED, length_limit
from tunesmith.models.quiet import quiet
from tunesmith.recipe.fields import Generation
from tunesmith.tasks import Answer, Baseline

__all__ = ["PromptGenerator", "SourceGenerator", "last_token", "render", "token_frequencies"]


def last_token(processor: Any) -> int | None:
    """Return the end-of-text token."""
    last: int | None = processor.eos_token_id
    return processor.sep_token_id if last is None else last  # type: ignore[no-any-return]


def render(answer: Answer) -> str:
    """Return the text of an answer."""
    return str(answer.get("generated_text", answer.get("translation")))


def token_frequencies(counts: Tensor, labels: Callable[[Batch], Tensor]) -> Baseline:
    """Return a baseline: the log frequencies of each label and of the most frequent token."""  # (tokens, 2)
    prior = (counts / counts.sum()).log().float()

    def outputs(batch: Batch) -> Tensor:
        log_probs = prior[labels(batch)]
        return torch.stack([log_probs, prior.max().expand_as(log_probs)], 1)

    return outputs


def last_turn(row: Row) -> tuple[str, str]:
    """Return the last question and the last answer of a conversation."""
    messages = conversation(row)
    return messages[-2]["content"], messages[-1]["content"]


@dataclass(frozen=True)
class PromptGenerator:
    """Generates a text after a prompt (decoder), or chooses the most likely answer in a row with choices."""

    processor: Any
    settings: Generation
    stop: frozenset[int]
    """Tokens that end an answer or a text."""
    strip: bool
    """True where white space around a text is removed."""
    pair: Callable[[Row], tuple[str, str]] = last_turn

    def generate(self, model: nn.Module, batch: Batch) -> list[str]:
        """Return the text after each prompt; empty if the prompt is truncated.

        A prompt that is too long for the model loses its start.
        """
        return self._generate(model, batch)

    def stream(self, model: nn.Module, batch: Batch, say: Callable[[str], None]) -> str:
        """Return the text. It is passed to `say` word by word, or at once with beam search or choices."""
        if self._options(batch)[0] or self.settings.num_beams > 1:
            (text,) = self._generate(model, batch)
            say(text)
            return text
        return self._generate(model, batch, streamer=CallbackStreamer(self.processor, say))[0]

    def reference_pair(self, row: Row) -> tuple[str, str]:
        """Return the prompt of a row and the reference answer."""
        return self.pair(row)

    def _generate(self, model: nn.Module, batch: Batch, **more: Any) -> list[str]:
        limit = length_limit(model, self.processor)
        longest = max(1, limit - min(self.settings.max_new_tokens, limit // 4))
        rows = batch.ragged("input_ids")
        ids, starts = rows.values, rows.offsets[:-1].tolist()
        prompts = [
            ids[max(start, start + length - longest) : start + length]
            for start, length in zip(starts, batch.tensor("prompt").tolist(), strict=True)
        ]
        texts = [""] * len(prompts)
        choices, pad = self._options(batch), self.processor.pad_token_id
        for number, (prompt, options) in enumerate(zip(prompts, choices, strict=True)):
            if options and len(prompt):
                chosen = options[most_likely(model, prompt, options, pad)]
                texts[number] = self.processor.decode(chosen, skip_special_tokens=True).strip()
        free = [number for number, prompt in enumerate(prompts) if len(prompt) and not choices[number]]
        if free:
            lengths = torch.tensor([0, *(len(prompts[number]) for number in free)], device=ids.device)
            open_ended = Ragged(torch.cat([prompts[number] for number in free]), lengths.cumsum(0))
            generated = generate_tokens(model, open_ended, self.settings, pad=pad, stop=self.stop, limit=limit, **more)
            for number, text in zip(
                free, self.processor.batch_decode(generated, skip_special_tokens=True), strict=True
            ):
                texts[number] = text.strip() if self.strip else text
        return texts

    def _options(self, batch: Batch) -> list[list[Tensor]]:
        """Return the tokens of the choices of each example."""
        if "options" not in batch:
            return [[] for _ in range(batch.size)]
        lengths = batch.ragged("option_lengths")
        options = iter(batch.ragged("options").values.split(lengths.values.tolist()))
        return [list(islice(options, count)) for count in lengths.lengths.tolist()]


@dataclass(frozen=True)
class SourceGenerator:
    """Generates one text from another (encoder-decoder), with beam search."""

    processor: Any
    config: Any
    settings: Generation
    begin: dict[str, int]
    """Arguments of transformers' `generate` that set the target language."""
    pair: Callable[[Row], tuple[str, str]]

    def generate(self, model: nn.Module, batch: Batch) -> list[str]:
        """Return the text for each source."""
        ids = generate_tokens(
            model,
            batch.ragged("input_ids"),
            self.settings,
            pad=self.config.pad_token_id,
            stop=(self.config.eos_token_id,),
            limit=getattr(self.config, "max_position_embeddings", None) or UNBOUNDED,
            **self.begin,
        )
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def stream(self, model: nn.Module, batch: Batch, say: Callable[[str], None]) -> str:
        """Return the text. It is passed to `say` at once: beam search has no partial texts."""
        (text,) = self.generate(model, batch)
        say(text)
        return text

    def reference_pair(self, row: Row) -> tuple[str, str]:
        """Return source and target."""
        return self.pair(row)


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


def generate_tokens(
    model: Any, prompts: Ragged, how: Generation, *, pad: int, stop: Collection[int], limit: int, **more: Any
) -> list[list[int]]:
    """Generate tokens for each prompt (an encoder-decoder: for each source text), up to the first of `stop`.

    `limit` is the maximum number of tokens with the prompt (an encoder-decoder: of generated tokens); `more` goes to
    transformers' `generate`.
    """
    encoder_decoder = bool(model.config.is_encoder_decoder)
    ids, mask = _pad(prompts, pad, left=not encoder_decoder)
    begin = 1 if encoder_decoder else ids.shape[1]  # skips the decoder start token, which may equal the end token
    max_new_tokens = min(how.max_new_tokens, limit - begin)
    if max_new_tokens < 1:
        return [[] for _ in range(len(ids))]
    sampling = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=how.num_beams,
        pad_token_id=pad,
        eos_token_id=list(stop) or None,
        repetition_penalty=1.0,
        use_cache=True,
        **(sampling if how.temperature > 0 else {"do_sample": False}),
    )
    devices = [ids.device] if ids.device.type == "cuda" else []
    with quiet(), fast_path(model).with_padding(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(SEED)
        generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **more)
    return [_cut_at_stop(row, stop) for row in generated[:, begin:].tolist()]


def most_likely(model: Any, prompt: Tensor, options: Sequence[Tensor], pad: int) -> int:
    """Return the index of the option with the highest probability after a prompt, end token included."""
    lengths = torch.tensor([len(ids) for ids in options], device=prompt.device)
    option = torch.repeat_interleave(torch.arange(len(options), device=prompt.device), lengths)
    within = torch.cat([torch.arange(len(ids), device=prompt.device) for ids in options])
    rows = Ragged(
        torch.cat([part for ids in options for part in (prompt, ids)]),
        torch.cat([lengths.new_zeros(1), (lengths + len(prompt)).cumsum(0)]),
    )
    inputs = {"input_ids": rows.padded(pad), "attention_mask": rows.mask()}
    log_probabilities = logits_at(model, inputs, option, len(prompt) - 1 + within).log_softmax(-1)
    per_token = log_probabilities.gather(1, torch.cat(list(options))[:, None])[:, 0]
    return int(per_token.new_zeros(len(options)).index_add(0, option, per_token).argmax())


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
