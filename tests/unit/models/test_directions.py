"""Languages of each translation family, with tokenizers of its class and a small vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    BartConfig,
    M2M100Config,
    MarianConfig,
    MBart50Tokenizer,
    MBartConfig,
    MBartTokenizer,
    NllbTokenizer,
    T5Config,
)

from tunesmith.errors import RecipeError
from tunesmith.models.directions import Direction, direction
from tunesmith.testing import tiny_tokenizer

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "b", "▁a", "▁b"]
PLAIN = Direction("", 2, None)
"""The tiny tokenizer starts every text with [CLS], as BART's does with <s>."""


def _unigram(kind: Any) -> Any:
    return kind(vocab=[(word, -float(n)) for n, word in enumerate(["<unk>", "<s>", "</s>", *WORDS[4:]])])


def test_t5_is_told_in_words() -> None:
    config = T5Config(eos_token_id=3)
    found = direction(tiny_tokenizer(), config, "en", "deu_Latn", None)
    assert found == Direction("translate English to German: ", 2, None)
    assert (
        direction(tiny_tokenizer(), config, None, None, "").prefix
        == ""
        == direction(tiny_tokenizer(), config, "en", "de", "").prefix
    )
    assert direction(tiny_tokenizer(), config, None, None, "say: ").prefix == "say: "
    with pytest.raises(RecipeError, match=r"task\.target_lang: missing"):
        direction(tiny_tokenizer(), config, "en", None, None)


@pytest.mark.parametrize("config", [MarianConfig(eos_token_id=3), BartConfig(eos_token_id=3)])
def test_one_direction_needs_no_word(config: Any) -> None:
    assert direction(tiny_tokenizer(), config, None, None, None) == PLAIN


def test_marian_of_several_targets_wants_a_mark() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([">>deu<<", ">>fra<<"])
    assert direction(tokenizer, MarianConfig(eos_token_id=3), "en", "de", None).prefix == ">>deu<< "
    with pytest.raises(RecipeError, match=r"task\.target_lang: 'zh' .*known: deu, fra"):
        direction(tokenizer, MarianConfig(eos_token_id=3), "en", "zh", None)


@pytest.mark.parametrize("legacy", [False, True])
def test_nllb_forces_the_code_of_the_target(legacy: bool) -> None:
    vocabulary = {word: n for n, word in enumerate(WORDS)}
    tokenizer = NllbTokenizer(vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")], legacy_behaviour=legacy)
    found = direction(tokenizer, M2M100Config(), "en", "zh", None)
    german, english = (tokenizer.convert_tokens_to_ids(code) for code in ("zho_Hans", "eng_Latn"))
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("eng_Latn", "zho_Hans")
    assert english in tokenizer("a")["input_ids"] and german in tokenizer(text_target="a")["input_ids"]
    assert found == (Direction("", None, german) if legacy else Direction("", german, None))
    with pytest.raises(RecipeError, match=r"task\.source_lang: missing"):
        direction(tokenizer, M2M100Config(), None, "de", None)
    with pytest.raises(RecipeError, match=r"task\.target_lang: NllbTokenizer .*'qq'; known: Afrikaans, "):
        direction(tokenizer, M2M100Config(), "en", "qq", None)


def test_mbart_50_forces_it_and_mbart_starts_from_it() -> None:
    newer, older = _unigram(MBart50Tokenizer), _unigram(MBartTokenizer)
    code = newer.convert_tokens_to_ids("de_DE")
    assert direction(newer, MBartConfig(), "en", "de", None) == Direction("", code, None)
    assert newer("a")["input_ids"][0] == newer.convert_tokens_to_ids("en_XX")
    code = older.convert_tokens_to_ids("de_DE")
    assert direction(older, MBartConfig(), "en", "de", None) == Direction("", None, code)
