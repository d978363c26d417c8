"""The two ways in which a model translates: an encoder-decoder reads the source and writes the target, a decoder is
asked and answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.data.batches import Batch
from tunesmith.data.encoded import Encoded
from tunesmith.data.findings import Fault
from tunesmith.data.formats import Row
from tunesmith.data.texts import cut_texts, unknown_notes
from tunesmith.kernels.chunked_loss import IGNORE_INDEX, shift_tokens_right, token_log_probs, token_loss
from tunesmith.kernels.fast_path import fast_path
from tunesmith.models.directions import Direction
from tunesmith.models.load import UNBOUNDED
from tunesmith.models.writing import write
from tunesmith.recipe import Data
from tunesmith.recipe_values import Generation
from tunesmith.tasks.text_generation import TextGeneration

CUT = "sources are longer than is read and were cut (raise data.max_length)"
CUT_TARGET = "targets are longer than is written and were cut (raise data.max_length)"


class Translator(Protocol):
    """What of the task differs with the kind of model.

    Its rows have a `source`, with what stands before it, and a `target` where there is one.
    """

    def encode(self, rows: Sequence[Row], data: Data) -> list[dict[str, Any]]:
        """As `Task.encode`."""

    def notes(self, encoded: Encoded) -> list[str]:
        """As `Task.notes`."""

    def token_faults(self, rows: Sequence[Row], data: Data) -> tuple[list[list[int]], list[Fault]] | None:
        """As `Task.token_faults`."""

    def num_outputs(self, batch: Batch) -> int:
        """As `Task.num_outputs`."""

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """As `Task.forward`."""

    def loss(self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor], label_smoothing: float) -> Tensor:
        """As `Task.loss`."""

    def written(self, model: nn.Module, batch: Batch) -> list[str]:
        """As `WritingTask.written`."""

    def prior(self, encoded: Encoded) -> Tensor:
        """As `Task.prior`."""

    def guess(self, prior: Tensor, batch: Batch) -> Tensor:
        """As `Task.guess`."""


@dataclass(frozen=True)
class EncoderDecoder:
    """Reads the source (`input_ids`), and writes the target (`label`)."""

    processor: Any
    config: Any
    told: Direction
    generation: Generation

    def encode(self, rows: Sequence[Row], data: Data) -> list[dict[str, Any]]:
        """Both sides' tokens, whether either was cut, and how long they are together (`length`)."""
        assert data.max_length is not None, "the run resolves max_length"
        places = [row.place for row in rows]
        coded = cut_texts(_texts(rows, "source"), self.processor, data.max_length, "source", places)
        fields: list[dict[str, Any]] = [{"input_ids": ids, "cut": int(cut), "length": len(ids)} for ids, cut in coded]
        if targets := _texts(rows, "target"):
            end = self.config.eos_token_id
            coded = cut_texts(targets, self.processor, data.max_length, "target", places, written=True)
            for one, (ids, cut) in zip(fields, coded, strict=True):
                ids = ids if end in ids[-2:] else [*ids[: data.max_length - 1], end]
                one |= {"label": ids, "length": one["length"] + len(ids), "cut_target": int(cut)}
        return fields

    def notes(self, encoded: Encoded) -> list[str]:
        """Texts cut, and unknown tokens above 5 %."""
        said = {"cut": CUT, "cut_target": CUT_TARGET}
        counts = {name: int(encoded.column(name).sum()) for name in said if name in encoded.fields}
        notes = [f"{count} of {len(encoded)} {said[name]}" for name, count in counts.items() if count]
        return notes + unknown_notes(encoded, self.processor)

    def token_faults(self, rows: Sequence[Row], data: Data) -> tuple[list[list[int]], list[Fault]]:
        """The sources' tokens, and what of targets is cut off."""
        assert data.max_length is not None, "the check knows it"
        what, fix = f"a target is longer than the {data.max_length} tokens that are written", "raise data.max_length"
        targets = _texts(rows, "target")
        written = self.processor(text_target=targets, verbose=False)["input_ids"]
        faults = [
            Fault("target-cut", what, row.place, f"{len(ids)} tokens: {text}", fix)
            for row, text, ids in zip(rows, targets, written, strict=True)
            if len(ids) > data.max_length
        ]
        return [list(ids) for ids in self.processor(_texts(rows, "source"), verbose=False)["input_ids"]], faults

    def num_outputs(self, batch: Batch) -> int:
        """One for each token of the targets."""
        return len(batch.ragged("label").values)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probabilities of each token of the targets, and of the one that was likeliest there."""  # (tokens, 2)
        return token_log_probs(model, *self._asked(model, batch), batch.ragged("label").values)

    def loss(self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor], label_smoothing: float) -> Tensor:
        """This batch's share of the mean over the step's tokens."""
        labels = batch.ragged("label").values
        return token_loss(model, *self._asked(model, batch), labels, label_smoothing) / normalizers["tokens"]

    def _asked(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Any], Tensor, Tensor]:
        """What the model reads, and the row and place of each token of the targets."""
        rows, labels = batch.ragged("input_ids"), batch.ragged("label")
        inputs = {
            "input_ids": rows.padded(self.config.pad_token_id or 0),
            "attention_mask": rows.mask(),
            "decoder_input_ids": shift_tokens_right(model, labels.padded(IGNORE_INDEX)),
            "use_cache": False,
        }
        mask = labels.mask()
        if fast_path(model).unpadded:  # to others it says nothing, for no token looks at a later one
            inputs["decoder_attention_mask"] = mask
        row, place = mask.nonzero(as_tuple=True)
        return inputs, row, place

    def written(self, model: nn.Module, batch: Batch) -> list[str]:
        """The translations, by beam search."""
        begin = {"forced_bos_token_id": self.told.first, "decoder_start_token_id": self.told.start}
        ids = write(
            model,
            batch.ragged("input_ids"),
            self.generation,
            pad=self.config.pad_token_id,
            stop=(self.config.eos_token_id,),
            limit=getattr(self.config, "max_position_embeddings", None) or UNBOUNDED,
            **{name: token for name, token in begin.items() if token is not None},
        )
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def prior(self, encoded: Encoded) -> Tensor:
        """Log frequency of each token in the training targets."""  # (vocabulary,)
        frequency = torch.from_numpy(np.bincount(encoded.column("label"), minlength=self.config.vocab_size)) + 1.0
        return (frequency / frequency.sum()).log().float()

    def guess(self, prior: Tensor, batch: Batch) -> Tensor:
        """That log frequency of each token of the targets, and of the most frequent."""  # (tokens, 2)
        found = prior[batch.ragged("label").values]
        return torch.stack([found, prior.max().expand_as(found)], 1)


class Decoder:
    """Is asked, `Translate from English to German: ...`, and answers: a conversation of text-generation."""

    def __init__(self, processor: Any, config: Any, generation: Generation, chat_template: str | None) -> None:
        keys = {"form": "chat", "chat_template": chat_template, "general": "none", "generate": generation}
        self._chat = TextGeneration.model_validate(keys).for_processor(processor, config)
        self._processor = processor
        self.num_outputs, self.forward, self.loss = self._chat.num_outputs, self._chat.forward, self._chat.loss
        self.written, self.prior, self.guess = self._chat.written, self._chat.prior, self._chat.guess

    def encode(self, rows: Sequence[Row], data: Data) -> list[dict[str, Any]]:
        """The fields of a conversation."""
        return self._chat.encode(_conversations(rows), self._processor, data)

    def notes(self, encoded: Encoded) -> list[str]:
        """What is lost of conversations."""
        return self._chat.notes(encoded, self._processor)

    def token_faults(self, rows: Sequence[Row], data: Data) -> tuple[list[list[int]], list[Fault]] | None:
        """Those of conversations."""
        return self._chat.token_faults(_conversations(rows), self._processor, data)


def _texts(rows: Sequence[Row], role: str) -> list[str]:
    return [str(row.values[role]) for row in rows if role in row.values]


def _conversations(rows: Sequence[Row]) -> list[Row]:
    """Rows as a decoder is asked, with answers where there are targets."""
    return [Row(row.place, _conversation(row.values)) for row in rows]


def _conversation(values: dict[str, Any]) -> dict[str, Any]:
    asked = {"role": "user", "content": values["source"]}
    if "target" not in values:
        return {"asked": [asked], "choices": []}
    return {"messages": [asked, {"role": "assistant", "content": values["target"]}]}
