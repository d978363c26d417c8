"""Translation: a text in one language becomes one in another, by an encoder-decoder.

    loss = mean over the target's tokens, the end among them, of the cross-entropy      (Vaswani 2017, arXiv 1706.03762)

The decoder reads the target shifted by one, as its family shifts it, and the vocabulary's map is computed at the
target's tokens alone. How a model is told the languages is in `models/directions.py`. A translation is found by beam
search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from tunesmith.data import languages
from tunesmith.data.batches import Batch
from tunesmith.data.encoded import Encoded
from tunesmith.data.findings import Fault
from tunesmith.data.formats import Row
from tunesmith.data.pairs import pair_faults
from tunesmith.data.texts import as_bytes, cut_texts, unknown_notes
from tunesmith.errors import DataError, RecipeError
from tunesmith.kernels.logits import logits_at
from tunesmith.metrics.language import WrittenScores
from tunesmith.metrics.texts import TextScores
from tunesmith.models.directions import Direction, direction
from tunesmith.models.load import UNBOUNDED
from tunesmith.models.writing import write
from tunesmith.recipe import Data
from tunesmith.recipe_values import Generation
from tunesmith.tasks import Metrics, Task

IGNORED = -100
"""What a decoder shifts into padding."""

BLEU_TOKENS = {"zh": "zh", "ja": "char", "th": "char", "km": "char", "my": "char"}
"""Language -> how sacrebleu divides it into words; others by their blanks and marks (13a)."""


class Translation(Task):
    """Translates texts from one language into another."""

    source_lang: str | None = Field(
        None, min_length=2, description="language that is read, e.g. en; null: from the names of the columns"
    )
    target_lang: str | None = Field(None, min_length=2, description="language that is written, likewise")
    prefix: str | None = Field(None, description="put before each source; null: what the model was made with")
    num_beams: int = Field(4, ge=1, description="how many beginnings are followed at once in writing; 1: greedy")
    max_new_tokens: int = Field(128, ge=1, description="tokens of a translation at most")
    scored_rows: int = Field(
        2000, ge=1, description="rows of a split for which translations are written to be scored, evenly spread"
    )

    model_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "source": (
            "source", "src", "source_text", "source_sentence", "original", "input", "text", "原文", "源文",
        ),
        "target": (
            "target", "tgt", "target_text", "target_sentence", "translation", "translated", "reference", "output",
            "译文", "目标",
        ),
    }  # fmt: skip
    required: ClassVar[frozenset[str]] = frozenset({"source", "target"})
    base_has_head: ClassVar[bool] = True
    text_scores: ClassVar[frozenset[str]] = frozenset({"bleu", "chrf"})
    _processor: Any = PrivateAttr(None)
    _direction: Direction | None = PrivateAttr(None)
    _config: Any = PrivateAttr(None)

    def usual_names(self) -> dict[str, tuple[str, ...]]:
        """A column may be named after its language."""
        given = {"source": self.source_lang, "target": self.target_lang}
        spoken = {role: languages.column_names(code) for role, code in given.items() if code is not None}
        return {role: (*spoken.get(role, ()), *names) for role, names in self.columns.items()}

    def named(self, columns: Mapping[str, str | int]) -> Self:
        """With the languages that columns are named after."""
        said = {f"{role}_lang": str(column) for role, column in columns.items() if languages.language(str(column))}
        return self.model_copy(update={key: code for key, code in said.items() if getattr(self, key, code) is None})

    def target(self, row: Row) -> tuple[str, str, bool]:
        """In which scripts source and target are, and whether they are the same."""
        source, target = str(row.values["source"]).strip(), str(row.values["target"]).strip()
        return languages.script_of(source), languages.script_of(target), source == target

    def fit(self, targets: Sequence[tuple[str, str, bool]], data: Data, where: str) -> tuple[Self, Data]:
        """Nothing is read off the pairs, but most of them must be translations, in the direction that was said."""
        if data.class_weights is not None:
            raise RecipeError("data.class_weights: translation has no classes", hint="leave the key out")
        same = sum(copied for _, _, copied in targets)
        if same > len(targets) / 2:
            what = f"the target of {same:,} of {len(targets):,} rows is the source itself"
            raise DataError(what, where=where, hint="data.columns.target=NAME if it is another column")
        wanted = tuple(languages.script_of_language(code or "") for code in (self.source_lang, self.target_lang))
        scripts = Counter((source, target) for source, target, _ in targets)
        if None not in wanted and wanted[0] != wanted[1] and scripts[wanted[::-1]] > len(targets) / 2:  # type: ignore[index]
            what = (
                f"most sources are not in {self.source_lang} but in {self.target_lang}, and targets the other way round"
            )
            raise DataError(what, where=where, hint="exchange data.columns.source and target, or the task's languages")
        return self, data

    def strata(self, targets: Sequence[Any]) -> None:
        """There are no classes."""

    def head_config(self) -> dict[str, Any]:
        """The model's own."""
        return {}

    def for_processor(self, processor: Any, config: Any = None) -> Self:
        """With the way in which this model is told the languages.

        Raises:
            RecipeError: it has to be told a language that is not given, or that it does not know.
        """
        ready = self.model_copy()
        ready._direction = direction(processor, config, self.source_lang, self.target_lang, self.prefix)
        ready._processor, ready._config = processor, config
        return ready

    @property
    def _told(self) -> Direction:
        assert self._direction is not None, "for_processor comes first"
        return self._direction

    def encode(self, rows: Sequence[Row], processor: Any, data: Data) -> list[dict[str, Any]]:
        """Tokens of the source (`input_ids`) and, where there is a target, of it (`label`), whether either was cut, how
        long both are (`length`), and the target as it is written (`reference`, UTF-8 bytes).

        Raises:
            DataError: of a text nothing is left as tokens.
        """
        assert data.max_length is not None, "the run resolves max_length"
        sources = [self._told.prefix + str(row.values["source"]).strip() for row in rows]
        places = [row.place for row in rows]
        coded = cut_texts(sources, processor, data.max_length, "source", places)
        fields: list[dict[str, Any]] = [{"input_ids": ids, "cut": int(cut), "length": len(ids)} for ids, cut in coded]
        if not all("target" in row.values for row in rows):
            return fields
        targets = [str(row.values["target"]).strip() for row in rows]
        written = cut_texts(targets, processor, data.max_length, "target", places, written=True)
        for one, row, text, (ids, cut) in zip(fields, rows, targets, written, strict=True):
            ids = (
                ids
                if self._config.eos_token_id in ids[-2:]
                else [*ids[: data.max_length - 1], self._config.eos_token_id]
            )
            same = int(str(row.values["source"]).strip() == text)
            one |= {"label": ids, "length": one["length"] + len(ids), "cut_target": int(cut), "same": same}
            one["reference"] = as_bytes(text)
        return fields

    def notes(self, encoded: Encoded, processor: Any) -> list[str]:
        """Texts cut, targets that are their sources, and unknown tokens above 5 %."""
        counts = {name: int(encoded.column(name).sum()) for name in ("cut", "cut_target", "same")}
        said = {
            "cut": "sources are longer than is read and were cut (raise data.max_length)",
            "cut_target": "targets are longer than is written and were cut (raise data.max_length)",
            "same": "targets are their sources word for word (`data check` names them)",
        }
        notes = [f"{count} of {len(encoded)} {said[name]}" for name, count in counts.items() if count]
        return notes + unknown_notes(encoded, processor)

    def faults(self, rows: Iterable[Row]) -> Iterator[Fault]:
        """Pairs that are no translations."""
        return pair_faults(rows)

    def num_outputs(self, batch: Batch) -> int:
        """One for each token of the targets."""
        return len(batch.ragged("label").values)

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """The number of tokens of the targets."""
        return {"tokens": torch.tensor(float(self.num_outputs(batch)))}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits in fp32 at the targets' tokens, all targets in a row."""  # (tokens, vocabulary)
        labels = batch.ragged("label")
        inputs = self._inputs(batch) | {
            "decoder_input_ids": _shifted(model, labels.padded(IGNORED)),
            "use_cache": False,
        }
        row, place = labels.mask().nonzero(as_tuple=True)
        return logits_at(model, inputs, row, place)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        rows = batch.ragged("input_ids")
        return {"input_ids": rows.padded(self._config.pad_token_id or 0), "attention_mask": rows.mask()}

    def loss(
        self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor], label_smoothing: float = 0.0
    ) -> Tensor:
        """This batch's share of the mean over the step's tokens."""
        logits, labels = self.forward(model, batch), batch.ragged("label").values
        total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
        return total / normalizers["tokens"]

    @property
    def rows_written(self) -> int:
        """`scored_rows`."""
        return self.scored_rows

    def written(self, model: nn.Module, batch: Batch) -> list[str]:
        """The translations, by beam search."""
        told, config = self._told, self._config
        begin = {"forced_bos_token_id": told.first, "decoder_start_token_id": told.start}
        ids = write(
            model,
            batch.ragged("input_ids"),
            Generation.model_validate({"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}),
            pad=config.pad_token_id,
            stop=(config.eos_token_id,),
            limit=getattr(config, "max_position_embeddings", None) or UNBOUNDED,
            **{name: token for name, token in begin.items() if token is not None},
        )
        return [text.strip() for text in self._processor.batch_decode(ids, skip_special_tokens=True)]

    def metrics(self) -> Metrics:
        """Loss, perplexity, accuracy of the next token; BLEU and chrF of what is written."""
        known = languages.language(self.target_lang or "")
        tokenize = BLEU_TOKENS.get(known.two if known else "", "13a")
        return WrittenScores(TextScores(["bleu", "chrf"], tokenize=tokenize))

    def metric(self) -> str:
        """The loss."""
        return "loss"

    def prior(self, encoded: Encoded) -> Tensor:
        """Log frequency of each token in the training targets."""  # (vocabulary,)
        ids = torch.from_numpy(np.asarray(encoded.column("label"), dtype=np.int64))
        counts = torch.bincount(ids, minlength=self._config.vocab_size).float() + 1.0  # of a token never seen too
        return (counts / counts.sum()).log()

    def answers(self, outputs: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Nothing: a translation is written, not read off one pass."""
        return [{} for _ in range(batch.size)]

    def completed(self, answer: dict[str, Any], row: Row) -> dict[str, Any]:
        """The text by its name."""
        return {"translation": answer["text"]}


def _shifted(model: Any, labels: Tensor) -> Tensor:
    """What a decoder reads to write the labels, as its family shifts them."""  # (batch, tokens)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        made: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return made
    start = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)  # M2M-100, NLLB, Blenderbot
    moved = torch.cat([start, labels[:, :-1]], 1)
    return moved.masked_fill(moved == IGNORED, model.config.pad_token_id)
