"""Source and target languages of translation models: prefixes and language codes of each family.

| family | source | start of the target |
|---|---|---|
| T5 | `translate English to German: ...` | |
| Marian, several targets | `>>deu<< ...` | |
| mBART-50, M2M-100, NLLB | language code, added by the tokenizer | language code, forced in generation |
| mBART | language code at the end | language code as the decoder start token |
| BART | | `<s>`, forced in generation |
| a decoder | `Translate from English to German: ...` | |

Codes are looked up in the vocabulary and set on the tokenizer; their position is read from a tokenized target.
Raffel 2020 (arXiv 1910.10683), Junczys-Dowmunt 2018 (1804.00344), Tang 2020 (2008.00401), Fan 2020 (2010.11125),
NLLB Team 2022 (2207.04672).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tunesmith.data import languages
from tunesmith.errors import RecipeError, shorten

PREFIXES = {"t5": "translate {source} to {target}: "}
"""`model_type` -> prefix of the source in pretraining."""

INSTRUCTION = "Translate from {source} to {target}: "
"""Prefix for a decoder."""


@dataclass(frozen=True)
class Direction:
    """Prefix of each source, and the first tokens of a target."""

    prefix: str
    first: int | None
    """Forced first token of the target (`forced_bos_token_id`)."""
    start: int | None
    """Decoder start token, if it differs from the config's."""


def direction(processor: Any, config: Any, source: str | None, target: str | None, prefix: str | None) -> Direction:
    """Return the direction for this model, and set language codes on the tokenizer; `prefix` is the user's.

    Raises:
        RecipeError: a language is missing or not supported by the model.
    """
    if hasattr(processor, "src_lang"):
        processor.src_lang = _code(processor, source, "source_lang")
        processor.tgt_lang = _code(processor, target, "target_lang")
    if prefix is None:
        prefix = _prefix(processor, config, source, target)
    if not config.is_encoder_decoder:
        return Direction(prefix, None, None)
    target_ids = processor(text_target="a")["input_ids"]
    special = set(processor.all_special_ids)
    first = int(target_ids[0]) if target_ids[0] in special and len(target_ids) > 1 else None
    start = (
        int(target_ids[-1])
        if len(target_ids) > 1 and target_ids[-1] in special and target_ids[-1] != config.eos_token_id
        else None
    )
    return Direction(prefix, first, start)


def _code(processor: Any, language: str | None, key: str) -> str:
    """Return the tokenizer's code of a language."""
    vocabulary = processor.get_vocab()
    family = type(processor).__name__.removesuffix("Fast")
    if language is None:
        what = f"task.{key}: missing; {family} needs the language of each text"
        raise RecipeError(what, hint=f"for example task.{key}=en")
    for code in languages.spellings(language):
        if code in vocabulary or f"__{code}__" in vocabulary:
            return code
    raise RecipeError(f"task.{key}: {family} does not support {shorten(language)}", hint=_known_languages(vocabulary))


def _known_languages(vocabulary: Iterable[str]) -> str:
    known = {code.strip("_") for code in vocabulary}
    names = sorted(language.name for language in languages.LANGUAGES if known & set(language.codes[:-1]))
    return f"known: {', '.join(names[:20])}" if names else "give a code from its vocabulary"


def _prefix(processor: Any, config: Any, source: str | None, target: str | None) -> str:
    marked = [token for token in processor.get_vocab() if token.startswith(">>") and token.endswith("<<")]
    if marked and config.model_type == "marian":
        known = {token[2:-2]: token for token in marked}
        code = next((code for code in languages.spellings(target or "") if code in known), None)
        if code is None:
            what = f"task.target_lang: {shorten(target)} is not among the {len(known)} target languages of this model"
            raise RecipeError(what, hint=f"known: {', '.join(sorted(known)[:20])}")
        return f"{known[code]} "
    pattern = PREFIXES.get(config.model_type, "") if config.is_encoder_decoder else INSTRUCTION
    if not pattern:
        return ""
    for key, language in (("source_lang", source), ("target_lang", target)):
        if language is None:
            what = f"task.{key}: missing; a {config.model_type} model needs the languages in its prefix"
            raise RecipeError(what, hint=f"for example task.{key}=en, or task.prefix='' for no prefix")
    assert source is not None and target is not None, "checked above"
    return pattern.format(source=languages.name_of(source), target=languages.name_of(target))
