from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapting import trainable
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith import registry
from tunesmith.errors import RecipeError
from tunesmith.models.anatomy import anatomy
from tunesmith.techniques.adapter import LEARNING_RATE, Adapter, Bottleneck
from tunesmith.testing import CLASSIFYING, tiny_model

CLASSIFIER = "AutoModelForSequenceClassification"
KINDS = ("houlsby", "pfeiffer", "parallel")
TOKENS = torch.tensor([[2, 9, 7, 11, 3], [2, 8, 13, 4, 3]])


def bottlenecks(model: nn.Module) -> list[Bottleneck]:
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def shaken(family: str, **keys: Any) -> PreTrainedModel:
    """Return an adapted model with random bottlenecks."""
    model = tiny_model(family, CLASSIFIER)
    Adapter(**keys).apply(model, anatomy(model), None)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in bottlenecks(model):
            for parameter in module.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def added(adapter: Any, x: Tensor, activation: Any = F.gelu) -> Tensor:
    """Return U f(D x + d) + u by the formula."""
    up, down = adapter.up, adapter.down
    return activation(x @ down.weight.t() + down.bias) @ up.weight.t() + up.bias


def linear(map_: Any, x: Tensor) -> Tensor:
    return F.linear(x, map_.weight, map_.bias)


def norm(layer_norm: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, (32,), layer_norm.weight, layer_norm.bias, layer_norm.eps)


def test_the_registry_knows_it_by_its_file() -> None:
    assert registry.get("technique", "adapter") is Adapter


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CLASSIFYING)
def test_what_is_added_and_the_head_learn(family: str, kind: Any) -> None:
    model = tiny_model(family, CLASSIFIER)
    found = anatomy(model)
    before = set(model.state_dict())
    Adapter(kind=kind).apply(model, found, None)
    assert trainable(model) == (set(model.state_dict()) - before) | found.always_trainable
    places = len(bottlenecks(model))
    mlps, attentions = len(found.roles["mlp_down"]), len(found.roles["attention_output"])
    assert places == (mlps + attentions if kind == "houlsby" else mlps)
    r = 32 // 16
    assert sum(model.get_parameter(n).numel() for n in trainable(model) - found.always_trainable) == places * (
        2 * 32 * r + 32 + r
    )
    assert all(not module.up.weight.any() and not module.up.bias.any() for module in bottlenecks(model))


@pytest.mark.parametrize(("factor", "r"), [(1.0, 32), (3.0, 10), (16.0, 2), (1000.0, 1)])
def test_the_factor_divides_the_width(factor: float, r: int) -> None:
    model = tiny_model("bert", CLASSIFIER)
    Adapter(reduction_factor=factor).apply(model, anatomy(model), None)
    assert {module.down.out_features for module in bottlenecks(model)} == {r}


