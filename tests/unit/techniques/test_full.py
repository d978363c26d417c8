from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from tunesmith import registry
from tunesmith.models.anatomy import anatomy
from tunesmith.techniques.full import LEARNING_RATE, Full
from tunesmith.testing import CLASSIFYING, tiny_model

CLASSIFIER = "AutoModelForSequenceClassification"


def test_the_registry_knows_it_by_its_file() -> None:
    assert registry.get("technique", "full") is Full


@pytest.mark.parametrize("family", CLASSIFYING)
def test_everything_learns_and_nothing_changes_at_first(family: str) -> None:
    model = tiny_model(family, CLASSIFIER)
    model.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Full().apply(model, anatomy(model), None)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_rate_falls_with_the_width() -> None:
    narrow, wide = (anatomy(tiny_model("bert", CLASSIFIER, hidden_size=width)) for width in (32, 64))
    assert Full().learning_rate(narrow) == pytest.approx(LEARNING_RATE * 12)
    assert Full().learning_rate(wide) == pytest.approx(LEARNING_RATE * 6)


def test_lower_blocks_learn_slower_and_a_head_at_the_full_rate() -> None:
    model = tiny_model("bert", CLASSIFIER)
    found = anatomy(model, new=frozenset({"bert.encoder.layer.0.output.dense.bias"}))
    technique = Full(layer_lr_decay=0.5)
    scale = {name: technique.lr_scale(name, found) for name in found.parameters}
    assert scale["bert.embeddings.word_embeddings.weight"] == 0.5**4
    assert scale["bert.encoder.layer.0.attention.self.query.weight"] == 0.5**3
    assert scale["bert.encoder.layer.2.attention.self.query.weight"] == 0.5
    assert scale["bert.pooler.dense.weight"] == scale["classifier.weight"] == 1
    assert scale["bert.encoder.layer.0.output.dense.bias"] == 1, "nothing has trained it yet"
    assert {Full().lr_scale(name, found) for name in found.parameters} == {1.0}


@pytest.mark.parametrize("decay", [0.0, 1.1, -1.0, float("nan"), "0.9"])
def test_a_decay_lies_between_0_and_1(decay: object) -> None:
    with pytest.raises(ValidationError):
        Full(layer_lr_decay=decay)  # type: ignore[arg-type]
