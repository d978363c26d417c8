"""Masked language modeling: domain-adaptive pretraining of an encoder on raw text.

    loss = mean cross-entropy over the masked tokens      (Devlin 2019, arXiv 1810.04805)

15 % of the tokens are masked, in whole words; the mask is drawn anew in each training epoch and fixed in evaluation.
Documents are joined and cut into blocks (`data/text/blocks.py`). If the checkpoint has no LM head, a new one is tied to
the input embeddings and trained alone at first, because the gradients of a random head would harm the encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from tunesmith.data.batches import Batch, Ragged
from tunesmith.data.columns import Column
from tunesmith.data.encoded import Encoded, Fields
from tunesmith.data.formats import Row
from tunesmith.data.preview import Preview
from tunesmith.data.text.blocks import Segment, make_blocks
from tunesmith.data.text.masking import MaskingVocabulary, mask_tokens
from tunesmith.data.text.texts import inspect_texts, preview_tokens, spell, token_costs, unknown_notes
from tunesmith.errors import RecipeError
from tunesmith.kernels.chunked_loss import logits_at, token_loss
from tunesmith.metrics.language import MaskedTokenMetrics
from tunesmith.models.snippets import fetch_general, general_files
from tunesmith.models.sources import cache_home
from tunesmith.recipe import Data
from tunesmith.recipe.fields import General
from tunesmith.tasks import Answer, Baseline, BoundTask, Inspection, Metrics, Task, _samples

MASK = "[MASK]"
"""The mask in user input, for every model."""

TOP_K = 5
"""Tokens in the answer for each mask."""


COLUMNS = (
    Column(
        "text",
        "text",
        (
            "document", "content", "body", "passage", "article", "abstract", "sentence", "answer", "review",
            "文本", "内容",
        ),
    ),
)  # fmt: skip


class FillMask(Task):
    """Predicts masked words: domain-adaptive pretraining of an encoder on raw text, before its task."""

    mask_share: float = Field(0.15, gt=0, lt=1, description="fraction of the tokens that are masked")
    whole_words: bool = Field(True, description="mask whole words, not single tokens")
    segmenter: Literal["jieba"] | None = Field(
        None, description="word segmenter for Chinese (extra `chinese`); null: each character is a word"
    )
    head_warmup: float = Field(0.1, ge=0, lt=1, description="fraction of steps in which only a new head is trained")
    general: General = "default"

    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    data_keys: ClassVar[frozenset[str]] = frozenset({"max_length"})
    example_input: ClassVar[str] = f"... {MASK} ..."
    baseline_name: ClassVar[str] = "token-frequency baseline"
    base_has_head: ClassVar[bool] = True

    @property
    def columns(self) -> Sequence[Column]:
        """Text."""
        return COLUMNS

    @property
    def head_warmup_ratio(self) -> float:
        """Fraction of steps in which only a new head is trained."""
        return self.head_warmup

    def parse_target(self, row: Row) -> None:
        """Return None: a text is its own target."""

    def fit(self, targets: Sequence[Any], data: Data) -> tuple[Self, Data]:
        """Check that the segmenter is installed."""
        if self.segmenter is not None:
            _segmenter(self.segmenter)
        return self, data

    def sample_row(self, number: int) -> dict[str, object]:
        """Return several reviews as one text."""
        return {"text": _samples.document(number)}

    def extra_eval_sets(self) -> dict[str, str]:
        """Return the general-domain text."""
        return general_files(self.general)

    def fetch(self, say: Callable[[str], None], *, offline: bool) -> list[str]:
        """Download the general-domain text, unless it is cached or `general` is none."""
        return fetch_general(self.general, say, offline=offline)

    def bind(self, processor: Any, config: Any, data: Data, label_smoothing: float = 0.0) -> BoundTask:
        """Return the bound task.

        Raises:
            RecipeError: the tokenizer has no mask token, or no word boundaries.
        """
        if self.whole_words and not processor.is_fast:
            what = f"task.whole_words: {type(processor).__name__} is not a fast tokenizer, so it has no word boundaries"
            raise RecipeError(what, hint="set task.whole_words=false")
        return BoundFillMask(
            self,
            processor,
            config,
            data,
            label_smoothing,
            tokens=MaskingVocabulary.of(processor),
            rows_are_examples=False,
            deterministic_inputs=False,
        )

    def render(self, answer: Answer, row: Row) -> str:
        """Return the top tokens for each mask."""
        return "; ".join(", ".join(f"'{one['token']}' {one['score']:.3f}" for one in mask) for mask in answer["masks"])


@dataclass(frozen=True, eq=False, kw_only=True)
class BoundFillMask(BoundTask):
    """Masked language modeling bound to a tokenizer and a model config."""

    tokens: MaskingVocabulary

    def chunks(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield blocks of `max_length` tokens."""
        segment = _segmenter(self.task.segmenter) if self.task.segmenter else None
        length, whole_words = self.data.max_length, self.task.whole_words
        assert length is not None, "assemble sets max_length"
        return make_blocks(rows, "text", self.processor, length, whole_words=whole_words, segment=segment)

    def encode(self, rows: Sequence[Row]) -> list[Fields]:
        """Return the tokens of a block with their word numbers; for a text with masks, the mask positions.

        Raises:
            DataError: there is no mask within `max_length` tokens.
        """
        return [dict(row.values) if "input_ids" in row.values else self._encode_masked(row) for row in rows]

    def _encode_masked(self, row: Row) -> Fields:
        text = str(row.values["text"]).replace(MASK, self.processor.mask_token)
        coded = self.processor(text, truncation=True, max_length=self.data.max_length)
        ids = coded["input_ids"]
        masked = [place for place, token in enumerate(ids) if token == self.processor.mask_token_id]
        if not masked:
            beyond = f" within the first {self.data.max_length} tokens" if self.processor.mask_token in text else ""
            raise row.fault("text", f"no {MASK}{beyond}", f"write {MASK} in place of a word")
        cut = any(encoding.overflowing for encoding in coded.encodings or ())
        return {"input_ids": ids, "masked": masked, "cut": int(cut)}

    def costs(self, encoded: Encoded) -> NDArray[np.int64]:
        """Return the number of tokens of each block."""
        return token_costs(encoded)

    def notes(self, encoded: Encoded) -> list[str]:
        """Return a note on unknown tokens above 5 %."""
        return unknown_notes(encoded, self.processor)

    def transform(self, batch: Batch, indices: NDArray[np.int64], seed: int = 0, epoch: int = 0) -> Batch:
        """Mask words of blocks: `masked` has the positions, `label` the original tokens. Texts with masks are kept."""
        if "words" not in batch:
            return batch
        rows, words = batch.ragged("input_ids"), batch.ragged("words").values.numpy()
        ids, ends = rows.values.numpy(), rows.offsets.tolist()
        share = self.task.mask_share
        masked_ids, positions = [ids[:0]], [ids[:0]]
        for index, start, stop in zip(indices.tolist(), ends[:-1], ends[1:], strict=True):
            part = slice(start, stop)
            drawn = mask_tokens(ids[part], words[part], share, self.tokens, seed=seed, epoch=epoch, index=index)
            masked_ids.append(drawn[0])
            positions.append(drawn[1])
        offsets = torch.from_numpy(np.cumsum([len(example) for example in positions]))
        masked = Ragged(torch.from_numpy(np.concatenate(positions)), offsets)
        flat = torch.repeat_interleave(rows.offsets[:-1], masked.lengths) + masked.values
        fields = {
            "input_ids": Ragged(torch.from_numpy(np.concatenate(masked_ids)), rows.offsets),
            "masked": masked,
            "label": Ragged(rows.values[flat], offsets),
        }
        return replace(batch, fields=fields)

    def model_inputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Return padded blocks."""
        rows = batch.ragged("input_ids")
        return [{"input_ids": rows.padded(self.config.pad_token_id or 0), "attention_mask": rows.mask()}]

    def _at_masks(self, batch: Batch) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Return the model's arguments, and row and position of each mask."""
        (inputs,), masked = self.model_inputs(batch), batch.ragged("masked")
        row = torch.repeat_interleave(torch.arange(batch.size, device=masked.values.device), masked.lengths)
        return inputs, row, masked.values

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """Return the number of masked tokens."""
        return {"tokens": torch.tensor(float(len(batch.ragged("masked").values)))}

    def loss(self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor]) -> Tensor:
        """Return this batch's share of the mean over the masked tokens of the step."""
        labels = batch.ragged("label").values
        total = token_loss(model, *self._at_masks(batch), labels, self.label_smoothing)
        return total / normalizers["tokens"].clamp_min(1)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the fp32 logits at the masks of all rows."""  # (masks, vocabulary)
        return logits_at(model, *self._at_masks(batch))

    def metrics(self) -> Metrics:
        """Return the metrics: loss, perplexity, accuracy."""
        return MaskedTokenMetrics()

    def baseline(self, train: Encoded) -> Baseline:
        """Return a predictor of the token frequencies of the training text."""  # (masks, vocabulary)
        words = torch.from_numpy(np.asarray(train.column("words")) >= 0)
        ids = torch.from_numpy(np.asarray(train.column("input_ids"), dtype=np.int64))[words]
        counts = torch.bincount(ids, minlength=len(self.tokens.spelling)).float() + 1.0  # add-one smoothing
        prior = (counts / counts.sum()).log()
        return lambda batch: prior.expand(len(batch.ragged("masked").values), -1)

    def predict(self, model: nn.Module, batch: Batch, outputs: Tensor | None = None) -> list[Answer]:
        """Return the top tokens of each mask with their probabilities."""
        logits = self.outputs(model, batch) if outputs is None else outputs
        scores, best = logits.softmax(-1).topk(min(TOP_K, logits.shape[-1]))
        masks = [
            [{"token": self.tokens.spelling[token], "score": score} for token, score in zip(*one, strict=True)]
            for one in zip(best.tolist(), scores.tolist(), strict=True)
        ]
        ends = batch.ragged("masked").offsets.tolist()
        return [{"masks": masks[start:stop]} for start, stop in zip(ends[:-1], ends[1:], strict=True)]

    def preview(self, fields: Fields) -> Preview:
        """Return the tokens, and the original token at each mask."""
        labels = spell(fields["label"], self.processor)
        masked = dict(zip(fields["masked"], labels, strict=True))
        targets = [masked.get(place) for place in range(len(fields["input_ids"]))]
        return preview_tokens(fields, self.processor, targets=targets)

    def inspect(self, rows: Sequence[Row]) -> Inspection:
        """Return the number of tokens of each text; texts are joined and cut into blocks."""
        sizes, unknown = inspect_texts([[str(row.values["text"])] for row in rows], self.processor)
        return Inspection(sizes, unknown, None, "data.max_length")


def _segmenter(name: str) -> Segment:
    """Return the word segmenter for Chinese.

    Raises:
        RecipeError: the segmenter is not installed.
    """
    try:
        import jieba
    except ImportError:
        what = f"task.segmenter: {name} is not installed"
        hint = "run pip install 'tunesmith[chinese]', or leave the key out (each character is a word)"
        raise RecipeError(what, hint=hint) from None
    jieba.setLogLevel(logging.WARNING)
    cache_home().mkdir(parents=True, exist_ok=True)
    jieba.dt.tmp_dir = str(cache_home())  # its cache is read with marshal, so it must not be in a world-writable folder
    cut: Callable[[str], Iterable[str]] = jieba.dt.cut
    return cut
