"""The bound tasks of translation, for an encoder-decoder and for a decoder.

A decoder is prompted with `Translate from English to German: ...`; its examples are conversations of text-generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith.data import languages
from tunesmith.data.batches import Batch
from tunesmith.data.encoded import Encoded, Fields
from tunesmith.data.findings import Fault
from tunesmith.data.formats import Row
from tunesmith.data.preview import Preview, Token
from tunesmith.data.text.texts import (
    as_bytes,
    count_tokens,
    preview_tokens,
    spell,
    token_costs,
    tokenize_truncated,
    unknown_notes,
)
from tunesmith.kernels.chunked_loss import token_log_probs, token_loss
from tunesmith.metrics.language import PerplexityMetrics
from tunesmith.metrics.texts import TextMetrics
from tunesmith.recipe.fields import Generation
from tunesmith.tasks import Answer, Baseline, BoundTask, Inspection, Metrics
from tunesmith.tasks._generation import token_frequencies
from tunesmith.tasks.text_generation import BoundTextGeneration, TextGeneration

SCORES = ("bleu", "chrf")
IGNORED = -100
"""Padding of labels."""
START_WITH_LAST = frozenset({"mbart", "plbart"})
CUT = "sources are longer than data.max_length and were truncated"
CUT_TARGET = "targets are longer than data.max_length and were truncated"
SAME = "targets equal their sources (`data check` lists them)"
BLEU_TOKENS = {"zh": "zh", "ja": "char", "th": "char", "km": "char", "my": "char"}
"""Language -> tokenizer of sacrebleu; the default is 13a (white space and punctuation)."""


def translation_metrics(task: Any) -> Metrics:
    """Return the metrics: loss, perplexity, accuracy; BLEU and chrF of generated translations."""
    target = languages.language(task.target_lang or "")
    texts = TextMetrics(SCORES, tokenize=BLEU_TOKENS.get(target.two if target else "", "13a"))
    return PerplexityMetrics(texts, max_texts=task.scored_rows)


def shift_right(config: Any, labels: Tensor) -> Tensor:
    """Return the decoder input for `labels` (padded with -100), shifted as the family does in transformers.

    mBART and PLBart start with the last token of the labels, which names the language.
    """  # (targets, tokens)
    ids = labels.masked_fill(labels == IGNORED, config.pad_token_id)
    if config.model_type in START_WITH_LAST:
        start = ids.gather(1, (labels != IGNORED).sum(1, keepdim=True) - 1)
    else:
        start = ids.new_full((len(ids), 1), config.decoder_start_token_id)
    return torch.cat([start, ids[:, :-1]], 1)


def pair_of(row: Row) -> tuple[str, str]:
    """Return source and target."""
    return str(row.values["source"]), str(row.values["target"])


def _with_references(fields: list[Fields], rows: Sequence[Row]) -> list[Fields]:
    """Add the target as UTF-8 bytes (`reference`), and `same`: 1 if it equals the source."""
    for example, row in zip(fields, rows, strict=True):
        if "target" in row.values:
            source, target = (text.strip() for text in pair_of(row))
            example |= {"same": int(source == target), "reference": as_bytes(target)}
    return fields


def _same_notes(encoded: Encoded) -> list[str]:
    same = int(encoded.column("same").sum()) if "same" in encoded else 0
    return [f"{same} of {len(encoded)} {SAME}"] if same else []


def _texts(rows: Sequence[Row], side: str, prefix: str = "") -> list[str]:
    return [f"{prefix}{str(row.values[side]).strip()}" for row in rows if side in row.values]


@dataclass(frozen=True, eq=False, kw_only=True)
class EncoderDecoderTranslation(BoundTask):
    """Translation with an encoder-decoder, from the source (`input_ids`) to the target (`label`)."""

    def encode(self, rows: Sequence[Row]) -> list[Fields]:
        """Return the tokens of source and target, their total number (`length`), and which were truncated.

        Raises:
            DataError: a text has no tokens.
        """
        max_length = self.data.max_length
        assert max_length is not None, "assemble sets max_length"
        places = [row.place for row in rows]
        sources = _texts(rows, "source", self.task.prefix or "")
        tokenized = tokenize_truncated(sources, self.processor, max_length, "source", places)
        fields: list[Fields] = [{"input_ids": ids, "cut": int(cut), "length": len(ids)} for ids, cut in tokenized]
        if targets := _texts(rows, "target"):
            end = self.config.eos_token_id
            tokenized = tokenize_truncated(targets, self.processor, max_length, "target", places, as_target=True)
            for example, (ids, cut) in zip(fields, tokenized, strict=True):
                ids = ids if end in ids[-2:] else [*ids[: max_length - 1], end]
                example |= {"label": ids, "length": example["length"] + len(ids), "cut_target": int(cut)}
        return _with_references(fields, rows)

    def costs(self, encoded: Encoded) -> NDArray[np.int64]:
        """Return the number of tokens of source and target."""
        return token_costs(encoded)

    def notes(self, encoded: Encoded) -> list[str]:
        """Return notes on truncated texts, unknown tokens above 5 %, and targets that equal their sources."""
        texts = {"cut": CUT, "cut_target": CUT_TARGET}
        counts = {name: int(encoded.column(name).sum()) for name in texts if name in encoded}
        notes = [f"{count} of {len(encoded)} {texts[name]}" for name, count in counts.items() if count]
        return notes + unknown_notes(encoded, self.processor) + _same_notes(encoded)

    def inspect(self, rows: Sequence[Row]) -> Inspection:
        """Return the sizes of sources, and faults of truncated targets."""
        max_length = self.data.max_length
        assert max_length is not None, "data check sets max_length"
        what, fix = f"a target is longer than {max_length} tokens and truncated", "raise data.max_length"
        targets = _texts(rows, "target")
        target_ids = self.processor(text_target=targets, verbose=False)["input_ids"]
        faults = [
            Fault("target-cut", what, row.place, f"{len(ids)} tokens: {text}", fix)
            for row, text, ids in zip(rows, targets, target_ids, strict=True)
            if len(ids) > max_length
        ]
        ids = self.processor(_texts(rows, "source", self.task.prefix or ""), verbose=False)["input_ids"]
        return Inspection(*count_tokens(ids, self.processor), max_length, "data.max_length", faults)

    def model_inputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Return padded sources, and targets shifted to the right."""
        rows, labels = batch.ragged("input_ids"), batch.ragged("label")
        return [
            {
                "input_ids": rows.padded(self.config.pad_token_id or 0),
                "attention_mask": rows.mask(),
                "decoder_input_ids": shift_right(self.config, labels.padded(IGNORED)),
                "decoder_attention_mask": labels.mask(),
                "use_cache": False,
            }
        ]

    def _at_labels(self, batch: Batch) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Return the model's arguments, and row and position of each target token."""
        (inputs,) = self.model_inputs(batch)
        row, place = inputs["decoder_attention_mask"].nonzero(as_tuple=True)
        return inputs, row, place

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """Return the number of target tokens."""
        return {"tokens": torch.tensor(float(len(batch.ragged("label").values)))}

    def loss(self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor]) -> Tensor:
        """Return this batch's share of the mean over the target tokens of the step."""
        labels = batch.ragged("label").values
        total = token_loss(model, *self._at_labels(batch), labels, self.label_smoothing)
        return total / normalizers["tokens"]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the log probability of each target token, and of the most likely token there."""  # (tokens, 2)
        return token_log_probs(model, *self._at_labels(batch), batch.ragged("label").values)

    def metrics(self) -> Metrics:
        """Return the metrics: loss, perplexity, accuracy, BLEU and chrF."""
        return translation_metrics(self.task)

    def baseline(self, train: Encoded) -> Baseline:
        """Return a predictor of the token frequencies of the training targets."""  # (tokens, 2)
        counts = np.bincount(train.column("label"), minlength=self.config.vocab_size)
        return token_frequencies(torch.from_numpy(counts) + 1.0, lambda batch: batch.ragged("label").values)

    def predict(self, model: nn.Module, batch: Batch, outputs: Tensor | None = None) -> list[Answer]:
        """Return the translations."""
        assert self.generator is not None, "bind sets it"
        return [{"translation": text} for text in self.generator.generate(model, batch)]

    def preview(self, fields: Fields) -> Preview:
        """Return the tokens of the source, then those of the target, which all have a loss."""
        source = preview_tokens(fields, self.processor)
        if "label" not in fields:
            return source
        special = set(self.processor.all_special_ids)
        spelled = zip(spell(fields["label"], self.processor), fields["label"], strict=True)
        target = [Token(text, code in special, text) for text, code in spelled]
        return Preview(None, bool(fields["cut"] or fields["cut_target"]), [*source.windows, target])


@dataclass(frozen=True, eq=False, kw_only=True)
class DecoderTranslation(BoundTask):
    """Translation with a decoder, as conversations of text-generation."""

    chat: BoundTextGeneration

    def encode(self, rows: Sequence[Row]) -> list[Fields]:
        """Return the fields of the conversations."""
        return _with_references(self.chat.encode(list(self._conversations(rows))), rows)

    def _conversations(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Yield rows as conversations, with answers if there are targets."""
        for row in rows:
            source = f"{self.task.prefix or ''}{str(row.values['source']).strip()}"
            prompt = {"role": "user", "content": source}
            if "target" not in row.values:
                yield Row(row.place, {"prompt_messages": [prompt], "choices": []})
                continue
            target = str(row.values["target"]).strip()
            yield Row(row.place, {"messages": [prompt, {"role": "assistant", "content": target}]})

    def costs(self, encoded: Encoded) -> NDArray[np.int64]:
        """Return the number of tokens of each conversation."""
        return self.chat.costs(encoded)

    def notes(self, encoded: Encoded) -> list[str]:
        """Return the notes of text-generation, and a note on targets that equal their sources."""
        return self.chat.notes(encoded) + _same_notes(encoded)

    def inspect(self, rows: Sequence[Row]) -> Inspection:
        """Return sizes and faults of the conversations."""
        return self.chat.inspect(list(self._conversations(rows)))

    def model_inputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Return the arguments for the conversations."""
        return self.chat.model_inputs(batch)

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """Return the number of answer tokens."""
        return self.chat.normalizers(batch)

    def loss(self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor]) -> Tensor:
        """Return this batch's share of the mean over the target tokens of the step."""
        return self.chat.loss(model, batch, normalizers)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the log probability of each answer token, and of the most likely token there."""  # (tokens, 2)
        return self.chat.outputs(model, batch)

    def metrics(self) -> Metrics:
        """Return the metrics: loss, perplexity, accuracy, BLEU and chrF."""
        return translation_metrics(self.task)

    def baseline(self, train: Encoded) -> Baseline:
        """Return a predictor of the token frequencies of the training answers."""  # (tokens, 2)
        return self.chat.baseline(train)

    def predict(self, model: nn.Module, batch: Batch, outputs: Tensor | None = None) -> list[Answer]:
        """Return the translations."""
        assert self.generator is not None, "bind sets it"
        return [{"translation": text} for text in self.generator.generate(model, batch)]

    def preview(self, fields: Fields) -> Preview:
        """Return the tokens of the conversation."""
        return self.chat.preview(fields)


def conversation_task(settings: Generation, chat_template: str | None) -> TextGeneration:
    """Return the text-generation task for translation with a decoder."""
    keys = {"form": "chat", "chat_template": chat_template, "general": "none", "generate": settings}
    return TextGeneration.model_validate(keys)
