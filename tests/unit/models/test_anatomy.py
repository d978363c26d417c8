from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from tunesmith.errors import RecipeError
from tunesmith.models import anatomy as module
from tunesmith.models.anatomy import anatomy
from tunesmith.models.namings import Naming
from tunesmith.testing import CLASSIFYING, tiny_model

CLASSIFIER, CAUSAL, MASKED = "AutoModelForSequenceClassification", "AutoModelForCausalLM", "AutoModelForMaskedLM"

ENCODER_DECODER = ("t5", "bart")
STACKS: dict[str, tuple[tuple[str, int], ...]] = {
    "bert": (("bert.encoder.layer", 3),),
    "roberta": (("roberta.encoder.layer", 3),),
    "distilbert": (("distilbert.transformer.layer", 3),),
    "modernbert": (("model.layers", 3),),
    "gpt2": (("transformer.h", 3),),
    "albert": (("albert.encoder.albert_layer_groups.0.albert_layers", 1),),  # one block, applied three times
    "electra": (("electra.encoder.layer", 3),),
    "deberta": (("deberta.encoder.layer", 3),),
    "deberta-v2": (("deberta.encoder.layer", 3),),
    "t5": (("transformer.encoder.block", 3), ("transformer.decoder.block", 3)),
    "bart": (("model.encoder.layers", 3), ("model.decoder.layers", 2)),
}
HEADS = {
    "bert": ("classifier",),
    "roberta": ("classifier",),
    "distilbert": ("pre_classifier", "classifier"),
    "modernbert": ("head", "classifier"),
    "albert": ("classifier",),
    "electra": ("classifier",),
    "deberta": ("pooler", "classifier"),
    "deberta-v2": ("pooler", "classifier"),
    "t5": ("classification_head",),
    "bart": ("classification_head",),
}
QUERY_VALUE = {
    "bert": ("attention.self.query", "attention.self.value"),
    "roberta": ("attention.self.query", "attention.self.value"),
    "distilbert": ("attention.q_lin", "attention.v_lin"),
    "modernbert": ("attn.Wqkv",),
    "gpt2": ("attn.c_attn",),
    "albert": ("attention.query", "attention.value"),
    "electra": ("attention.self.query", "attention.self.value"),
    "deberta": ("attention.self.in_proj",),
    "deberta-v2": ("attention.self.query_proj", "attention.self.value_proj"),
    "phi3": ("self_attn.qkv_proj",),
    "t5": ("layer.0.SelfAttention.q", "layer.0.SelfAttention.v"),
}
WITHOUT_ROLE = {
    "deberta": {"attention.self.pos_proj", "attention.self.pos_q_proj"},
    "deberta-v2": {"attention.self.pos_query_proj", "attention.self.pos_key_proj"},
}
"""Linear layers that exist only in one family: DeBERTa projects relative positions."""

NO_MAPS = {"norm", "last_norm"}


def blocks_of(family: str) -> tuple[str, ...]:
    stacks = STACKS.get(family, (("model.layers", 3),))
    return tuple(f"{path}.{index}" for path, count in stacks for index in range(count))


@pytest.mark.parametrize("family", CLASSIFYING)
def test_every_family_is_read(family: str) -> None:
    model = tiny_model(family, CLASSIFIER, num_labels=3)
    found = anatomy(model)
    blocks = blocks_of(family)
    assert (found.family, found.hidden_size, found.blocks) == (family, 32, blocks)
    assert found.head == HEADS.get(family, ("score",))
    assert set(found.roles) >= {"query", "key", "value", "attention_output", "mlp_up", "mlp_down", "norm"}
    parts = QUERY_VALUE.get(family, ("self_attn.q_proj", "self_attn.v_proj"))
    first = [path for path in found.targets(["query", "value"]) if path.startswith(f"{blocks[0]}.")]
    assert set(first) == {f"{blocks[0]}.{part}" for part in parts}
    assert all(isinstance(model.get_submodule(path), nn.Module) for paths in found.roles.values() for path in paths)
    assert found.tied == frozenset()
    with_role = {path for role, paths in found.roles.items() if role not in NO_MAPS for path in paths}
    for block in blocks:
        inside = {path for path in found.linears if path.startswith(f"{block}.")}
        without = {f"{block}.{part}" for part in WITHOUT_ROLE.get(family, ())}
        assert inside - with_role == without, "every linear map of a block has a role"


@pytest.mark.parametrize("family", CLASSIFYING)
def test_what_comes_out_of_a_block_is_what_its_last_norm_has_made(family: str) -> None:
    """Only post-norm blocks have a `last_norm`."""
    model = tiny_model(family, CLASSIFIER)
    found = anatomy(model)
    before = family in ("modernbert", "gpt2", "llama", "qwen2", "mistral", "gemma", "phi", "phi3", "t5", "bart")
    assert ("last_norm" not in found.roles) == before
    made: dict[str, Tensor] = {}
    for path in (*found.roles.get("last_norm", ()), *found.blocks):
        model.get_submodule(path).register_forward_hook(
            lambda _, args, out, path=path: made.update({path: out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 9, 7, 3]]))
    for block, norm in zip(found.blocks, found.roles.get("last_norm", ()), strict=False):
        assert torch.equal(made[block], made[norm])


