from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith import registry
from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.models.anatomy import LINEAR, anatomy
from tunesmith.techniques.lora import LEARNING_RATE, PISSA_FACTOR, Lora, LoraLinear
from tunesmith.testing import CLASSIFYING, tiny_model

CLASSIFIER, CAUSAL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
TOKENS = torch.tensor([[5, 9, 7, 11, 3], [6, 8, 13, 4, 3]])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear", "r": 4},
    "rslora": {"rslora": True},
    "dora": {"dora": True, "target_modules": ["query", "mlp_down"]},
    "pissa": {"init": "pissa", "r": 4},
    "pissa-dora-rslora": {"init": "pissa", "r": 4, "dora": True, "rslora": True},
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def answers(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def train(model: PreTrainedModel, steps: int = 4, lr: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def prepared(family: str, technique: Lora, seed: int = 0) -> PreTrainedModel:
    model = tiny_model(family, CLASSIFIER, seed=seed)
    technique.apply(model, anatomy(model), None)
    return model


def test_the_registry_knows_it_by_its_file() -> None:
    assert registry.get("technique", "lora") is Lora


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CLASSIFYING)
def test_it_starts_as_the_base_learns_beside_it_and_merges_into_it(family: str, kind: str) -> None:
    model, technique = tiny_model(family, CLASSIFIER), Lora(**KINDS[kind])
    found, base = anatomy(model), answers(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    technique.apply(model, found, None)
    torch.testing.assert_close(answers(model), base, atol=1e-6, rtol=1e-5)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if ".lora_" in name} | found.always_trainable
    train(model)
    after = model.state_dict()
    assert set(before) < set(after)
    assert {name for name in before if not torch.equal(before[name], after[name])} == found.always_trainable
    trained = answers(model)
    assert (trained - base).abs().max() > 1e-2
    technique.merge(model)
    torch.testing.assert_close(answers(model), trained, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == set(before)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert {type(model.get_submodule(path)) for path in found.linears} <= set(LINEAR)
    targets = found.targets(technique.target_modules)
    assert all(not torch.equal(before[f"{path}.weight"], model.state_dict()[f"{path}.weight"]) for path in targets)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_was_learned(kind: str) -> None:
    technique = Lora(**KINDS[kind])
    model, again = prepared("bert", technique), prepared("bert", technique)
    train(model)
    tensors = technique.adapter_tensors(model)
    technique.load_adapter(again, tensors)
    torch.testing.assert_close(answers(again), answers(model), atol=1e-6, rtol=1e-5)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    for name, tensor in technique.adapter_tensors(again).items():
        torch.testing.assert_close(tensor, tensors[name], atol=1e-6, rtol=1e-5)


def write(folder: Path, technique: Lora, model: PreTrainedModel, **changes: Any) -> Path:
    config = technique.adapter_config(model, anatomy(tiny_model(model.config.model_type, CLASSIFIER)))
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(technique.adapter_tensors(model), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_says_how_it_is_read(kind: str, tmp_path: Path) -> None:
    technique = Lora(**KINDS[kind])
    model = prepared("gpt2", technique)
    train(model)
    read = Lora.from_adapter(write(tmp_path, technique, model))
    assert (read.r, read.init) == (technique.r * (2 if technique.init == "pissa" else 1), "default")
    assert read.scaling == pytest.approx(technique.scaling)
    again = prepared("gpt2", read)
    read.load_adapter(again, technique.adapter_tensors(model))
    torch.testing.assert_close(answers(again), answers(model), atol=1e-5, rtol=1e-5)


def test_pissa_starts_from_the_principal_part_and_leaves_the_weight() -> None:
    linear = nn.Linear(12, 8)
    weight = linear.weight.detach().clone()
    adapted = LoraLinear(linear, r=3, scaling=2.0, pissa=True)
    U, S, Vh = torch.linalg.svd(weight)
    best = U[:, :3] * S[:3] @ Vh[:3]
    torch.testing.assert_close(2.0 * adapted.lora_B.weight @ adapted.lora_A.weight, best, atol=1e-5, rtol=1e-5)
    x = torch.randn(5, 12)
    assert torch.equal(adapted.weight, weight)
    assert torch.equal(adapted(x), linear(x)), "bit for bit: both factors of the change are zero"
    assert {name for name, _ in adapted.named_buffers()} == {"pissa_A", "pissa_B"} < set(adapted.state_dict())


def test_a_small_change_of_pissa_is_not_lost_in_bf16() -> None:
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data.mul_(8)
    adapted, x = LoraLinear(linear, r=8, scaling=2.0, pissa=True), torch.randn(32, 64)
    linear.weight.data.zero_()  # what remains is the change alone
    adapted.lora_A.weight.data.add_(torch.randn(8, 64), alpha=1e-4)
    change = adapted(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = (adapted(x).float() - change).norm() / change.norm()
    assert error < 0.01, "A in bf16 is off by more than the change itself; A - A0 is not"


def test_a_rank_that_a_weight_does_not_have_is_refused_for_pissa() -> None:
    with pytest.raises(RecipeError, match="1 to 16"):
        prepared("llama", Lora(init="pissa", r=17))
    prepared("llama", Lora(r=17))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_it_works_with_frozen_weights_in_bf16_with_and_without_autocast(family: str, dora: bool) -> None:
    technique = Lora(dora=dora, target_modules="all-linear", r=4)
    model = prepared(family, technique)
    train(model)
    right = answers(model)
    for _, parameter in model.named_parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=TOKENS, labels=torch.tensor([0, 1])).loss
        torch.testing.assert_close(answers(model).float(), right, atol=0.3, rtol=0.1)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    out = answers(model)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), right, atol=0.3, rtol=0.1)


def test_a_base_in_bf16_gets_factors_in_fp32() -> None:
    linear = nn.Linear(8, 6).bfloat16()
    adapted = LoraLinear(linear, r=2, scaling=1.0, dora=True)
    learning = {name: p.dtype for name, p in adapted.named_parameters() if name.startswith("lora_")}
    assert set(learning.values()) == {torch.float32} and len(learning) == 3
    x = torch.randn(3, 8).bfloat16()
    torch.testing.assert_close(adapted(x), linear(x), atol=1e-2, rtol=1e-2)
    assert adapted(x).dtype == adapted.merged().weight.dtype == torch.bfloat16


def test_a_merge_adds_in_fp32() -> None:
    linear = nn.Linear(64, 64).bfloat16()
    adapted = LoraLinear(linear, r=4, scaling=1.0)
    nn.init.normal_(adapted.lora_B.weight, std=0.5)
    change = adapted.lora_B.weight @ adapted.lora_A.weight
    assert torch.equal(adapted.merged().weight, (linear.weight.float() + change).bfloat16())


def test_a_transposed_map_and_one_without_bias() -> None:
    conv, x = Conv1D(6, 4), torch.randn(2, 3, 4)
    adapted = LoraLinear(conv, r=2, scaling=2.0)
    assert (adapted.in_features, adapted.out_features) == (4, 6)
    assert torch.equal(adapted(x), conv(x))
    nn.init.normal_(adapted.lora_B.weight)
    plain = adapted.merged()
    assert isinstance(plain, Conv1D) and plain.weight.shape == (4, 6) and (plain.nf, plain.nx) == (6, 4)
    torch.testing.assert_close(plain(x), adapted(x), atol=1e-5, rtol=1e-5)
    bare = LoraLinear(nn.Linear(4, 6, bias=False), r=2, scaling=1.0)
    assert "bias" not in bare.state_dict() and bare.merged().bias is None


def test_a_weight_with_an_empty_row_gives_numbers_under_dora() -> None:
    linear = nn.Linear(4, 3)
    linear.weight.data[1] = 0
    adapted = LoraLinear(linear, r=2, scaling=1.0, dora=True)
    out = adapted(torch.randn(5, 4))
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in adapted.parameters() if p.grad is not None)


