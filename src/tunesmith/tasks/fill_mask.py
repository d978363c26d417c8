"""Masked language modelling: an encoder goes on learning a language, or the words of a field, from raw text.

    loss = mean over the chosen tokens of the cross-entropy of what stood there      (Devlin 2019, arXiv 1810.04805)

15 % of the tokens are chosen, whole words at a time; anew in each epoch in training, always the same in scoring.
Documents are joined and cut into blocks (`data/blocks.py`). A head that the checkpoint lacks is a new one, its decoder
tied to the input embeddings; it learns alone at first, since its random answers would pull the body about.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from tunesmith.data.batches import Batch, Ragged
from tunesmith.data.blocks import Segment, blocks
from tunesmith.data.encoded import Encoded
from tunesmith.data.formats import Row
from tunesmith.data.masks import Tokens, hide
from tunesmith.data.texts import unknown_notes
from tunesmith.errors import RecipeError
from tunesmith.kernels.chunked_loss import logits_at, token_loss
from tunesmith.metrics.language import TokenScores
from tunesmith.models.snippets import fetch_general, general_files
from tunesmith.models.sources import cache_home
from tunesmith.recipe import Data
from tunesmith.recipe_values import General
from tunesmith.tasks import Metrics, Task

MASK = "[MASK]"
"""How a user writes a mask, whatever the model calls its own."""

BEST_SHOWN = 5


class FillMask(Task):
    """Guesses hidden words: pretraining of an encoder on raw text of a field, before its task."""

    mask_share: float = Field(0.15, gt=0, lt=1, description="share of the tokens that are to be guessed")
    whole_words: bool = Field(True, description="choose whole words, not single tokens")
    segmenter: Literal["jieba"] | None = Field(
        None, description="divides Chinese into words (extra `chinese`); null: each character is one"
    )
    head_warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which a new head learns alone")
    general: General = "default"
    _tokens: Tokens | None = PrivateAttr(None)

    model_class: ClassVar[str] = "AutoModelForMaskedLM"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": (
            "text", "document", "content", "body", "passage", "article", "abstract", "sentence", "answer", "review",
            "文本", "内容",
        ),
    }  # fmt: skip
    required: ClassVar[frozenset[str]] = frozenset({"text"})
    base_has_head: ClassVar[bool] = True

    @property
    def rows_are_examples(self) -> bool:
        """Blocks are."""
        return False

    def target(self, row: Row) -> None:
        """A text is its own target."""

    def fit(self, targets: Sequence[Any], data: Data, where: str) -> tuple[Self, Data]:
        """Nothing is read off the targets; the segmenter must be there, and class weights have no meaning."""
        if data.class_weights is not None:
            raise RecipeError("data.class_weights: fill-mask has no classes", hint="leave the key out")
        if self.segmenter is not None:
            _segmenter(self.segmenter)
        return self, data

    def for_processor(self, processor: Any, config: Any = None) -> Self:
        """With the mask and the spelling of tokens.

        Raises:
            RecipeError: there is no mask, or no words can be told.
        """
        if self.whole_words and not processor.is_fast:
            what = f"task.whole_words: {type(processor).__name__} has no fast form, which alone tells words"
            raise RecipeError(what, hint="task.whole_words=false")
        ready = self.model_copy()
        ready._tokens = Tokens.of(processor)
        return ready

    @property
    def tokens(self) -> Tokens:
        """Of the tokenizer at work."""
        assert self._tokens is not None, "for_processor comes first"
        return self._tokens

    def fetch(self, say: Callable[[str], None], *, offline: bool) -> list[str]:
        """The general text, unless there is one or none is wanted."""
        return fetch_general(self.general, say, offline=offline)

    def others(self) -> dict[str, str]:
        """The general text."""
        return general_files(self.general)

    def head_alone(self) -> float:
        """`head_warmup`."""
        return self.head_warmup

    def pieces(self, rows: Iterable[Row], processor: Any, data: Data) -> Iterator[Row]:
        """Blocks of `max_length` tokens."""
        assert data.max_length is not None, "the run resolves max_length"
        segment = _segmenter(self.segmenter) if self.segmenter else None
        return blocks(rows, "text", processor, data.max_length, whole_words=self.whole_words, segment=segment)

    def encode(self, rows: Sequence[Row], processor: Any, data: Data) -> list[dict[str, Any]]:
        """Of a block its tokens and the number of each one's word; of a text to be filled in, where its masks are.

        Raises:
            DataError: there is no mask to fill in where the model reads.
        """
        return [dict(row.values) if "input_ids" in row.values else self._asked(row, processor, data) for row in rows]

    def tokens_read(self, processor: Any, max_length: int) -> int | None:
        """All: texts are joined and cut into blocks."""
        return None

    def _asked(self, row: Row, processor: Any, data: Data) -> dict[str, Any]:
        text = str(row.values["text"]).replace(MASK, processor.mask_token)
        coded = processor(text, truncation=True, max_length=data.max_length)
        ids = coded["input_ids"]
        masked = [place for place, token in enumerate(ids) if token == processor.mask_token_id]
        if not masked:
            beyond = f" within the first {data.max_length} tokens" if processor.mask_token in text else ""
            raise row.fault("text", f"no {MASK}{beyond}", f"write {MASK} where a word is missing")
        cut = any(one.overflowing for one in coded.encodings or ())
        return {"input_ids": ids, "masked": masked, "cut": int(cut)}

    def notes(self, encoded: Encoded, processor: Any) -> list[str]:
        """Unknown tokens above 5 %."""
        return unknown_notes(encoded, processor)

    def draw(self, batch: Batch, indices: NDArray[np.int64], seed: int = 0, epoch: int = 0) -> Batch:
        """Hides words of blocks; `masked` are their positions and `label` what stood there. Asked texts stay."""
        if "words" not in batch:
            return batch
        rows, words = batch.ragged("input_ids"), batch.ragged("words").values.numpy()
        ids, ends = rows.values.numpy(), rows.offsets.tolist()
        seen, places = [ids[:0]], [ids[:0]]
        for index, start, stop in zip(indices.tolist(), ends[:-1], ends[1:], strict=True):
            part = slice(start, stop)
            one = hide(ids[part], words[part], self.mask_share, self.tokens, seed=seed, epoch=epoch, index=index)
            seen.append(one[0])
            places.append(one[1])
        offsets = torch.from_numpy(np.cumsum([len(one) for one in places]))
        masked = Ragged(torch.from_numpy(np.concatenate(places)), offsets)
        flat = torch.repeat_interleave(rows.offsets[:-1], masked.lengths) + masked.values
        drawn = {
            "input_ids": Ragged(torch.from_numpy(np.concatenate(seen)), rows.offsets),
            "masked": masked,
            "label": Ragged(rows.values[flat], offsets),
        }
        return replace(batch, fields=drawn)

    def num_outputs(self, batch: Batch) -> int:
        """One for each mask."""
        return len(batch.ragged("masked").values)

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """The number of tokens to be guessed."""
        return {"tokens": torch.tensor(float(self.num_outputs(batch)))}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits in fp32 at the masks, of all texts in a row."""  # (masks, vocabulary)
        return logits_at(model, *_asked_of(model, batch))

    def loss(
        self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor], label_smoothing: float = 0.0
    ) -> Tensor:
        """This batch's share of the mean over the step's tokens."""
        labels = batch.ragged("label").values
        return token_loss(model, *_asked_of(model, batch), labels, label_smoothing) / normalizers["tokens"].clamp_min(1)

    def metrics(self) -> Metrics:
        """Loss, perplexity, accuracy."""
        return TokenScores()

    def metric(self) -> str:
        """The loss."""
        return "loss"

    def prior(self, encoded: Encoded) -> Tensor:
        """Log frequency of each token in the training text."""  # (vocabulary,)
        words = torch.from_numpy(np.asarray(encoded.column("words")) >= 0)
        ids = torch.from_numpy(np.asarray(encoded.column("input_ids"), dtype=np.int64))[words]
        counts = torch.bincount(ids, minlength=len(self.tokens.spelling)).float() + 1.0  # of a token never seen too
        return (counts / counts.sum()).log()

    def answers(self, outputs: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """For each mask of a text the best tokens with their probabilities."""
        scores, best = outputs.softmax(-1).topk(min(BEST_SHOWN, outputs.shape[-1]))
        found = [
            [{"token": self.tokens.spelling[token], "score": score} for token, score in zip(*one, strict=True)]
            for one in zip(best.tolist(), scores.tolist(), strict=True)
        ]
        ends = batch.ragged("masked").offsets.tolist()
        return [{"masks": found[start:stop]} for start, stop in zip(ends[:-1], ends[1:], strict=True)]


def _segmenter(name: str) -> Segment:
    """What divides Chinese into words.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import jieba
    except ImportError:
        what = f"task.segmenter: {name} is not installed"
        hint = "pip install 'tunesmith[chinese]', or leave the key out: each character is a word then"
        raise RecipeError(what, hint=hint) from None
    jieba.setLogLevel(logging.WARNING)
    cache_home().mkdir(parents=True, exist_ok=True)
    jieba.dt.tmp_dir = str(cache_home())  # it reads its cache by marshal: not from where anybody may write
    cut: Callable[[str], Iterable[str]] = jieba.dt.cut
    return cut


def _asked_of(model: Any, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What the model reads, and text and place of each mask."""
    rows, masked = batch.ragged("input_ids"), batch.ragged("masked")
    inputs = {"input_ids": rows.padded(model.config.pad_token_id or 0), "attention_mask": rows.mask()}
    text = torch.repeat_interleave(torch.arange(batch.size, device=masked.values.device), masked.lengths)
    return inputs, text, masked.values
