from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from adapting import trainable
from pydantic import ValidationError
from torch import nn

from tunesmith import registry
from tunesmith.errors import RecipeError
from tunesmith.models.anatomy import anatomy
from tunesmith.techniques.freeze import HEAD_LEARNING_RATE, LEARNING_RATE, Freeze
from tunesmith.testing import CLASSIFYING, tiny_model

CLASSIFIER, CAUSAL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"


def test_the_registry_knows_it_by_its_file() -> None:
    assert registry.get("technique", "freeze") is Freeze


@pytest.mark.parametrize("family", CLASSIFYING)
def test_the_head_alone_learns_by_default(family: str) -> None:
    model = tiny_model(family, CLASSIFIER)
    found = anatomy(model)
    technique = Freeze()
    technique.apply(model, found, None)
    assert technique.head_only and trainable(model) == found.always_trainable
    assert technique.learning_rate(found) == HEAD_LEARNING_RATE
    assert technique.learning_rate(replace(found, hidden_size=1536)) == pytest.approx(HEAD_LEARNING_RATE / 4)


@pytest.mark.parametrize("family", CLASSIFYING)
def test_the_last_blocks_learn_and_the_rest_stays_bitwise(family: str) -> None:
    model = tiny_model(family, CLASSIFIER)
    found = anatomy(model)
    count = min(2, len(found.blocks))
    technique = Freeze(last_n_blocks=count)
    technique.apply(model, found, None)
    assert trainable(model) == {n for n in found.parameters if found.depth_of(n) > len(found.blocks) - count}
    assert technique.learning_rate(found) == pytest.approx(LEARNING_RATE * 12)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        tokens = torch.tensor([[5, 9, 7, 3], [6, 8, 4, 3]])
        model(input_ids=tokens, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed <= trainable(model)
    assert all(any(name.startswith(block) for name in changed) for block in found.blocks[-count:])


def test_what_follows_the_blocks_learns_with_them_but_a_tied_output_does_not() -> None:
    model = tiny_model("gpt2", CAUSAL)
    Freeze(last_n_blocks=1).apply(model, anatomy(model), None)
    assert {name.split(".")[1] for name in trainable(model)} == {"h", "ln_f"}
    model = tiny_model("llama", CAUSAL)
    Freeze(last_n_blocks=1).apply(model, anatomy(model), None)
    assert {"model.norm.weight", "lm_head.weight"} < trainable(model)


def test_gradual_opens_one_block_more_in_each_equal_share() -> None:
    model = tiny_model("bert", CLASSIFIER)
    found = anatomy(model)
    technique = Freeze(last_n_blocks=3, gradual=True)
    technique.apply(model, found, None)
    all_of_them = trainable(model)
    opened = []
    for step in range(12):
        technique.update_trainable(model, found, step / 12)
        assert trainable(model) <= all_of_them and trainable(model) >= found.always_trainable | {
            "bert.pooler.dense.weight"
        }
        opened.append(sum(any(name.startswith(f"{block}.") for name in trainable(model)) for block in found.blocks))
    assert opened == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    technique.update_trainable(model, found, 1.0)
    assert trainable(model) == all_of_them


def test_without_gradual_nothing_thaws() -> None:
    model = tiny_model("bert", CLASSIFIER)
    technique = Freeze(last_n_blocks=2)
    technique.apply(model, anatomy(model), None)
    before = trainable(model)
    technique.update_trainable(model, anatomy(model), 0.0)
    assert trainable(model) == before


def test_gradual_begins_with_a_block_where_nothing_follows_the_blocks() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    technique = Freeze(last_n_blocks=2, gradual=True)
    technique.apply(model, anatomy(model), None)
    technique.update_trainable(model, anatomy(model), 0.0)
    assert trainable(model) == {"layers.2.weight", "layers.2.bias"}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"last_n_blocks": 2, "head_only": True}, "either"),
        ({"head_only": False}, "either"),
        ({"gradual": True}, "gradual"),
        ({"head_only": True, "gradual": True}, "gradual"),
        ({"layer_lr_decay": 0.9}, "layer_lr_decay"),
        ({"last_n_blocks": 0}, "greater than or equal to 1"),
        ({"last_n_blocks": True}, "valid integer"),
        ({"last_n": 1}, "Extra inputs"),
    ],
)
def test_what_cannot_be_meant_together_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Freeze(**keys)


def test_sane_combinations_pass() -> None:
    assert Freeze(head_only=True) == Freeze() == Freeze(last_n_blocks=None)
    assert Freeze(last_n_blocks=2, gradual=True, layer_lr_decay=0.9).head_only is False
    assert Freeze.model_validate(Freeze().model_dump()) == Freeze()
    assert Freeze.model_validate(Freeze(last_n_blocks=2).model_dump()) == Freeze(last_n_blocks=2)


def test_a_model_that_leaves_nothing_to_learn_is_refused() -> None:
    model = tiny_model("gpt2", CAUSAL)
    with pytest.raises(RecipeError, match="head.*technique=lora"):
        Freeze().apply(model, anatomy(model), None)
    with pytest.raises(RecipeError, match="1 to 3"):
        Freeze(last_n_blocks=4).apply(model, anatomy(model), None)


def test_lower_blocks_learn_slower() -> None:
    found = anatomy(tiny_model("bert", CLASSIFIER))
    technique = Freeze(last_n_blocks=3, layer_lr_decay=0.5)
    assert technique.lr_scale("bert.encoder.layer.1.output.dense.weight", found) == 0.25
    assert technique.lr_scale("classifier.weight", found) == 1
