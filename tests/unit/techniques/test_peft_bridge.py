"""The bridge to PEFT: unsupported types and values are refused with the key, the value and a fix."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tunesmith import registry
from tunesmith.errors import RecipeError
from tunesmith.models.anatomy import anatomy
from tunesmith.techniques import Technique
from tunesmith.testing import tiny_model, tiny_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of third parties at import
    pytest.importorskip("peft")


def _apply(family: str = "bert", **keys: Any) -> Technique:
    model = tiny_model(family, "AutoModel")
    technique = registry.get("technique", "peft")(**keys)
    assert isinstance(technique, Technique)
    technique.apply(model, anatomy(model, new=frozenset()), tiny_tokenizer())
    return technique


@pytest.mark.parametrize(
    ("keys", "said"),
    (
        (
            {"type": "VERA"},
            "technique.type: PEFT's VERA ",
        ),
        ({"type": "POLY"}, "technique.type: PEFT's POLY "),
        ({"type": "PROMPT_TUNING"}, "technique=prompt or prefix"),
        ({"type": "LOHAA"}, "did you mean 'LOHA'?"),
        ({"config": {"alhpa": 1}}, "did you mean 'alpha'?"),
        ({"config": {"r": "abc"}}, "technique.config.r: must be a valid integer, not 'abc'"),
        ({"config": {"r": 4.5}}, "technique.config.r: must be a valid integer, not '4.5'"),
        ({"config": {"target_modules": 5}}, "target_modules: must be a valid list or a valid string, not '5'"),
        ({"config": {"r": 0}}, "technique.config: "),
        (
            {"config": {"target_modules": ["nothing"]}},
            "technique.config: ",
        ),
        (
            {"type": "OFT", "config": {"r": 7, "oft_block_size": 5}},
            "technique.config: ",
        ),
        ({"type": "BOFT", "config": {"boft_block_size": 7}}, "boft_block_size (7)"),
        ({"family": "gpt2"}, "technique.type: "),
    ),
    ids=str,
)
def test_what_peft_cannot_take_is_refused_by_its_key(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        _apply(**keys)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_value_is_as_pefts_own_types_have_it() -> None:
    assert _apply(config={"r": "4", "rank_dropout": 0}) is not None
