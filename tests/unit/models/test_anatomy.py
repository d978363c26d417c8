from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from tunesmith.errors import RecipeError
from tunesmith.models import anatomy as module
from tunesmith.models.anatomy import Naming, anatomy
from tunesmith.testing import FAMILIES, tiny_model

CLASSIFIER, CAUSAL, MASKED = "AutoModelForSequenceClassification", "AutoModelForCausalLM", "AutoModelForMaskedLM"

FIRST_BLOCK = {
    "bert": "bert.encoder.layer.0",
    "roberta": "roberta.encoder.layer.0",
    "distilbert": "distilbert.transformer.layer.0",
    "modernbert": "model.layers.0",
    "gpt2": "transformer.h.0",
    "llama": "model.layers.0",
    "qwen2": "model.layers.0",
    "mistral": "model.layers.0",
}
HEADS = {
    "bert": ("classifier",),
    "roberta": ("classifier",),
    "distilbert": ("pre_classifier", "classifier"),
    "modernbert": ("head", "classifier"),
}
QUERY_VALUE = {
    "bert": ("attention.self.query", "attention.self.value"),
    "roberta": ("attention.self.query", "attention.self.value"),
    "distilbert": ("attention.q_lin", "attention.v_lin"),
    "modernbert": ("attn.Wqkv",),
    "gpt2": ("attn.c_attn",),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read(family: str) -> None:
    model = tiny_model(family, CLASSIFIER, num_labels=3)
    found = anatomy(model)
    first = FIRST_BLOCK[family]
    assert (found.family, found.hidden_size, len(found.blocks)) == (family, 32, 3)
    assert found.blocks == tuple(first[:-1] + str(index) for index in range(3))
    assert found.head == HEADS.get(family, ("score",))
    assert set(found.roles) >= {"query", "key", "value", "attention_output", "mlp_up", "mlp_down", "norm"}
    parts = QUERY_VALUE.get(family, ("self_attn.q_proj", "self_attn.v_proj"))
    assert found.targets(["query", "value"])[: len(parts)] == tuple(f"{first}.{part}" for part in parts)
    assert all(isinstance(model.get_submodule(path), nn.Module) for paths in found.roles.values() for path in paths)
    assert found.tied == frozenset()
    inside = [path for path in found.linears if path.startswith(first)]
    roles = {path for role, paths in found.roles.items() if role != "norm" for path in paths if path.startswith(first)}
    assert set(inside) == roles, "every linear map of a block has a role"


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_rises_from_the_embeddings_to_the_head(family: str) -> None:
    model = tiny_model(family, CLASSIFIER)
    found = anatomy(model)
    depths = {name: found.depth_of(name) for name, _ in model.named_parameters()}
    assert set(depths.values()) == {0, 1, 2, 3, 4}
    assert all(depths[name] == 4 for name in found.learns_always)
    assert all("emb" in name or "wte" in name or "wpe" in name for name, depth in depths.items() if depth == 0)
    for name, _ in model.get_submodule(found.blocks[1]).named_parameters():
        assert depths[f"{found.blocks[1]}.{name}"] == 2


def test_block_ten_is_not_block_one() -> None:
    found = anatomy(tiny_model("bert", CLASSIFIER, num_hidden_layers=12))
    assert found.depth_of("bert.encoder.layer.10.attention.self.query.weight") == 11
    assert found.blocks[10] == "bert.encoder.layer.10"


@pytest.mark.parametrize(
    ("family", "kind", "output"),
    [
        ("gpt2", CAUSAL, "lm_head"),
        ("bert", MASKED, "cls.predictions.decoder"),
        ("roberta", MASKED, "lm_head.decoder"),
        ("distilbert", MASKED, "vocab_projector"),
    ],
)
def test_a_tied_output_is_no_head_and_no_target(family: str, kind: str, output: str) -> None:
    found = anatomy(tiny_model(family, kind))
    assert found.head == () and found.learns_always == frozenset()
    assert found.tied == {output}
    with pytest.raises(RecipeError, match="shares its weight"):
        found.targets([output])
    assert output not in found.targets("all-linear")


def test_an_untied_output_is_pretrained_and_may_be_a_target() -> None:
    found = anatomy(tiny_model("llama", CAUSAL))
    assert found.head == () and found.tied == frozenset()
    assert found.targets(["lm_head"]) == ("lm_head",)
    assert found.depth_of("lm_head.weight") == 4


def test_new_parameters_learn_always() -> None:
    pooler = frozenset({"bert.pooler.dense.weight", "bert.pooler.dense.bias"})
    found = anatomy(tiny_model("bert", CLASSIFIER), new=pooler)
    assert found.learns_always == pooler | {"classifier.weight", "classifier.bias"}
    with pytest.raises(RecipeError, match="learns whole"):
        found.targets(["pooler.dense"])
    assert "bert.pooler.dense" not in found.targets(["dense"])


def test_targets_are_roles_suffixes_or_all() -> None:
    found = anatomy(tiny_model("bert", CLASSIFIER))
    assert found.targets(["attention.self.query"]) == found.targets(["query"]) == found.roles["query"]
    assert found.targets(["bert.encoder.layer.2.attention.self.key"]) == ("bert.encoder.layer.2.attention.self.key",)
    assert found.targets(["value", "query"]) == found.targets(["query", "value", "query"])
    assert len(found.targets("all-linear")) == 18
    assert found.targets(["dense"])[-1] == "bert.pooler.dense"
    assert found.targets(["output.dense"]) == tuple(
        f"bert.encoder.layer.{index}.{part}output.dense" for index in range(3) for part in ("attention.", "")
    )


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("quary", "did you mean 'query'?"),
        ("q_proj", "roles: attention_output, key, mlp_down, mlp_up, query, value; modules: dense, key, query, value"),
        ("uery", "no linear map"),
        ("norm", "no linear map"),
        ("classifier", "belongs to the head"),
        ("", "no linear map"),
    ],
)
def test_a_target_that_means_nothing_is_refused(word: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        anatomy(tiny_model("bert", CLASSIFIER)).targets(["query", word])
    assert says in str(caught.value) and str(caught.value).startswith("technique.target_modules: ")


def test_one_map_stands_under_every_role_it_holds() -> None:
    found = anatomy(tiny_model("modernbert", CLASSIFIER))
    assert found.roles["query"] == found.roles["key"] == found.roles["value"]
    assert found.roles["mlp_up"] == found.roles["mlp_gate"]
    phi = anatomy(tiny_model_of("phi3"))
    assert phi.roles["query"] == phi.roles["value"] == ("layers.0.self_attn.qkv_proj", "layers.1.self_attn.qkv_proj")
    assert phi.roles["mlp_up"] == ("layers.0.mlp.gate_up_proj", "layers.1.mlp.gate_up_proj")


def tiny_model_of(model_type: str) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tokens = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    keys = sizes | tokens | ({"num_key_value_heads": 2} if model_type == "phi3" else {})
    return transformers.AutoModel.from_config(transformers.CONFIG_MAPPING[model_type](**keys))


def test_a_family_that_no_row_knows_still_has_its_structure() -> None:
    model = tiny_model_of("gpt_neox")
    found = anatomy(model)
    assert (found.family, found.blocks, found.roles) == ("gpt_neox", ("layers.0", "layers.1"), {})
    assert found.embeddings == ("embed_in",)
    assert len(found.targets("all-linear")) == 8
    assert found.targets(["query_key_value"])[0] == "layers.0.attention.query_key_value"
    with pytest.raises(RecipeError, match="roles: none known"):
        found.targets(["query"])


class Plain(nn.Module):
    """No transformers model at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.short = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.body = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.unlike = nn.ModuleList([nn.Linear(8, 8), nn.ReLU(), nn.ReLU(), nn.ReLU()])
        self.norm = nn.LayerNorm(8)


def test_a_model_from_elsewhere_is_read_by_structure() -> None:
    found = anatomy(Plain())
    assert found.blocks == ("body.0", "body.1", "body.2")
    assert (found.family, found.hidden_size, found.head) == ("Plain", 8, ())
    assert found.embeddings == ("embed", "short")
    assert found.targets("all-linear") == ("body.0.0", "body.1.0", "body.2.0")
    assert found.depth_of("norm.weight") == 4


def test_a_model_without_blocks_has_none() -> None:
    found = anatomy(nn.Sequential(nn.Linear(4, 4)))
    assert found.blocks == () and found.embeddings == ()
    with pytest.raises(RecipeError, match="no linear map inside a block"):
        found.targets("all-linear")


def test_a_linear_map_that_is_used_without_its_forward_is_no_target() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(2))
    assert anatomy(model).linears == ()


def test_an_encoder_decoder_and_nested_stages_need_one_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    t5 = Naming(
        blocks=("encoder.block.*", "decoder.block.*"),
        roles={"query": ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q")},
    )
    swin = Naming(blocks=("encoder.layers.*.blocks.*",), roles={"query": ("attention.q_proj", "attention.self.query")})
    monkeypatch.setattr(module, "NAMINGS", (*module.NAMINGS, t5, swin))
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=32)
    found = anatomy(transformers.AutoModel.from_config(config))
    assert found.blocks == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    assert len(found.roles["query"]) == 6
    with torch.device("meta"):
        found = anatomy(transformers.AutoModel.from_config(transformers.SwinConfig(depths=[1, 2], num_heads=[1, 2])))
    assert len(found.blocks) == 3 and len(found.roles["query"]) == 3


def test_the_same_seed_gives_the_same_model_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    one, two, other = (tiny_model("bert", CLASSIFIER, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
