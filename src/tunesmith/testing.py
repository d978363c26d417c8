"""What a third party needs to test its own task or technique: tiny random models of every family.

`tiny_model("bert", "AutoModelForSequenceClassification", num_labels=3)` needs no network and no time.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

__all__ = ["FAMILIES", "tiny_model"]

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # at the usual 0.02 a random model answers nearly the same to everything
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {"intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LLAMA = {"intermediate_size": 64, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {"hidden_dim": 64, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "modernbert": {"intermediate_size": 64, "cls_token_id": 1, "sep_token_id": 2, "initializer_cutoff_factor": 5.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "mistral": _LLAMA,
}
"""Family (a config's `model_type`) -> what its tiny config says beside the sizes all share; no dropout."""


def tiny_model(family: str, model_class: str, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model of some 50,000 parameters, in eval mode, the same for the same seed; touches no random state.

    `model_class` is a transformers Auto class by name; `config` overrides what its config says, under the common names
    (`hidden_size`, `num_hidden_layers` ...) or the family's own.
    """
    config_class = transformers.CONFIG_MAPPING[family]
    keys = {config_class.attribute_map.get(key, key): value for key, value in _SIZES.items()}
    keys |= FAMILIES[family] | {config_class.attribute_map.get(key, key): value for key, value in config.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, model_class).from_config(config_class(**keys))
    model.eval()
    return model
