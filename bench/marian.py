"""Write a small Marian with random weights and its own tokenizer, because no pretrained one is available.

    python -m bench.marian --data DATA/multi30k_en_de --output build/marian-en-de

The tokenizer is a joint BPE of both languages, trained only on `train.en` and `train.de` (or .gz). The model has 7.8
million parameters (0.26 million of them fixed sinusoidal positions), shared embeddings for encoder, decoder and output,
and random weights from a seed.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "</s>", "<unk>")
SIZES: dict[str, Any] = {
    "d_model": 256,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
}


def lines(path: Path) -> Iterator[str]:
    """Yield the stripped lines of a text file, gzip-compressed or not."""
    path = path if path.exists() else path.with_name(f"{path.name}.gz")
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        yield from (line.strip() for line in file)


def build_tokenizer(texts: Iterator[str], size: int) -> PreTrainedTokenizerFast:
    """Train a joint BPE tokenizer with Metaspace pre-tokenization; `</s>` is appended to each text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(vocabulary: int, seed: int) -> MarianMTModel:
    """Return a model with random weights."""
    config = MarianConfig(
        vocab_size=vocabulary,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        forced_eos_token_id=None,
        decoder_start_token_id=0,
        bos_token_id=None,
        dropout=0.1,
        attention_dropout=0.0,
        activation_dropout=0.0,
        scale_embedding=True,
        activation_function="relu",
        **SIZES,
    )
    torch.manual_seed(seed)
    return MarianMTModel(config)


def write(data: Path, output: Path, vocabulary: int = 8000, seed: int = 0) -> None:
    """Write a model and its tokenizer for the pairs in a folder."""
    texts = (line for language in ("en", "de") for line in lines(data / f"train.{language}"))
    tokenizer = build_tokenizer(texts, vocabulary)
    model = build_model(len(tokenizer), seed)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{output}: {size / 1e6:.1f} million parameters, {len(tokenizer):,} tokens")


def main() -> None:
    """Parse the command line and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.en and train.de")
    parser.add_argument("--output", type=Path, default=Path("build/marian-en-de"))
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write(given.data, given.output, given.vocabulary, given.seed)


if __name__ == "__main__":
    main()
