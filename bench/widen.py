"""Widen a BERT without changing its function, to study learning rates by hidden size if no wide model is available.

    python -m bench.widen --model FOLDER --width 2048 --blocks 2 --output build/minilm-2048

Each unit is replicated, and its outgoing weights are divided by the number of copies (Net2WiderNet, Chen 2015, arXiv
1511.05641). Noise of 20 % of each weight breaks the symmetry of the copies. The number of attention heads grows, not
the head size, so `width` must be a multiple of the head size. Only the first `blocks` blocks are kept.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

NOISE = 0.2


def copies(weight: Tensor, shape: torch.Size, *, divide: bool) -> Tensor:
    """Return a weight (out, in) or a vector tiled to a larger shape; `divide`: normalize the replicated inputs."""
    if weight.ndim == 1:
        return weight[torch.arange(shape[0]) % len(weight)]
    rows, columns = (torch.arange(size) % old for size, old in zip(shape, weight.shape, strict=True))
    wide = weight[rows][:, columns]
    if divide and shape[1] != weight.shape[1]:
        wide = wide / torch.bincount(columns)[columns] * (1 + NOISE * torch.randn(shape))
    return wide


def widen(model: Any, config: transformers.BertConfig, width: int, blocks: int) -> Any:
    """Return a `BertModel` with the first blocks of `model` at the given width."""
    values = config.to_dict()
    size = config.hidden_size // config.num_attention_heads
    values |= {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": width // size}
    values["intermediate_size"] = width * config.intermediate_size // config.hidden_size
    wide = transformers.BertModel(transformers.BertConfig(**values))
    narrow = model.state_dict()
    for name, value in wide.state_dict().items():
        if value.is_floating_point():
            value.copy_(copies(narrow[name], value.shape, divide="embeddings" not in name))
    return wide


def main() -> None:
    """Write the widened model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a BERT model")
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.manual_seed(0)
    model: Any = transformers.BertModel.from_pretrained(given.model)
    wide = widen(model, model.config, given.width, given.blocks)
    wide.save_pretrained(given.output)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (source := Path(given.model, name)).exists():
            shutil.copy(source, given.output / name)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(given.output)
    words = tokenizer(["a film of great charm"], return_tensors="pt")
    narrow = widen(model, model.config, model.config.hidden_size, given.blocks)
    with torch.no_grad():
        before, after = (one.eval()(**words).last_hidden_state[0, 0] for one in (narrow, wide))
    near = torch.cosine_similarity(before, after[: len(before)], dim=0)
    size = sum(p.numel() for p in wide.parameters())
    print(f"{size:,} parameters; cosine similarity of the first hidden state to the original: {near:.4f}")


if __name__ == "__main__":
    main()
