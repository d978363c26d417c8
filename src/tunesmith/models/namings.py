"""Module names of model families, as data: one row per naming scheme. A new family needs a row here, but no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Naming:
    """One naming scheme. `*` in a path matches one step; a role lists all of its possible names."""

    blocks: tuple[str, ...]
    """Paths of the blocks inside the backbone, one per stack (encoder, decoder), in forward order."""

    roles: Mapping[str, tuple[str, ...]]
    """Role -> paths inside a block. A fused projection has several roles. `last_norm` is the norm after the residual
    sum, whose output is the output of the block (post-norm)."""

    embeddings: tuple[str, ...] = ()
    """Paths inside the backbone of embedding modules that are registered after the blocks."""


_T5 = {
    "query": ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"),
    "key": ("layer.0.SelfAttention.k", "layer.1.EncDecAttention.k"),
    "value": ("layer.0.SelfAttention.v", "layer.1.EncDecAttention.v"),
    "attention_output": ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"),
    "mlp_up": tuple(f"layer.{n}.DenseReluDense.{name}" for n in (1, 2) for name in ("wi", "wi_1")),
    "mlp_gate": tuple(f"layer.{n}.DenseReluDense.wi_0" for n in (1, 2)),
    "mlp_down": tuple(f"layer.{n}.DenseReluDense.wo" for n in (1, 2)),
    "norm": tuple(f"layer.{n}.layer_norm" for n in (0, 1, 2)),
}

NAMINGS = (
    Naming(  # BERT, RoBERTa, XLM-R, ELECTRA, CamemBERT, MPNet-like
        blocks=("encoder.layer.*",),
        roles={
            "query": ("attention.self.query",),
            "key": ("attention.self.key",),
            "value": ("attention.self.value",),
            "attention_output": ("attention.output.dense",),
            "mlp_up": ("intermediate.dense",),
            "mlp_down": ("output.dense",),
            "norm": ("attention.output.LayerNorm", "output.LayerNorm"),
            "last_norm": ("output.LayerNorm",),
        },
    ),
    Naming(  # DistilBERT
        blocks=("transformer.layer.*",),
        roles={
            "query": ("attention.q_lin",),
            "key": ("attention.k_lin",),
            "value": ("attention.v_lin",),
            "attention_output": ("attention.out_lin",),
            "mlp_up": ("ffn.lin1",),
            "mlp_down": ("ffn.lin2",),
            "norm": ("sa_layer_norm", "output_layer_norm"),
            "last_norm": ("output_layer_norm",),
        },
    ),
    Naming(  # ModernBERT: fused query, key and value; fused up and gate
        blocks=("layers.*",),
        roles={
            "query": ("attn.Wqkv",),
            "key": ("attn.Wqkv",),
            "value": ("attn.Wqkv",),
            "attention_output": ("attn.Wo",),
            "mlp_up": ("mlp.Wi",),
            "mlp_gate": ("mlp.Wi",),
            "mlp_down": ("mlp.Wo",),
            "norm": ("attn_norm", "mlp_norm"),
        },
    ),
    Naming(  # DeBERTa; version 1 fuses query, key and value
        blocks=("encoder.layer.*",),
        embeddings=("encoder.rel_embeddings", "encoder.LayerNorm"),
        roles={
            "query": ("attention.self.query_proj", "attention.self.in_proj"),
            "key": ("attention.self.key_proj", "attention.self.in_proj"),
            "value": ("attention.self.value_proj", "attention.self.in_proj"),
            "attention_output": ("attention.output.dense",),
            "mlp_up": ("intermediate.dense",),
            "mlp_down": ("output.dense",),
            "norm": ("attention.output.LayerNorm", "output.LayerNorm"),
            "last_norm": ("output.LayerNorm",),
        },
    ),
    Naming(  # ALBERT: one shared block, applied repeatedly
        blocks=("encoder.albert_layer_groups.*.albert_layers.*",),
        roles={
            "query": ("attention.query",),
            "key": ("attention.key",),
            "value": ("attention.value",),
            "attention_output": ("attention.dense",),
            "mlp_up": ("ffn",),
            "mlp_down": ("ffn_output",),
            "norm": ("attention.LayerNorm", "full_layer_layer_norm"),
            "last_norm": ("full_layer_layer_norm",),
        },
    ),
    Naming(  # BART, mBART, Marian, M2M-100, NLLB: encoder and decoder
        blocks=("encoder.layers.*", "decoder.layers.*"),
        embeddings=("encoder.layernorm_embedding", "decoder.layernorm_embedding"),
        roles={
            "query": ("self_attn.q_proj", "encoder_attn.q_proj"),
            "key": ("self_attn.k_proj", "encoder_attn.k_proj"),
            "value": ("self_attn.v_proj", "encoder_attn.v_proj"),
            "attention_output": ("self_attn.out_proj", "encoder_attn.out_proj"),
            "mlp_up": ("fc1",),
            "mlp_down": ("fc2",),
            "norm": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
        },
    ),
    Naming(blocks=("encoder.block.*", "decoder.block.*"), roles=_T5),  # T5, mT5, Flan-T5: encoder and decoder
    Naming(blocks=("encoder.block.*",), roles=_T5),  # their encoder alone
    Naming(  # Phi: attention and MLP in parallel
        blocks=("layers.*",),
        roles={
            "query": ("self_attn.q_proj",),
            "key": ("self_attn.k_proj",),
            "value": ("self_attn.v_proj",),
            "attention_output": ("self_attn.dense",),
            "mlp_up": ("mlp.fc1",),
            "mlp_down": ("mlp.fc2",),
            "norm": ("input_layernorm",),
        },
    ),
    Naming(  # GPT-2: fused query, key and value
        blocks=("h.*",),
        roles={
            "query": ("attn.c_attn",),
            "key": ("attn.c_attn",),
            "value": ("attn.c_attn",),
            "attention_output": ("attn.c_proj",),
            "mlp_up": ("mlp.c_fc",),
            "mlp_down": ("mlp.c_proj",),
            "norm": ("ln_1", "ln_2"),
        },
    ),
    Naming(  # LLaMA, SmolLM, Qwen, Mistral, Gemma, OLMo; Phi-3 fuses query, key and value, and gate and up
        blocks=("layers.*",),
        roles={
            "query": ("self_attn.q_proj", "self_attn.qkv_proj"),
            "key": ("self_attn.k_proj", "self_attn.qkv_proj"),
            "value": ("self_attn.v_proj", "self_attn.qkv_proj"),
            "attention_output": ("self_attn.o_proj",),
            "mlp_up": ("mlp.up_proj", "mlp.gate_up_proj"),
            "mlp_gate": ("mlp.gate_proj", "mlp.gate_up_proj"),
            "mlp_down": ("mlp.down_proj",),
            "norm": (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
        },
    ),
)
