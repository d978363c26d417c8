"""How a model is told from which language into which it translates; what differs from family to family, as data.

| family | source | target begins with |
|---|---|---|
| T5 | `translate English to German: ...` | |
| Marian, several targets | `>>deu<< ...` | |
| mBART-50, M2M-100, NLLB | its language's code, by the tokenizer | its language's code, forced when writing |
| mBART | its language's code at the end | its language's code, in the place of the start |
| BART | | `<s>`, forced when writing |
| a decoder | `Translate from English to German: ...` | |

Codes are found in the vocabulary and set on the tokenizer; where they stand is read off what the tokenizer makes of a
target. Raffel 2020 (arXiv 1910.10683), Junczys-Dowmunt 2018 (1804.00344), Tang 2020 (2008.00401), Fan 2020
(2010.11125), NLLB Team 2022 (2207.04672).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tunesmith.data import languages
from tunesmith.errors import RecipeError, shorten

PREFIXES = {"t5": "translate {source} to {target}: "}
"""A config's `model_type` -> what it was taught to expect before a source."""

ASKED = "Translate from {source} to {target}: "
"""How a decoder is asked."""


@dataclass(frozen=True)
class Direction:
    """What stands before each source, and with which tokens a target begins."""

    prefix: str
    first: int | None
    """What is forced as the first token that is written."""
    start: int | None
    """What the decoder starts from, where it is not what the model's config says."""


def direction(processor: Any, config: Any, source: str | None, target: str | None, prefix: str | None) -> Direction:
    """How this model is told; codes are set on the tokenizer. `prefix` is the user's own.

    Raises:
        RecipeError: a language is not given that the model must be told, or is none of the model's.
    """
    if hasattr(processor, "src_lang"):
        processor.src_lang = _code(processor, source, "source_lang")
        processor.tgt_lang = _code(processor, target, "target_lang")
    if prefix is None:
        prefix = _prefix(processor, config, source, target)
    if not config.is_encoder_decoder:
        return Direction(prefix, None, None)
    made = processor(text_target="a")["input_ids"]
    special = set(processor.all_special_ids)
    first = int(made[0]) if made[0] in special and len(made) > 1 else None
    start = int(made[-1]) if len(made) > 1 and made[-1] in special and made[-1] != config.eos_token_id else None
    return Direction(prefix, first, start)


def _code(processor: Any, language: str | None, key: str) -> str:
    """What the tokenizer calls a language."""
    vocabulary = processor.get_vocab()
    family = type(processor).__name__.removesuffix("Fast")
    if language is None:
        what = f"task.{key}: missing, and {family} marks each text with its language"
        raise RecipeError(what, hint=f"task.{key}=en, for example")
    for code in languages.spellings(language):
        if code in vocabulary or f"__{code}__" in vocabulary:
            return code
    raise RecipeError(f"task.{key}: {family} has no language {shorten(language)}", hint=_some(vocabulary))


def _some(vocabulary: Iterable[str]) -> str:
    known = {code.strip("_") for code in vocabulary}
    here = sorted(one.name for one in languages.LANGUAGES if known & set(one.codes[:-1]))
    return f"known: {', '.join(here[:20])}" if here else "give the code as it stands in its vocabulary"


def _prefix(processor: Any, config: Any, source: str | None, target: str | None) -> str:
    marked = [token for token in processor.get_vocab() if token.startswith(">>") and token.endswith("<<")]
    if marked and config.model_type == "marian":
        known = {token[2:-2]: token for token in marked}
        code = next((code for code in languages.spellings(target or "") if code in known), None)
        if code is None:
            what = f"task.target_lang: {shorten(target)} is none of the {len(known)} that this model writes"
            raise RecipeError(what, hint=f"known: {', '.join(sorted(known)[:20])}")
        return f"{known[code]} "
    pattern = PREFIXES.get(config.model_type, "") if config.is_encoder_decoder else ASKED
    if not pattern:
        return ""
    for key, language in (("source_lang", source), ("target_lang", target)):
        if language is None:
            what = (
                f"task.{key}: missing, and a model of the kind {config.model_type} is told in words what to translate"
            )
            raise RecipeError(what, hint=f"task.{key}=en, for example, or task.prefix='' for none")
    assert source is not None and target is not None, "refused above"
    return pattern.format(source=languages.name_of(source), target=languages.name_of(target))
