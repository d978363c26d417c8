"""Language codes in all spellings, and scripts."""

from __future__ import annotations

import pytest
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as MBART
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB

from tunesmith.data import languages


def test_the_table_is_sound_and_its_codes_are_those_of_the_models() -> None:
    every = languages.LANGUAGES
    for kind in ("two", "three", "nllb", "name"):
        values = [getattr(one, kind) for one in every]
        assert len(set(values)) == len(values), f"{kind} is there twice"
    assert {one.mbart for one in every} - {"-"} == set(MBART)
    assert {one.nllb for one in every} <= set(NLLB)
    assert all(languages.script_of_language(one.two) for one in every)


@pytest.mark.parametrize("code", ["de", "DE", "deu", "de_DE", "de-AT", "deu_Latn", "German", "german", "ger"])
def test_a_language_by_any_of_its_names(code: str) -> None:
    found = languages.language(code)
    assert found is not None and found.name == "German" and languages.same(code, "de")
    assert languages.spellings(code)[0] == code and "deu_Latn" in languages.spellings(code)


def test_a_language_that_is_not_known_stands_for_itself() -> None:
    assert languages.language("qq") is None and languages.name_of("qq") == "qq" and languages.spellings("qq") == ("qq",)
    assert languages.same("qq", "qq") and not languages.same("qq", "de") and not languages.same("en", "de")
    assert languages.script_of_language("qq") is None and languages.script_of_language("ace_Arab") == "ARABIC"


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Ein Hund, 3 Männer!", "LATIN"),
        ("用LoRA微调一个语言模型", "CJK"),
        ("これはペンです", "CJK"),
        ("Привет, мир", "CYRILLIC"),
        ("안녕하세요", "HANGUL"),
        ("1999: 42%", ""),
        ("", ""),
    ],
)
def test_the_script_of_a_text(text: str, script: str) -> None:
    assert languages.script_of(text) == script