def test_dropout_falls_only_while_training() -> None:
    adapted = LoraLinear(nn.Linear(16, 16), r=4, scaling=1.0, dropout=0.5)
    nn.init.normal_(adapted.lora_B.weight)
    x = torch.randn(4, 16)
    assert not torch.equal(adapted.train()(x), adapted(x))
    assert torch.equal(adapted.eval()(x), adapted(x))


def test_new_parameters_learn_and_are_saved_whole() -> None:
    model = tiny_model("bert", CLASSIFIER)
    found = anatomy(model, new=frozenset({"bert.pooler.dense.weight", "bert.pooler.dense.bias"}))
    technique = Lora()
    technique.apply(model, found, None)
    assert technique.adapter_config(model, found)["modules_to_save"] == ["classifier", "bert.pooler.dense"]
    assert "base_model.model.bert.pooler.dense.bias" in technique.adapter_tensors(model)


def test_a_new_parameter_beside_the_blocks_is_refused_before_training() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(4, 4)}) for _ in range(2))

    model = Body()
    with pytest.raises(RecipeError, match="'scale' is not in the checkpoint"):
        Lora(target_modules=["proj"]).apply(model, anatomy(model, new=frozenset({"scale"})), None)


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("bert", ["query", "value"], ["query", "value"]),
        ("bert", ["attention_output"], ["attention.output.dense"]),
        ("bert", ["mlp_up", "mlp_down"], None),
        ("distilbert", ["query", "value"], ["q_lin", "v_lin"]),
        ("modernbert", ["attention_output"], ["attn.Wo"]),
        ("gpt2", ["query", "value"], ["c_attn"]),
        ("gpt2", ["attention_output"], ["attn.c_proj"]),
        ("llama", ["query", "value"], ["q_proj", "v_proj"]),
        ("llama", ["model.layers.1.self_attn.q_proj"], ["1.self_attn.q_proj"]),
        ("roberta", ["dense"], ["dense"]),
    ],
)
def test_the_config_names_exactly_what_is_adapted(family: str, targets: list[str], names: list[str] | None) -> None:
    model, technique = tiny_model(family, CLASSIFIER), Lora(target_modules=targets)
    found = anatomy(model)
    paths = [path for path, _ in model.named_modules()]
    technique.apply(model, found, None)
    config = technique.adapter_config(model, found)
    assert names is None or config["target_modules"] == names
    whole = config["modules_to_save"]
    matched = {
        path
        for path in paths
        if any(f".{path}".endswith(f".{target}") for target in config["target_modules"])
        and not any(f"{path}.".startswith(f"{module}.") for module in whole)
    }
    assert matched == {path for path, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert config["fan_in_fan_out"] is (family == "gpt2") and config["task_type"] == "SEQ_CLS"


def test_the_task_is_named_as_peft_names_it() -> None:
    for family, kind, task in [("gpt2", CAUSAL, "CAUSAL_LM"), ("bert", "AutoModel", None)]:
        model = tiny_model(family, kind)
        found = anatomy(model)
        Lora().apply(model, found, None)
        config = Lora().adapter_config(model, found)
        assert (config["task_type"], config["modules_to_save"]) == (task, None)


def test_alpha_follows_the_rank_unless_given() -> None:
    assert (Lora().alpha, Lora().scaling) == (16, 2)
    assert (Lora(r=64).alpha, Lora(r=64, alpha=16).scaling) == (128, 0.25)
    assert (Lora(rslora=True, r=16).alpha, Lora(rslora=True, r=16).scaling) == (8, 2)
    assert Lora.model_validate({"r": 4, "alpha": None}).alpha == 8
    assert Lora.model_validate(Lora(r=4, target_modules="all-linear").model_dump()).r == 4
    assert Lora.model_validate({"target_modules": "query"}).target_modules == ["query"]


@pytest.mark.parametrize(
    "keys",
    [
        {"r": 0},
        {"r": "8"},
        {"r": True},
        {"alpha": 0},
        {"dropout": 1.0},
        {"target_modules": []},
        {"target_modules": [1]},
        {"init": "olora"},
        {"lora_plus_ratio": 0.5},
        {"rank": 8},
    ],
)
def test_values_that_cannot_be_meant_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Lora(**keys)


def test_the_rate_falls_with_width_and_with_the_projections_adapted() -> None:
    bert, gpt2 = anatomy(tiny_model("bert", CLASSIFIER)), anatomy(tiny_model("gpt2", CLASSIFIER))
    assert Lora().learning_rate(bert) == pytest.approx(LEARNING_RATE * 12**0.5)
    assert Lora(target_modules=["query"]).learning_rate(bert) == pytest.approx(LEARNING_RATE * 12**0.5)
    assert Lora(target_modules="all-linear").learning_rate(bert) == pytest.approx(LEARNING_RATE * 12**0.5 / 3)
    assert Lora().learning_rate(gpt2) == pytest.approx(LEARNING_RATE * 12**0.5 * 2 / 3), "c_attn holds three"
    assert Lora(init="pissa").learning_rate(bert) == pytest.approx(LEARNING_RATE * 12**0.5 * PISSA_FACTOR)


def test_lora_plus_speeds_b_alone() -> None:
    found = anatomy(tiny_model("bert", CLASSIFIER))
    technique = Lora(lora_plus_ratio=16.0)
    stem = "bert.encoder.layer.0.attention.self.query"
    names = [f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", f"{stem}.lora_magnitude_vector", "classifier.weight"]
    assert [technique.lr_scale(name, found) for name in names] == [1, 16, 1, 1]


def test_a_target_tied_to_the_embedding_is_refused() -> None:
    model = tiny_model("gpt2", CAUSAL)
    with pytest.raises(RecipeError, match="lm_head|shares"):
        Lora(target_modules=["lm_head"]).apply(model, anatomy(model), None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"bias": "all"}, "bias 'all'"),
        ({"rank_pattern": {"query": 4}}, "rank_pattern"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"r": 0}, "r: Input should be greater"),
        ({"something_new": True}, "something_new 'True'"),
    ],
)
def test_an_adapter_of_a_kind_we_do_not_know_is_refused_by_key(changes: Any, says: str, tmp_path: Path) -> None:
    technique = Lora()
    with pytest.raises(RecipeError) as caught:
        Lora.from_adapter(write(tmp_path, technique, prepared("bert", technique), **changes))
    assert says in str(caught.value) and "adapter_config.json" in str(caught.value)