@pytest.mark.parametrize("family", CLASSIFYING)
def test_depth_rises_from_the_embeddings_to_the_head(family: str) -> None:
    model = tiny_model(family, CLASSIFIER)
    found = anatomy(model)
    depths = {name: found.depth_of(name) for name, _ in model.named_parameters()}
    top = len(found.blocks) + 1
    assert set(depths.values()) == set(range(top + 1))
    assert all(depths[name] == top for name in found.always_trainable)
    embeds = ("emb", "wte", "wpe", "shared")
    assert {name for name, depth in depths.items() if depth == 0} == {
        name for name in depths if any(word in name for word in embeds)
    }
    for depth, block in enumerate(found.blocks, start=1):
        assert {depths[f"{block}.{name}"] for name, _ in model.get_submodule(block).named_parameters()} == {depth}


@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_the_decoder_stands_above_the_encoder(family: str) -> None:
    found = anatomy(tiny_model(family, CLASSIFIER))
    encoder = [path for path in found.blocks if ".encoder." in path]
    assert found.blocks[: len(encoder)] == tuple(encoder) and len(encoder) == 3
    crossing = [path for path in found.roles["query"] if "EncDecAttention" in path or "encoder_attn" in path]
    assert len(crossing) == len(found.blocks) - 3, "a decoder's block looks at the encoder as well"
    assert all(".decoder." in path for path in crossing)


def test_a_norm_between_the_stacks_stands_with_the_encoder() -> None:
    found = anatomy(tiny_model("t5", CLASSIFIER))
    assert found.depth_of("transformer.encoder.final_layer_norm.weight") == 3
    assert found.depth_of("transformer.decoder.final_layer_norm.weight") == 7


def test_what_every_block_of_deberta_looks_up_is_an_embedding() -> None:
    found = anatomy(tiny_model("deberta-v2", CLASSIFIER, norm_rel_ebd="layer_norm"))
    for name in ("rel_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias"):
        assert found.depth_of(f"deberta.encoder.{name}") == 0


def test_a_gated_t5_has_its_gate() -> None:
    found = anatomy(tiny_model("t5", CLASSIFIER, feed_forward_proj="gated-gelu"))
    assert found.roles["mlp_gate"][0] == "transformer.encoder.block.0.layer.1.DenseReluDense.wi_0"
    assert found.roles["mlp_up"][-1] == "transformer.decoder.block.2.layer.2.DenseReluDense.wi_1"
    assert len(found.roles["mlp_gate"]) == len(found.roles["mlp_up"]) == len(found.roles["mlp_down"]) == 6


def test_marian_translates() -> None:
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "vocab_size": 32, "max_position_embeddings": 16}
    more = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = transformers.MarianConfig(**sizes, **more, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    found = anatomy(transformers.AutoModelForSeq2SeqLM.from_config(config))
    assert (found.family, found.backbone, found.hidden_size) == ("marian", "model", 16)
    assert found.blocks == ("model.encoder.layers.0", "model.encoder.layers.1", "model.decoder.layers.0")
    assert found.head == () and found.always_trainable == frozenset() and found.tied == {"lm_head"}
    assert found.targets(["query"])[-1] == "model.decoder.layers.0.encoder_attn.q_proj"
    assert len(found.roles["attention_output"]) == 4 and len(found.roles["mlp_down"]) == 3
    tables = ("shared", "encoder.embed_positions", "decoder.embed_positions")
    assert {found.depth_of(f"model.{table}.weight") for table in tables} == {0}
    assert found.depth_of("model.decoder.layers.0.fc1.weight") == 3


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
    assert found.head == () and found.always_trainable == frozenset()
    assert found.tied == {output}
    with pytest.raises(RecipeError, match="tied"):
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
    assert found.always_trainable == pooler | {"classifier.weight", "classifier.bias"}
    with pytest.raises(RecipeError, match="pooler.dense"):
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
        ("uery", "'uery'"),
        ("norm", "'norm'"),
        ("classifier", "belongs to the head"),
        ("", "''"),
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
    """Model that does not come from transformers."""

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
    with pytest.raises(RecipeError, match="technique=full"):
        found.targets("all-linear")


def test_a_linear_map_that_is_used_without_its_forward_is_no_target() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(2))
    assert anatomy(model).linears == ()


def test_nested_stages_need_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    swin = Naming(blocks=("encoder.layers.*.blocks.*",), roles={"query": ("attention.q_proj", "attention.self.query")})
    monkeypatch.setattr(module, "NAMINGS", (*module.NAMINGS, swin))
    with torch.device("meta"):
        found = anatomy(transformers.AutoModel.from_config(transformers.SwinConfig(depths=[1, 2], num_heads=[1, 2])))
    assert len(found.blocks) == 3 and len(found.roles["query"]) == 3


def test_the_same_seed_gives_the_same_model_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    one, two, other = (tiny_model("bert", CLASSIFIER, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
