from __future__ import annotations

import pytest
import torch
from adapting import trainable
from pydantic import ValidationError

from tunesmith import registry
from tunesmith.errors import RecipeError
from tunesmith.models.anatomy import anatomy
from tunesmith.techniques.bitfit import LEARNING_RATE, Bitfit
from tunesmith.testing import CLASSIFYING, tiny_model

CLASSIFIER = "AutoModelForSequenceClassification"
WITHOUT = ("modernbert", "llama", "mistral", "gemma", "phi3", "t5")
"""Families without biases outside a head."""


def test_the_registry_knows_it_by_its_file() -> None:
    assert registry.get("technique", "bitfit") is Bitfit


@pytest.mark.parametrize("family", [family for family in CLASSIFYING if family not in WITHOUT])
def test_every_bias_and_the_head_learn_and_nothing_else(family: str) -> None:
    model = tiny_model(family, CLASSIFIER)
    found = anatomy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Bitfit().apply(model, found, None)
    assert found.always_trainable < trainable(model)
    biases = trainable(model) - found.always_trainable
    assert all(name.endswith("bias") and model.get_parameter(name).ndim == 1 for name in biases)
    assert trainable(model) >= {f"{path}.bias" for path in found.linears if model.get_submodule(path).bias is not None}
    assert set(model.state_dict()) == set(before), "nothing is added"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_it_learns_as_many_numbers_as_the_formula_says() -> None:
    """d = 32, MLP 64: a block of BERT has 4 d (attention) + 64 + d (MLP) + 2 d (norms); then embeddings and pooler."""
    model = tiny_model("bert", CLASSIFIER)
    found = anatomy(model)
    Bitfit().apply(model, found, None)
    numbers = sum(model.get_parameter(name).numel() for name in trainable(model) - found.always_trainable)
    assert numbers == 3 * (4 * 32 + 64 + 32 + 2 * 32) + 32 + 32


def test_biases_of_one_projection_alone_are_enough() -> None:
    model = tiny_model("qwen2", CLASSIFIER)
    Bitfit().apply(model, anatomy(model), None)
    learned = {name.split(".")[-2] for name in trainable(model) if name != "score.weight"}
    assert learned == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("family", WITHOUT)
def test_a_model_without_biases_is_refused_with_the_reason(family: str) -> None:
    model = tiny_model(family, CLASSIFIER)
    with pytest.raises(RecipeError) as caught:
        Bitfit().apply(model, anatomy(model), None)
    assert caught.value.where == "technique" and family in str(caught.value) and caught.value.exit_code == 2


def test_a_relative_bias_that_is_a_table_is_none() -> None:
    """T5's `relative_attention_bias.weight` is an embedding of distances, not a b in W x + b."""
    model = tiny_model("t5", "AutoModel")
    assert any("relative_attention_bias" in name for name, _ in model.named_parameters())
    with pytest.raises(RecipeError, match="biases"):
        Bitfit().apply(model, anatomy(model), None)


def test_the_rate_falls_with_the_width_and_there_are_no_keys() -> None:
    assert Bitfit().learning_rate(anatomy(tiny_model("bert", CLASSIFIER))) == LEARNING_RATE
    with pytest.raises(ValidationError, match="Extra inputs"):
        Bitfit(norms=True)  # type: ignore[call-arg]