def test_targets_that_only_peft_can_spell_are_read_from_the_tensors(tmp_path: Path) -> None:
    technique = Lora(target_modules=["bert.encoder.layer.1.attention.self.query", "mlp_down"])
    folder = write(tmp_path, technique, prepared("bert", technique), target_modules=r".*(1\..*query|\d\.output.dense)")
    read = Lora.from_adapter(folder)
    found = anatomy(tiny_model("bert", CLASSIFIER))
    assert found.targets(read.target_modules) == found.targets(technique.target_modules)
    folder = write(tmp_path, Lora(), prepared("bert", Lora()), target_modules=["query", "value", "q_proj"])
    assert Lora.from_adapter(folder).target_modules == ["query", "value"]


def test_a_damaged_or_foreign_adapter_is_refused(tmp_path: Path) -> None:
    technique = Lora()
    model = prepared("bert", technique)
    tensors = technique.adapter_tensors(model)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: "):
        Lora.from_adapter(tmp_path / "nowhere")
    folder = write(tmp_path, technique, model)
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: "):
        Lora.from_adapter(folder)
    headless = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    with pytest.raises(CheckpointError, match=r"2 of 14 .*'classifier\.weight'"):
        technique.load_adapter(model, headless)
    with pytest.raises(CheckpointError, match=r"'bert\.nothing' \(1,\)"):
        technique.load_adapter(model, tensors | {"base_model.model.bert.nothing": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="lora_A"):
        technique.load_adapter(prepared("bert", Lora(r=4)), tensors)
    with pytest.raises(CheckpointError, match="rank 8 .*16"):
        Lora(init="pissa").load_adapter(prepared("bert", Lora(init="pissa")), tensors)


def test_what_an_adapter_brings_besides_goes_on_learning() -> None:
    technique = Lora()
    model = prepared("bert", technique)
    pooler = "base_model.model.bert.pooler.dense.weight"
    technique.load_adapter(model, technique.adapter_tensors(model) | {pooler: torch.zeros(32, 32)})
    assert torch.equal(technique.adapter_tensors(model)[pooler], torch.zeros(32, 32))
