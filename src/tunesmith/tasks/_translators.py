"""The two ways in which a model translates.

An encoder-decoder reads the source and writes the target. A decoder is asked, `Translate from English to German: ...`,
and answers: a conversation of text-generation.
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
CUT = "sources are longer than data.max_length and were cut"
CUT_TARGET = "targets are longer than data.max_length and were cut"
SAME = "targets are their sources word for word (`data check` names them)"
BLEU_TOKENS = {"zh": "zh", "ja": "char", "th": "char", "km": "char", "my": "char"}
"""Language -> how sacrebleu divides it into words; others at blanks and punctuation (13a)."""


def translation_metrics(task: Any) -> Metrics:
    """Loss, perplexity, accuracy of the next token; BLEU and chrF of generated translations."""
    known = languages.language(task.target_lang or "")
    texts = TextMetrics(SCORES, tokenize=BLEU_TOKENS.get(known.two if known else "", "13a"))
    return PerplexityMetrics(texts, max_texts=task.scored_rows)


def shift_right(config: Any, labels: Tensor) -> Tensor:
    """What the decoder reads to predict `labels` (padded by -100), as its family in transformers shifts them.

    mBART and PLBart start with the last token of the labels, which names the language.
    """  # (targets, tokens)
    ids = labels.masked_fill(labels == IGNORED, config.pad_token_id)
    if config.model_type in START_WITH_LAST:
        start = ids.gather(1, (labels != IGNORED).sum(1, keepdim=True) - 1)
    else:
        start = ids.new_full((len(ids), 1), config.decoder_start_token_id)
    return torch.cat([start, ids[:, :-1]], 1)


def pair_of(row: Row) -> tuple[str, str]:
    """Source and target."""
    return str(row.values["source"]), str(row.values["target"])


def _with_references(fields: list[Fields], rows: Sequence[Row]) -> list[Fields]:
    """Fields with the target as it is written (UTF-8 bytes), and whether it is the source."""
    for one, row in zip(fields, rows, strict=True):
        if "target" in row.values:
            source, target = (text.strip() for text in pair_of(row))
            one |= {"same": int(source == target), "reference": as_bytes(target)}
    return fields


def _same_notes(encoded: Encoded) -> list[str]:
    same = int(encoded.column("same").sum()) if "same" in encoded else 0
    return [f"{same} of {len(encoded)} {SAME}"] if same else []


def _texts(rows: Sequence[Row], side: str, prefix: str = "") -> list[str]:
    return [f"{prefix}{str(row.values[side]).strip()}" for row in rows if side in row.values]


@dataclass(frozen=True, eq=False, kw_only=True)
class EncoderDecoderTranslation(BoundTask):
    """Reads the source (`input_ids`), and writes the target (`label`)."""

    def encode(self, rows: Sequence[Row]) -> list[Fields]:
        """Tokens of both sides, whether either was cut, and their length together (`length`).

        Raises:
            DataError: a text has no tokens.
        """
        most = self.data.max_length
        assert most is not None, "the run resolves max_length"
        places = [row.place for row in rows]
        sources = _texts(rows, "source", self.task.prefix or "")
        coded = tokenize_truncated(sources, self.processor, most, "source", places)
        fields: list[Fields] = [{"input_ids": ids, "cut": int(cut), "length": len(ids)} for ids, cut in coded]
        if targets := _texts(rows, "target"):
            end = self.config.eos_token_id
            coded = tokenize_truncated(targets, self.processor, most, "target", places, as_target=True)
            for one, (ids, cut) in zip(fields, coded, strict=True):
                ids = ids if end in ids[-2:] else [*ids[: most - 1], end]
                one |= {"label": ids, "length": one["length"] + len(ids), "cut_target": int(cut)}
        return _with_references(fields, rows)

    def costs(self, encoded: Encoded) -> NDArray[np.int64]:
        """Tokens of both sides."""
        return token_costs(encoded)

    def notes(self, encoded: Encoded) -> list[str]:
        """Texts cut, unknown tokens above 5 %, and targets that are their sources."""
        said = {"cut": CUT, "cut_target": CUT_TARGET}
        counts = {name: int(encoded.column(name).sum()) for name in said if name in encoded}
        notes = [f"{count} of {len(encoded)} {said[name]}" for name, count in counts.items() if count]
        return notes + unknown_notes(encoded, self.processor) + _same_notes(encoded)

    def inspect(self, rows: Sequence[Row]) -> Inspection:
        """Tokens of the sources, and targets that are cut off."""
        most = self.data.max_length
        assert most is not None, "the check knows it"
        what, fix = f"a target is longer than the {most} tokens that are written", "raise data.max_length"
        targets = _texts(rows, "target")
        written = self.processor(text_target=targets, verbose=False)["input_ids"]
        faults = [
            Fault("target-cut", what, row.place, f"{len(ids)} tokens: {text}", fix)
            for row, text, ids in zip(rows, targets, written, strict=True)
            if len(ids) > most
        ]
        ids = self.processor(_texts(rows, "source", self.task.prefix or ""), verbose=False)["input_ids"]
        return Inspection(*count_tokens(ids, self.processor), most, "data.max_length", faults)

    def model_inputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Padded sources, and targets shifted to the right."""
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
        """The model's arguments, and row and place of each token of the targets."""
        (inputs,) = self.model_inputs(batch)
        row, place = inputs["decoder_attention_mask"].nonzero(as_tuple=True)
        return inputs, row, place

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """The number of tokens of the targets."""
        return {"tokens": torch.tensor(float(len(batch.ragged("label").values)))}

    def loss(self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor]) -> Tensor:
        """This batch's share of the mean over the step's tokens."""
        labels = batch.ragged("label").values
        total = token_loss(model, *self._at_labels(batch), labels, self.label_smoothing)
        return total / normalizers["tokens"]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probabilities of each token of the targets, and of the likeliest one in its place."""  # (tokens, 2)
        return token_log_probs(model, *self._at_labels(batch), batch.ragged("label").values)

    def metrics(self) -> Metrics:
        """Loss, perplexity, accuracy of the next token; BLEU and chrF."""
        return translation_metrics(self.task)

    def baseline(self, train: Encoded) -> Baseline:
        """Log frequency of each token in the training targets, and of the most frequent."""  # (tokens, 2)
        counts = np.bincount(train.column("label"), minlength=self.config.vocab_size)
        return token_frequencies(torch.from_numpy(counts) + 1.0, lambda batch: batch.ragged("label").values)

    def predict(self, model: nn.Module, batch: Batch, outputs: Tensor | None = None) -> list[Answer]:
        """The translations, by beam search."""
        assert self.generator is not None, "it is set in bind"
        return [{"translation": text} for text in self.generator.generate(model, batch)]

    def preview(self, fields: Fields) -> Preview:
        """Tokens of the source, then those of the target, which all carry loss."""
        source = preview_tokens(fields, self.processor)
        if "label" not in fields:
            return source
        special = set(self.processor.all_special_ids)
        spelled = zip(spell(fields["label"], self.processor), fields["label"], strict=True)
        target = [Token(text, code in special, text) for text, code in spelled]
        return Preview(None, bool(fields["cut"] or fields["cut_target"]), [*source.windows, target])


@dataclass(frozen=True, eq=False, kw_only=True)
class DecoderTranslation(BoundTask):
    """Is asked for a translation, and answers: a conversation of text-generation, which does the rest."""

    chat: BoundTextGeneration

    def encode(self, rows: Sequence[Row]) -> list[Fields]:
        """The fields of a conversation."""
        return _with_references(self.chat.encode(list(self._conversations(rows))), rows)

    def _conversations(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Rows as a decoder is asked, with answers where there are targets."""
        for row in rows:
            source = f"{self.task.prefix or ''}{str(row.values['source']).strip()}"
            prompt = {"role": "user", "content": source}
            if "target" not in row.values:
                yield Row(row.place, {"asked": [prompt], "choices": []})
                continue
            target = str(row.values["target"]).strip()
            yield Row(row.place, {"messages": [prompt, {"role": "assistant", "content": target}]})

    def costs(self, encoded: Encoded) -> NDArray[np.int64]:
        """Tokens of each conversation."""
        return self.chat.costs(encoded)

    def notes(self, encoded: Encoded) -> list[str]:
        """What is lost of conversations, and targets that are their sources."""
        return self.chat.notes(encoded) + _same_notes(encoded)

    def inspect(self, rows: Sequence[Row]) -> Inspection:
        """Sizes and faults of conversations."""
        return self.chat.inspect(list(self._conversations(rows)))

    def model_inputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Those of conversations."""
        return self.chat.model_inputs(batch)

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """The number of tokens of the answers."""
        return self.chat.normalizers(batch)

    def loss(self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor]) -> Tensor:
        """This batch's share of the mean over the step's tokens."""
        return self.chat.loss(model, batch, normalizers)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probabilities of each token of the answers, and of the likeliest one in its place."""  # (tokens, 2)
        return self.chat.outputs(model, batch)

    def metrics(self) -> Metrics:
        """Loss, perplexity, accuracy of the next token; BLEU and chrF."""
        return translation_metrics(self.task)

    def baseline(self, train: Encoded) -> Baseline:
        """Log frequency of each token in the training answers, and of the most frequent."""  # (tokens, 2)
        return self.chat.baseline(train)

    def predict(self, model: nn.Module, batch: Batch, outputs: Tensor | None = None) -> list[Answer]:
        """The translations, by beam search."""
        assert self.generator is not None, "it is set in bind"
        return [{"translation": text} for text in self.generator.generate(model, batch)]

    def preview(self, fields: Fields) -> Preview:
        """Tokens of the conversation."""
        return self.chat.preview(fields)


def conversation_task(settings: Generation, chat_template: str | None) -> TextGeneration:
    """The task of text-generation that translates by a decoder."""
    keys = {"form": "chat", "chat_template": chat_template, "general": "none", "generate": settings}
    return TextGeneration.model_validate(keys)
