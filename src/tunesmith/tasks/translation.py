"""Translation from one language into another, with an encoder-decoder or a decoder.

    loss = mean cross-entropy over the target tokens, including the end token      (Vaswani 2017, arXiv 1706.03762)

The language codes of each encoder-decoder family are in `models/directions.py`. A decoder is prompted with
`Translate from English to German: ...` and trained as in text-generation. Translations use beam search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field

from tunesmith.data import languages
from tunesmith.data.columns import Column
from tunesmith.data.findings import Fault
from tunesmith.data.formats import Row
from tunesmith.data.text.pairs import pair_faults
from tunesmith.data.text.templates import template_text
from tunesmith.errors import DataError, RecipeError, shorten
from tunesmith.metrics.texts import TextMetrics
from tunesmith.models.directions import direction
from tunesmith.recipe import Data
from tunesmith.recipe.fields import Generation
from tunesmith.tasks import Answer, BoundTask, Task, _samples
from tunesmith.tasks._generation import PromptGenerator, SourceGenerator, render
from tunesmith.tasks._translators import (
    SCORES,
    DecoderTranslation,
    EncoderDecoderTranslation,
    conversation_task,
    pair_of,
)
from tunesmith.tasks.text_generation import bind_generation

SOURCE = ("src", "source_text", "source_sentence", "original", "input", "text", "原文", "源文")
TARGET = (
    "tgt", "target_text", "target_sentence", "translation", "translated", "reference", "output", "译文", "目标",
)  # fmt: skip


class Translation(Task):
    """Translates texts from one language into another."""

    source_lang: Annotated[str, AfterValidator(languages.validate_code)] | None = Field(
        None, description="source language, e.g. en; null: from the column names"
    )
    target_lang: Annotated[str, AfterValidator(languages.validate_code)] | None = Field(
        None, description="target language; null: from the column names"
    )
    prefix: str | None = Field(None, description="prefix of each source; null: the prefix of the model's pretraining")
    num_beams: int = Field(4, ge=1, description="beam width; 1: greedy")
    max_new_tokens: int = Field(128, ge=1, description="maximum tokens per translation")
    scored_rows: int = Field(
        2000, ge=1, description="evenly spaced rows of a split for which translations are generated and scored"
    )
    chat_template: Annotated[str, AfterValidator(template_text)] | None = Field(
        None, description="for a decoder: plain, chatml ..., or a Jinja file; default: the model's own, else plain"
    )

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    data_keys: ClassVar[frozenset[str]] = frozenset({"max_length", "augment"})
    example_model: ClassVar[str] = "Helsinki-NLP/opus-mt-en-de"
    baseline_name: ClassVar[str] = "token-frequency baseline"
    base_has_head: ClassVar[bool] = True
    sample_keys: ClassVar[Mapping[str, Any]] = {"source_lang": "en", "target_lang": "de"}

    @property
    def columns(self) -> Sequence[Column]:
        """Source and target; a column may be named after its language."""
        given = {"source": self.source_lang, "target": self.target_lang}
        names = {side: languages.column_names(code) if code is not None else () for side, code in given.items()}
        return (
            Column("source", "text", (*names["source"], *SOURCE)),
            Column("target", "text", (*names["target"], *TARGET), target=True),
        )

    def with_columns(self, columns: Mapping[str, str | int]) -> Self:
        """Infer the languages from the column names.

        Raises:
            RecipeError: the column names contradict the recipe.
        """
        for role, code in (("source", self.source_lang), ("target", self.target_lang)):
            column = str(columns.get(role, ""))
            if code and languages.language(column) and not languages.same(column, code):
                what = f"task.{role}_lang: {shorten(code)}, but the {role} column is {shorten(column)}"
                raise RecipeError(what, hint=f"set task.{role}_lang={column}, or data.columns.{role}=NAME")
        inferred = {f"{role}_lang": str(column) for role, column in columns.items() if languages.language(str(column))}
        return self.model_copy(update={key: code for key, code in inferred.items() if getattr(self, key, code) is None})

    def parse_target(self, row: Row) -> tuple[str, str, bool]:
        """Return the scripts of source and target, and True if both are the same text."""
        source, target = str(row.values["source"]).strip(), str(row.values["target"]).strip()
        return languages.script_of(source), languages.script_of(target), source == target

    def fit(self, targets: Sequence[tuple[str, str, bool]], data: Data) -> tuple[Self, Data]:
        """Check that most pairs are translations in the direction of the recipe."""
        where = str(data.train)
        TextMetrics(SCORES)  # raises if its library is missing
        same = sum(copied for _, _, copied in targets)
        if same > len(targets) / 2:
            what = f"target equals source in {same:,} of {len(targets):,} rows"
            raise DataError(what, where=where, hint="set data.columns.target=NAME if it is another column")
        wanted = tuple(languages.script_of_language(code or "") for code in (self.target_lang, self.source_lang))
        scripts = Counter[Any]((source, target) for source, target, _ in targets)
        if None not in wanted and wanted[0] != wanted[1] and scripts[wanted] > len(targets) / 2:
            what = (
                f"most sources are in the script of {self.target_lang}, and most targets in that of {self.source_lang}"
            )
            what += ": columns appear to be swapped"
            raise DataError(
                what, where=where, hint="swap data.columns.source and data.columns.target, or the languages"
            )
        return self, data

    def faults(self, rows: Iterable[Row]) -> Iterator[Fault]:
        """Yield pairs that are not translations."""
        return pair_faults(rows)

    def sample_row(self, number: int) -> dict[str, object]:
        """Return a review and its words in reverse order."""
        source, target = _samples.pair(number)
        return {"source": source, "target": target}

    def bind(self, processor: Any, config: Any, data: Data, label_smoothing: float = 0.0) -> BoundTask:
        """Return the bound task for an encoder-decoder or a decoder, with the language codes of its family.

        Raises:
            RecipeError: a language is missing, or the model does not support it.
        """
        codes = direction(processor, config, self.source_lang, self.target_lang, self.prefix)
        task = self.model_copy(update={"prefix": codes.prefix})
        settings = Generation.model_validate({"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams})
        run = (task, processor, config, data, label_smoothing)
        if not config.is_encoder_decoder:
            chat = bind_generation(conversation_task(settings, self.chat_template), *run[1:])
            assert isinstance(chat.generator, PromptGenerator), "a decoder has one"
            return DecoderTranslation(*run, chat=chat, generator=replace(chat.generator, pair=pair_of))
        tokens = {"forced_bos_token_id": codes.first, "decoder_start_token_id": codes.start}
        begin = {name: token for name, token in tokens.items() if token is not None}
        generator = SourceGenerator(processor, config, settings, begin, pair_of)
        return EncoderDecoderTranslation(*run, generator=generator)

    def render(self, answer: Answer, row: Row) -> str:
        """Return the translation."""
        return render(answer)