def states_around_a_block(model: PreTrainedModel, block: nn.Module, inner: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input of a block, the input of its attention's output layer, and its output."""
    kept: dict[str, Tensor] = {}
    handles = [
        block.register_forward_pre_hook(lambda _, args: kept.update({"x": args[0]})),
        inner.register_forward_pre_hook(lambda _, args: kept.update({"mixed": args[0]})),
        block.register_forward_hook(lambda _, args, out: kept.update({"y": out[0] if isinstance(out, tuple) else out})),
    ]
    with torch.no_grad():
        model(input_ids=TOKENS)
    for handle in handles:
        handle.remove()
    return kept["x"], kept["mixed"], kept["y"]


@torch.no_grad()
def test_houlsby_stands_after_attention_and_after_mlp_before_the_residual() -> None:
    model = shaken("bert", kind="houlsby")
    layer = model.bert.encoder.layer[1]
    x, mixed, y = states_around_a_block(model, layer, layer.attention.output.dense)
    attended = linear(layer.attention.output.dense, mixed)
    attended = attended + added(layer.attention.output.dense.adapter, attended)
    middle = norm(layer.attention.output.LayerNorm, x + attended)
    out = linear(layer.output.dense, F.gelu(linear(layer.intermediate.dense, middle)))
    out = out + added(layer.output.dense.adapter, out)
    torch.testing.assert_close(norm(layer.output.LayerNorm, middle + out), y, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pfeiffer_stands_once_between_two_of_the_same_norm() -> None:
    """y = N(z + A(N(z))), where z is the input of the block's last norm."""
    model = shaken("bert", kind="pfeiffer")
    layer = model.bert.encoder.layer[1]
    x, mixed, y = states_around_a_block(model, layer, layer.attention.output.dense)
    middle = norm(layer.attention.output.LayerNorm, x + linear(layer.attention.output.dense, mixed))
    z = middle + linear(layer.output.dense, F.gelu(linear(layer.intermediate.dense, middle)))
    last = layer.output.LayerNorm
    expected = norm(last, z + added(last.adapter, norm(last, z), F.relu))
    torch.testing.assert_close(expected, y, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pfeiffer_without_a_last_norm_stands_after_the_mlp() -> None:
    model = shaken("gpt2", kind="pfeiffer")
    block = model.transformer.h[1]
    x, mixed, y = states_around_a_block(model, block, block.attn.c_proj)
    middle = x + mixed @ block.attn.c_proj.weight + block.attn.c_proj.bias
    up = norm(block.ln_2, middle) @ block.mlp.c_fc.weight + block.mlp.c_fc.bias
    out = F.gelu(up, approximate="tanh") @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
    expected = middle + out + added(block.mlp.c_proj.adapter, out, F.relu)
    torch.testing.assert_close(expected, y, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_parallel_hears_what_the_mlp_hears_and_counts_four_times() -> None:
    model = shaken("llama", kind="parallel")
    mlp = model.model.layers[1].mlp
    kept: dict[str, Tensor] = {}
    mlp.register_forward_hook(lambda _, args, out: kept.update({"x": args[0], "y": out}))
    model(input_ids=TOKENS)
    x = kept["x"]
    plain = linear(mlp.down_proj, F.silu(linear(mlp.gate_proj, x)) * linear(mlp.up_proj, x))
    torch.testing.assert_close(plain + 4 * added(mlp.down_proj.adapter, x, F.relu), kept["y"], atol=1e-5, rtol=1e-5)
    assert mlp.down_proj.adapter.mlp_input is None, "nothing is kept after a forward pass"


def test_a_decoder_on_an_encoder_has_one_after_its_cross_attention_too() -> None:
    model = shaken("t5", kind="houlsby")
    decoder = [name for name in trainable(model) if ".decoder.block.1." in name and name.endswith("up.bias")]
    assert {name.split("block.1.")[1] for name in decoder} == {
        "layer.0.SelfAttention.o.adapter.up.bias",
        "layer.1.EncDecAttention.o.adapter.up.bias",
        "layer.2.DenseReluDense.wo.adapter.up.bias",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_whose_parts_are_not_known_is_refused(kind: Any) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    with pytest.raises(RecipeError) as caught:
        Adapter(kind=kind).apply(model, anatomy(model), None)
    assert caught.value.where == "technique.kind" and "mlp_down" in str(caught.value)


def test_it_cannot_be_merged_and_says_why() -> None:
    with pytest.raises(RecipeError, match="technique={name: adapter, continue: true}") as caught:
        Adapter().merge(shaken("bert"))
    assert Adapter.cannot_merge and Adapter.cannot_merge in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_was_learned(kind: Any) -> None:
    technique, model = Adapter(kind=kind), shaken("bert", kind=kind)
    again = tiny_model("bert", CLASSIFIER)
    parts = anatomy(again)
    technique.apply(again, parts, None)
    technique.load_adapter(again, technique.adapter_tensors(model))
    assert torch.equal(again(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    config = technique.adapter_config(model, parts)
    assert config == {"peft_type": "TUNESMITH_BOTTLENECK", "kind": kind, "reduction_factor": 16.0}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"kind": "mam"}, "houlsby"),
        ({"reduction_factor": 0.5}, "greater than or equal to 1"),
        ({"r": 8}, "Extra inputs"),
    ],
)
def test_what_is_no_setting_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Adapter(**keys)


def test_the_rate_falls_with_the_width() -> None:
    assert Adapter().learning_rate(anatomy(tiny_model("bert", CLASSIFIER))) == pytest.approx(LEARNING_RATE * 12**0.5)
