"""Batched generation equals single prompts; stop tokens, limits, beams and sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerating import unpadded

from tunesmith.data.batches import Ragged
from tunesmith.recipe.fields import Generation
from tunesmith.tasks._generation import generate_tokens
from tunesmith.testing import tiny_model

PROMPTS = [[5, 9, 7, 8], [6, 8], [11], [4, 4, 5]]


def _ragged(rows: list[list[int]]) -> Ragged:
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return Ragged(torch.tensor([token for row in rows for token in row]), ends)


def _written(model: Any, rows: list[list[int]], stop: tuple[int, ...] = (), limit: int = 64, **how: Any) -> Any:
    return generate_tokens(
        model, _ragged(rows), Generation(**{"max_new_tokens": 8, **how}), pad=0, stop=stop, limit=limit
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "t5"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_many_at_once_are_written_as_each_alone(family: str, how: dict[str, int]) -> None:
    kind = "AutoModelForSeq2SeqLM" if family == "t5" else "AutoModelForCausalLM"
    model = tiny_model(family, kind)
    together = _written(model, PROMPTS, **how)
    assert together == [_written(model, [row], **how)[0] for row in PROMPTS]
    assert all(0 < len(row) <= 8 + (family == "t5") for row in together)


def test_what_ends_an_answer_is_not_part_of_it() -> None:
    model = tiny_model("llama", "AutoModelForCausalLM")
    free = _written(model, PROMPTS)
    stop = free[0][3]
    ended = _written(model, PROMPTS, stop=(stop,))
    assert ended == [row[: row.index(stop)] if stop in row else row for row in free]


def test_no_more_is_written_than_the_model_takes() -> None:
    model = tiny_model("gpt2", "AutoModelForCausalLM")
    assert [len(row) for row in _written(model, PROMPTS, limit=7)] == [3, 3, 3, 3]
    assert _written(model, PROMPTS, limit=4) == [[], [], [], []]


def test_a_model_that_computes_without_padding_writes_the_same() -> None:
    model = tiny_model("llama", "AutoModelForCausalLM")
    expected = _written(model, PROMPTS)
    mask, ids = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([[5, 9, 0], [7, 8, 9]])
    unpadded(model)
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert _written(model, PROMPTS) == expected
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits), "and goes on without padding"


def test_what_is_drawn_is_the_same_each_time_and_leaves_the_seed_alone() -> None:
    model = tiny_model("llama", "AutoModelForCausalLM")
    before = torch.get_rng_state()
    one, other = (_written(model, PROMPTS, temperature=5.0) for _ in range(2))
    assert one == other != _written(model, PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_settings_of_the_model_do_not_count() -> None:
    model = tiny_model("llama", "AutoModelForCausalLM")
    expected = _written(model, PROMPTS)
    for name, value in {"do_sample": True, "temperature": 3.0, "num_beams": 4, "repetition_penalty": 9.0}.items():
        setattr(model.generation_config, name, value)
    assert _written(model, PROMPTS) == expected
