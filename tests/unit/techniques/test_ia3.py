from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import trainable
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith import registry
from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.models.anatomy import LINEAR, anatomy
from tunesmith.techniques.ia3 import LEARNING_RATE, Ia3
from tunesmith.testing import CLASSIFYING, tiny_model

CLASSIFIER = "AutoModelForSequenceClassification"
TOKENS = torch.tensor([[2, 9, 7, 11, 3], [2, 8, 13, 4, 3]])
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "outputs": {"target_modules": ["query", "attention_output"], "feedforward_modules": []},
    "inputs": {"target_modules": ["value"], "feedforward_modules": ["value", "mlp_up"]},
}


def answers(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def shaken(family: str, technique: Ia3) -> PreTrainedModel:
    """Return a model with random factors."""
    model = tiny_model(family, CLASSIFIER)
    technique.apply(model, anatomy(model), None)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("ia3_l"):
                parameter += 0.5 * torch.randn_like(parameter)
    return model


def test_the_registry_knows_it_by_its_file() -> None:
    assert registry.get("technique", "ia3") is Ia3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CLASSIFYING)
def test_it_starts_as_the_base_and_merges_into_it(family: str, kind: str) -> None:
    technique, base = Ia3(**KINDS[kind]), tiny_model(family, CLASSIFIER)
    found = anatomy(base)
    started = tiny_model(family, CLASSIFIER)
    technique.apply(started, found, None)
    assert torch.equal(answers(started), answers(base)), "factors of 1 change no bit"
    model = shaken(family, technique)
    assert trainable(model) == {n for n, _ in model.named_parameters() if n.endswith("ia3_l")} | found.always_trainable
    moved = answers(model)
    assert (moved - answers(base)).abs().max() > 1e-3
    technique.merge(model)
    torch.testing.assert_close(answers(model), moved, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == set(base.state_dict())
    assert {type(model.get_submodule(path)) for path in found.linears} <= set(LINEAR)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_it_learns_as_many_numbers_as_the_formula_says() -> None:
    """d = 32, MLP 64: l_k, l_v are d each, l_ff is 64. A fused projection is scaled whole; LLaMA's keys are fewer."""
    for family, expected in {"bert": 32 + 32 + 64, "gpt2": 3 * 32 + 128, "llama": 16 + 16 + 64}.items():
        model = shaken(family, Ia3())
        assert sum(p.numel() for name, p in model.named_parameters() if name.endswith("ia3_l")) == 3 * expected


@torch.no_grad()
def test_the_factors_stand_where_the_paper_puts_them() -> None:
    """k' = l_k * (W x + b), v' = l_v * (W x + b), y = W (l_ff * h) + b."""
    model = shaken("bert", Ia3())
    layer, x, h = model.bert.encoder.layer[1], torch.randn(3, 32), torch.randn(3, 64)
    for map_ in (layer.attention.self.key, layer.attention.self.value):
        assert map_.ia3_l.shape == (32, 1)
        plain = x @ map_.weight.t() + map_.bias
        torch.testing.assert_close(map_(x), plain * map_.ia3_l[:, 0])
    down = layer.output.dense
    assert down.ia3_l.shape == (1, 64)
    torch.testing.assert_close(down(h), (h * down.ia3_l[0]) @ down.weight.t() + down.bias)
    block = shaken("gpt2", Ia3()).transformer.h[0]
    assert isinstance(block.mlp.c_proj, Conv1D)
    h = torch.randn(3, 128)
    torch.testing.assert_close(
        block.mlp.c_proj(h), (h * block.mlp.c_proj.ia3_l[0]) @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
    )


def test_a_map_that_is_named_twice_is_scaled_at_its_input() -> None:
    model = shaken("bert", Ia3(**KINDS["inputs"]))
    assert model.bert.encoder.layer[0].attention.self.value.ia3_l.shape == (1, 32)


def test_what_is_merged_into_half_precision_is_rounded_once() -> None:
    technique = Ia3()
    model = shaken("bert", technique)
    key = model.bert.encoder.layer[0].attention.self.key
    key.weight.data = key.weight.data.bfloat16()
    key.bias.data = key.bias.data.bfloat16()
    expected = (key.weight.detach().float() * key.ia3_l.detach()).bfloat16()
    technique.merge(model)
    merged = model.bert.encoder.layer[0].attention.self.key
    assert torch.equal(merged.weight, expected) and merged.bias.dtype == torch.bfloat16
    assert not merged.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_says_how_it_is_read(kind: str, tmp_path: Path) -> None:
    technique = Ia3(**KINDS[kind])
    model = shaken("gpt2" if kind == "default" else "bert", technique)
    family = model.config.model_type
    config = technique.adapter_config(model, anatomy(tiny_model(family, CLASSIFIER)))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(technique.adapter_tensors(model), tmp_path / "adapter_model.safetensors")
    assert config["peft_type"] == "IA3" and config["fan_in_fan_out"] == (family == "gpt2")
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["score" if family == "gpt2" else "classifier"]
    read = Ia3.from_adapter(tmp_path)
    again = tiny_model(family, CLASSIFIER)
    read.apply(again, anatomy(again), None)
    read.load_adapter(again, technique.adapter_tensors(model))
    assert torch.equal(answers(again), answers(model))


def test_an_adapter_whose_targets_are_a_pattern_is_refused(tmp_path: Path) -> None:
    config = {"peft_type": "IA3", "target_modules": r".*\.(key|value)", "feedforward_modules": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="target_modules and feedforward_modules"):
        Ia3.from_adapter(tmp_path)


def test_an_adapter_without_its_factors_is_refused() -> None:
    technique = Ia3()
    model = shaken("bert", technique)
    tensors = technique.adapter_tensors(model)
    del tensors["base_model.model.bert.encoder.layer.1.attention.self.key.ia3_l"]
    with pytest.raises(CheckpointError, match="lacks 1 of 11 "):
        technique.load_adapter(model, tensors)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"target_modules": ["kee"]}, "'kee'"),
        ({"target_modules": ["classifier"]}, "'classifier'"),
        ({"feedforward_modules": ["norm"]}, "'norm'"),
    ],
)
def test_a_target_that_means_nothing_is_refused(keys: dict[str, Any], says: str) -> None:
    model = tiny_model("bert", CLASSIFIER)
    with pytest.raises(RecipeError) as caught:
        Ia3(**keys).apply(model, anatomy(model), None)
    assert says in str(caught.value)


@pytest.mark.parametrize("keys", [{"target_modules": []}, {"target_modules": "key"}, {"r": 8}])
def test_what_is_no_setting_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Ia3(**keys)


def test_the_rate_is_the_same_at_any_width() -> None:
    assert Ia3().learning_rate(anatomy(tiny_model("bert", CLASSIFIER))) == LEARNING_RATE
