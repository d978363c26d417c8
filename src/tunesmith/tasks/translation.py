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
from tunesmith.data.texts import as_bytes
from tunesmith.errors import DataError, RecipeError, shorten
from tunesmith.metrics.language import SurpriseScores
from tunesmith.metrics.texts import TextScores
from tunesmith.models.directions import direction
from tunesmith.recipe import Data
from tunesmith.recipe.fields import Generation
from tunesmith.tasks import Metrics, WritingTask
from tunesmith.tasks._translators import Decoder, EncoderDecoder, Translator

SCORES = ("bleu", "chrf")
SAME = "targets are their sources word for word (`data check` names them)"
BLEU_TOKENS = {"zh": "zh", "ja": "char", "th": "char", "km": "char", "my": "char"}
"""Language -> how sacrebleu divides it into words; others by their blanks and marks (13a)."""


class Translation(WritingTask):
    """Translates texts from one language into another."""

    source_lang: Annotated[str, AfterValidator(languages.checked)] | None = Field(
        None, description="language that is read, e.g. en; null: from the names of the columns"
    )
    target_lang: Annotated[str, AfterValidator(languages.checked)] | None = Field(
        None, description="language that is written, likewise"
    )
    prefix: str | None = Field(None, description="put before each source; null: what the model was made with")
    num_beams: int = Field(4, ge=1, description="how many beginnings are followed at once in writing; 1: greedy")
    max_new_tokens: int = Field(128, ge=1, description="tokens of a translation at most")
    scored_rows: int = Field(
        2000, ge=1, description="rows of a split for which translations are written to be scored, evenly spread"
    )
    chat_template: Annotated[str, AfterValidator(template_text)] | None = Field(
        None, description="of a decoder: plain, chatml ..., or a Jinja file; default: the model's own, else plain"
    )
    _translator: Translator | None = PrivateAttr(None)

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
        """With the languages that columns are named after.

        Raises:
            RecipeError: they are named after others than the recipe says.
        """
        for role, code in (("source", self.source_lang), ("target", self.target_lang)):
            column = str(columns.get(role, ""))
            if code and languages.language(column) and not languages.same(column, code):
                what = f"task.{role}_lang: {shorten(code)}, but the {role}s stand under {shorten(column)}"
                raise RecipeError(what, hint=f"task.{role}_lang={column}, or data.columns.{role}=NAME")
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
        """With the way in which this model is told the languages, and translates.

        Raises:
            RecipeError: it has to be told a language that is not given, or that it does not know.
        """
        told = direction(processor, config, self.source_lang, self.target_lang, self.prefix)
        ready = self.model_copy(update={"prefix": told.prefix})
        how = Generation.model_validate({"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams})
        ready._translator = (
            EncoderDecoder(processor, config, told, how)
            if config.is_encoder_decoder
            else Decoder(processor, config, how, self.chat_template)
        )
        return ready

    @property
    def _by(self) -> Translator:
        assert self._translator is not None, "for_processor comes first"
        return self._translator

    def encode(self, rows: Sequence[Row], processor: Any, data: Data) -> list[dict[str, Any]]:
        """What the model's kind reads and writes, and where there is a target, it as it is written (`reference`, UTF-8
        bytes) and whether it is the source (`same`).

        Raises:
            DataError: of a text nothing is left as tokens.
        """
        fields = self._by.encode(self._told(rows), data)
        for one, row in zip(fields, rows, strict=True):
            if "target" in row.values:
                source, target = (str(row.values[role]).strip() for role in ("source", "target"))
                one |= {"same": int(source == target), "reference": as_bytes(target)}
        return fields

    def _told(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with what stands before each source."""
        found = []
        for row in rows:
            values: dict[str, object] = {
                role: str(row.values[role]).strip() for role in self.columns if role in row.values
            }
            found.append(Row(row.place, values | {"source": f"{self.prefix or ''}{values['source']}"}))
        return found

    def notes(self, encoded: Encoded, processor: Any) -> list[str]:
        """What is lost of texts, and targets that are their sources."""
        same = int(encoded.column("same").sum()) if "same" in encoded.fields else 0
        return self._by.notes(encoded) + ([f"{same} of {len(encoded)} {SAME}"] if same else [])

    def faults(self, rows: Iterable[Row]) -> Iterator[Fault]:
        """Pairs that are no translations."""
        return pair_faults(rows)

    def token_faults(
        self, rows: Sequence[Row], processor: Any, data: Data
    ) -> tuple[list[list[int]], list[Fault]] | None:
        """Of the sources, and what of targets is cut off; of a decoder those of conversations."""
        return self._by.token_faults(self._told(rows), data)

    def num_outputs(self, batch: Batch) -> int:
        """One for each token of the targets."""
        return self._by.num_outputs(batch)

    def normalizers(self, batch: Batch) -> dict[str, Tensor]:
        """The number of tokens of the targets."""
        return {"tokens": torch.tensor(float(self.num_outputs(batch)))}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probabilities of each token of the targets, and of the one that was likeliest there."""  # (tokens, 2)
        return self._by.forward(model, batch)

    def loss(
        self, model: nn.Module, batch: Batch, normalizers: dict[str, Tensor], label_smoothing: float = 0.0
    ) -> Tensor:
        """This batch's share of the mean over the step's tokens."""
        return self._by.loss(model, batch, normalizers, label_smoothing)

    def rows_written(self, encoded: Encoded) -> int:
        """At most `scored_rows`."""
        return min(self.scored_rows, len(encoded))

    def written(self, model: nn.Module, batch: Batch) -> list[str]:
        """The translations, by beam search."""
        return self._by.written(model, batch)

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
        return self._by.prior(encoded)

    def guess(self, prior: Tensor, batch: Batch) -> Tensor:
        """That log frequency of each token of the targets, and of the most frequent."""  # (tokens, 2)
        return self._by.guess(prior, batch)

    def completed(self, answer: dict[str, Any], row: Row) -> dict[str, Any]:
        """The text by its name."""
        return {"translation": answer["generated_text"]}
