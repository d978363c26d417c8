"""Translation: a text in one language becomes one in another, by an encoder-decoder or by a decoder that is asked to.

    loss = mean over the target's tokens, the end among them, of the cross-entropy      (Vaswani 2017, arXiv 1706.03762)

An encoder-decoder reads the source and writes the target; how its family is told the languages is in
`models/directions.py`. A decoder is asked, `Translate from English to German: ...`, and answers: a conversation of
text-generation, which does the rest. Translations are found by beam search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from pydantic import AfterValidator, Field, PrivateAttr
from torch import Tensor, nn

from tunesmith.data import languages
from tunesmith.data.batches import Batch
from tunesmith.data.encoded import Encoded
from tunesmith.data.findings import Fault
from tunesmith.data.formats import Row
from tunesmith.data.pairs import pair_faults
from tunesmith.data.templates import template_text
from tunesmith.data.texts import as_bytes, cut_texts, unknown_notes
from tunesmith.errors import DataError, RecipeError
from tunesmith.kernels.logits import IGNORED, logits_at, shifted
from tunesmith.kernels.vocabulary import token_loss
from tunesmith.metrics.language import SurpriseScores
from tunesmith.metrics.texts import TextScores
from tunesmith.models.directions import Direction, direction
from tunesmith.models.load import UNBOUNDED
from tunesmith.models.writing import write
from tunesmith.recipe import Data
from tunesmith.recipe_values import Generation
from tunesmith.tasks import Metrics, WritingTask
from tunesmith.tasks.text_generation import TextGeneration

SCORES = ("bleu", "chrf")
BLEU_TOKENS = {"zh": "zh", "ja": "char", "th": "char", "km": "char", "my": "char"}
"""Language -> how sacrebleu divides it into words; others by their blanks and marks (13a)."""


class Translation(WritingTask):
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
    chat_template: Annotated[str, AfterValidator(template_text)] | None = Field(
        None, description="of a decoder: plain, chatml ..., or a Jinja file; default: the model's own, else plain"
    )
    _told: Direction | None = PrivateAttr(None)
    _processor: Any = PrivateAttr(None)
    _config: Any = PrivateAttr(None)
    _chat: TextGeneration | None = PrivateAttr(None)
    """What a decoder translates by."""

    model_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    example_model: ClassVar[str] = "Helsinki-NLP/opus-mt-en-de"
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
    text_scores: ClassVar[frozenset[str]] = frozenset(SCORES)

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
        TextScores(SCORES)  # whose library may be missing
        same = sum(copied for _, _, copied in targets)
        if same > len(targets) / 2:
            what = f"the target of {same:,} of {len(targets):,} rows is the source itself"
            raise DataError(what, where=where, hint="data.columns.target=NAME if it is another column")
        wanted = tuple(languages.script_of_language(code or "") for code in (self.target_lang, self.source_lang))
        scripts = Counter[Any]((source, target) for source, target, _ in targets)
        if None not in wanted and wanted[0] != wanted[1] and scripts[wanted] > len(targets) / 2:
            what = f"most sources are in the script of {self.target_lang}, and targets in that of {self.source_lang}"
            raise DataError(what, where=where, hint="exchange data.columns.source and target, or the task's languages")
        return self, data

    def for_processor(self, processor: Any, config: Any = None) -> Self:
        """With the way in which this model is told the languages.

        Raises:
            RecipeError: it has to be told a language that is not given, or that it does not know.
        """
        ready = self.model_copy()
        ready._told = direction(processor, config, self.source_lang, self.target_lang, self.prefix)
        ready._processor, ready._config = processor, config
        if not config.is_encoder_decoder:
            how = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
            keys = {"form": "chat", "chat_template": self.chat_template, "general": "none", "generate": how}
            ready._chat = TextGeneration.model_validate(keys).for_processor(processor, config)
        return ready

    @property
    def _direction(self) -> Direction:
        assert self._told is not None, "for_processor comes first"
        return self._told

    def encode(self, rows: Sequence[Row], processor: Any, data: Data) -> list[dict[str, Any]]:
        """Tokens of the source (`input_ids`) and, where there is a target, of it (`label`), whether either was cut, how
        long both are (`length`), and the target as it is written (`reference`, UTF-8 bytes). Of a decoder the fields of
        a conversation.

        Raises:
            DataError: of a text nothing is left as tokens.
        """
        assert data.max_length is not None, "the run resolves max_length"
        sources, targets = self._texts(rows)
        if self._chat is not None:
            fields = self._chat.encode(_conversations(rows, sources, targets), processor, data)
        else:
            fields = self._pairs(rows, sources, targets, data.max_length)
        for one, row, text in zip(fields, rows, targets, strict=False):
            same = int(str(row.values["source"]).strip() == text)
            one |= {"same": same, "reference": as_bytes(text)}
        return fields

    def _texts(self, rows: Sequence[Row]) -> tuple[list[str], list[str]]:
        """Sources with what stands before each, and targets where there are any."""
        sources = [self._direction.prefix + str(row.values["source"]).strip() for row in rows]
        return sources, [str(row.values["target"]).strip() for row in rows if "target" in row.values]

    def _pairs(
        self, rows: Sequence[Row], sources: list[str], targets: list[str], max_length: int
    ) -> list[dict[str, Any]]:
        places = [row.place for row in rows]
        coded = cut_texts(sources, self._processor, max_length, "source", places)
        fields: list[dict[str, Any]] = [{"input_ids": ids, "cut": int(cut), "length": len(ids)} for ids, cut in coded]
        if targets:
            end = self._config.eos_token_id
            for one, (ids, cut) in zip(
                fields, cut_texts(targets, self._processor, max_length, "target", places, written=True), strict=True
            ):
                ids = ids if end in ids[-2:] else [*ids[: max_length - 1], end]
                one |= {"label": ids, "length": one["length"] + len(ids), "cut_target": int(cut)}
        return fields

    def notes(self, encoded: Encoded, processor: Any) -> list[str]:
        """Texts cut, targets that are their sources, and unknown tokens above 5 %."""
        said = {
            "cut": "sources are longer than is read and were cut (raise data.max_length)",
            "cut_target": "targets are longer than is written and were cut (raise data.max_length)",
            "same": "targets are their sources word for word (`data check` names them)",
        }
        if self._chat is not None:
            del said["cut"]  # of a conversation it says what of the answer is lost
        counts = {name: int(encoded.column(name).sum()) for name in said.keys() & encoded.fields.keys()}
        notes = [f"{counts[name]} of {len(encoded)} {what}" for name, what in said.items() if counts.get(name)]
        return notes + (self._chat.notes(encoded, processor) if self._chat else unknown_notes(encoded, processor))

    def faults(self, rows: Iterable[Row]) -> Iterator[Fault]:
        """Pairs that are no translations."""
        return pair_faults(rows)

    def token_faults(
        self, rows: Sequence[Row], processor: Any, data: Data
    ) -> tuple[list[list[int]], list[Fault]] | None:
        """Of the sources, and what of targets is cut off; of a decoder those of conversations."""
        sources, targets = self._texts(rows)
        if self._chat is not None:
            return self._chat.token_faults(_conversations(rows, sources, targets), processor, data)
        assert data.max_length is not None, "the check knows it"
        what, fix = f"a target is longer than the {data.max_length} tokens that are written", "raise data.max_length"
        written = processor(text_target=targets, verbose=False)["input_ids"]
        faults = [
            Fault("target-cut", what, row.place, f"{len(ids)} tokens: {text}", fix)
            for row, text, ids in zip(rows, targets, written, strict=True)
            if len(ids) > data.max_length
        ]
        return [list(ids) for ids in processor(sources, verbose=False)["input_ids"]], faults

    def num_outputs(self, batch: Batch) -> int:
        """One for each token of the targets."""
        return self._chat.num_outputs(batch) if self._chat is not None else len(batch.ragged("label").values)

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """The number of tokens of the targets."""
        return {"tokens": torch.tensor(float(self.num_outputs(batch)))}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probabilities of each token of the targets, and of the one that was likeliest there."""  # (tokens, 2)
        if self._chat is not None:
            return self._chat.forward(model, batch)
        logits, labels = logits_at(model, *self._asked(model, batch)), batch.ragged("label").values
        found = torch.stack([logits.gather(1, labels[:, None])[:, 0], logits.amax(1)], 1)
        return found - logits.logsumexp(1, keepdim=True)

    def _asked(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Any], Tensor, Tensor]:
        """What the model reads, and the row and place of each token of the targets."""
        rows, labels = batch.ragged("input_ids"), batch.ragged("label")
        inputs = {
            "input_ids": rows.padded(self._config.pad_token_id or 0),
            "attention_mask": rows.mask(),
            "decoder_input_ids": shifted(model, labels.padded(IGNORED)),
            "use_cache": False,
        }
        row, place = labels.mask().nonzero(as_tuple=True)
        return inputs, row, place

    def loss(
        self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor], label_smoothing: float = 0.0
    ) -> Tensor:
        """This batch's share of the mean over the step's tokens."""
        if self._chat is not None:
            return self._chat.loss(model, batch, normalizers, label_smoothing)
        labels = batch.ragged("label").values
        return token_loss(model, *self._asked(model, batch), labels, label_smoothing) / normalizers["tokens"]

    def rows_written(self, encoded: Encoded) -> int:
        """At most `scored_rows`."""
        return min(self.scored_rows, len(encoded))

    def written(self, model: nn.Module, batch: Batch) -> list[str]:
        """The translations, by beam search."""
        if self._chat is not None:
            return self._chat.written(model, batch)
        config = self._config
        begin = {"forced_bos_token_id": self._direction.first, "decoder_start_token_id": self._direction.start}
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

    def told(self, row: Row) -> tuple[str, str]:
        """Source and target."""
        return str(row.values["source"]), str(row.values["target"])

    def metrics(self) -> Metrics:
        """Loss, perplexity, accuracy of the next token; BLEU and chrF of what is written."""
        known = languages.language(self.target_lang or "")
        return SurpriseScores(TextScores(SCORES, tokenize=BLEU_TOKENS.get(known.two if known else "", "13a")))

    def metric(self) -> str:
        """The loss."""
        return "loss"

    def prior(self, encoded: Encoded) -> Tensor:
        """Log frequency of each token in the training targets."""  # (vocabulary,)
        if self._chat is not None:
            return self._chat.prior(encoded)
        frequency = torch.from_numpy(np.bincount(encoded.column("label"), minlength=self._config.vocab_size)) + 1.0
        return (frequency / frequency.sum()).log().float()

    def guess(self, prior: Tensor, batch: Batch) -> Tensor:
        """That log frequency of each token of the targets, and of the most frequent."""  # (tokens, 2)
        if self._chat is not None:
            return self._chat.guess(prior, batch)
        found = prior[batch.ragged("label").values]
        return torch.stack([found, prior.max().expand_as(found)], 1)

    def completed(self, answer: dict[str, Any], row: Row) -> dict[str, Any]:
        """The text by its name."""
        return {"translation": answer["generated_text"]}


def _conversations(rows: Sequence[Row], sources: list[str], targets: list[str]) -> list[Row]:
    """Rows as a decoder is asked, and answers where there are targets."""
    asked = [{"role": "user", "content": source} for source in sources]
    if not targets:
        return [Row(row.place, {"asked": [one], "choices": []}) for row, one in zip(rows, asked, strict=True)]
    said = [{"role": "assistant", "content": target} for target in targets]
    return [Row(row.place, {"messages": [*pair]}) for row, *pair in zip(rows, asked, said, strict=True)]
