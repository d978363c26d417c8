"""Small GGUF files as llama.cpp's converter writes them, from a given model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.testing import tiny_model

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "Ġ the", "Ċ Ċ")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def tokens() -> list[str]:
    """Return the vocabulary: bytes, a few merged pairs, three special tokens."""
    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


def tiny_llama(**config: Any) -> PreTrainedModel:
    """Return a random LLaMA with the vocabulary of `tokens()` and tied embeddings."""
    sizes = {"vocab_size": len(tokens()), "tie_word_embeddings": True, "hidden_size": 32, "intermediate_size": 64}
    return tiny_model("llama", "AutoModelForCausalLM", **sizes | config)


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """Permute query or key as llama.cpp does: interleave the halves of each head."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(
    path: Path, model: PreTrainedModel, *, kind: str = "F32", architecture: str = "llama", pre: str | None = "smollm"
) -> Path:
    """Write a tiny LLaMA with matrices quantized as `kind`."""
    config: Any = model.config
    file = GGUFWriter(path, architecture)
    file.add_name("tiny")
    file.add_license("apache-2.0")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("gpt2")
    if pre is not None:
        file.add_tokenizer_pre(pre)
    file.add_token_list(tokens())
    file.add_token_types([3 if token in SPECIAL else 1 for token in tokens()])
    file.add_token_merges(MERGES)
    for number, add in enumerate((file.add_unk_token_id, file.add_bos_token_id, file.add_eos_token_id)):
        add(number)
    file.add_pad_token_id(2)
    file.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            _add(file, _renamed(name), _turned(name, weight, config), kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def _renamed(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    number, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[rest]}.weight"


def _turned(name: str, weight: Tensor, config: Any) -> Tensor:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return next((_permuted(weight, count) for part, count in heads.items() if part in name), weight)


def _add(file: GGUFWriter, name: str, weight: Tensor, kind: str) -> None:
    numbers = weight.detach().float().numpy()
    wanted = GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
    if wanted == GGMLQuantizationType.F32:
        file.add_tensor(name, np.ascontiguousarray(numbers, dtype=np.float32))
    else:
        file.add_tensor(name, quants.quantize(numbers, wanted), raw_dtype=wanted)


def logits(model: PreTrainedModel) -> Tensor:
    """Return the model's outputs for the first forty tokens."""
    with torch.no_grad():
        answer: Tensor = model.eval()(input_ids=torch.arange(40)[None]).logits
    return answer
