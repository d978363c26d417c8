"""Run the peer once on named-entity recognition: transformers' Trainer and PEFT at best practice (`peer.py`).

    python -m bench.peer_entities --model FOLDER --data wnut17 --data-root build/splits --technique lora \\
        --learning-rate 2e-3 --epochs 3 --seed 0 --test

As in transformers' own example, the loss is computed at the first subword of each word, seqeval computes the entity
scores, and the best epoch is chosen by validation F1. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from seqeval.metrics import f1_score
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    logging,
    set_seed,
)

from bench.peer import arguments, measure
from bench.peer_techniques import adapt
from bench.splits import Sentences, read_sentences

IGNORED = -100


def build_model(folder: str, tags: list[str], technique: str, **changed: Any) -> Any:
    """Return the pretrained model with a new head and the technique applied."""
    model = AutoModelForTokenClassification.from_pretrained(
        folder,
        num_labels=len(tags),
        id2label=dict(enumerate(tags)),
        label2id={name: index for index, name in enumerate(tags)},
        dtype=torch.float32,
    )
    return adapt(model, technique, "TOKEN_CLS", **changed)


def encode(sentences: Sentences, tokenizer: Any, tags: list[str], max_length: int) -> list[dict[str, Any]]:
    """Return the token ids of each sentence, with the tag of each word at its first subword."""
    codes = {name: index for index, name in enumerate(tags)}
    words = [[word for word, _ in sentence] for sentence in sentences]
    coded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    rows = []
    for index, sentence in enumerate(sentences):
        owners = coded.word_ids(index)
        first = [word is not None and word != before for word, before in zip(owners, [None, *owners], strict=False)]
        labels = [codes[sentence[word][1]] if new else IGNORED for word, new in zip(owners, first, strict=True)]
        rows.append({**{field: coded[field][index] for field in coded}, "labels": labels})
    return rows


def entity_scores(tags: list[str]) -> Any:
    """Return a `compute_metrics` function for micro and macro entity F1."""

    def scores(prediction: EvalPrediction) -> dict[str, float]:
        said = np.argmax(prediction.predictions, axis=-1)
        labels = np.asarray(prediction.label_ids)
        sides = [
            [[tags[tag] for tag in row[own]] for row, own in zip(side, labels != IGNORED, strict=True)]
            for side in (labels, said)
        ]
        macro = f1_score(*sides, average="macro", zero_division=0)
        return {"f1": f1_score(*sides, zero_division=0), "f1_macro": macro}

    return scores


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Read the sentences, build the model, train and evaluate."""
    set_seed(given.seed)
    folder = Path(given.data_root) / given.data
    sentences = {split: read_sentences(folder / f"{split}.conll") for split in ("train", "validation", "test")}
    tags = sorted({tag for split in sentences.values() for sentence in split for _, tag in sentence})
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = build_model(given.model, tags, given.technique)
    encoded = {split: encode(sentences[split], tokenizer, tags, given.max_length) for split in sentences}
    answered = {name: sum(tag != IGNORED for row in rows for tag in row["labels"]) for name, rows in encoded.items()}
    lost = {name: sum(map(len, sentences[name])) - count for name, count in answered.items()}
    collator = DataCollatorForTokenClassification(tokenizer)
    return measure(given, model, encoded, collator, entity_scores(tags), "f1") | {"words_lost": lost}


if __name__ == "__main__":
    logging.set_verbosity_error()
    print(json.dumps(run(arguments(__doc__))))
