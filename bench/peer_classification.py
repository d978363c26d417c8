"""Run the peer once on text classification: transformers' Trainer and PEFT at best practice (`peer.py`).

    python -m bench.peer_classification --model FOLDER --data sst2 --data-root build/splits --technique lora \\
        --learning-rate 2e-3 --epochs 3 --seed 0 --test

Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    logging,
    set_seed,
)

from bench.peer import arguments, measure
from bench.peer_techniques import adapt
from bench.splits import Rows, read_rows


def build_model(folder: str, classes: list[str], technique: str, **changed: Any) -> Any:
    """Return the pretrained model with a new head and the technique applied."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
        dtype=torch.float32,
    )
    return adapt(model, technique, "SEQ_CLS", **changed)


def encode(rows: Rows, tokenizer: Any, classes: list[str], max_length: int) -> list[dict[str, Any]]:
    """Return the unpadded token ids and the label of each row."""
    codes = {name: index for index, name in enumerate(classes)}
    coded = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length)
    return [
        {**{field: coded[field][index] for field in coded}, "labels": codes[label]}
        for index, (_, label) in enumerate(rows)
    ]


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy and macro F1."""
    said = np.argmax(prediction.predictions, axis=-1)
    labels = prediction.label_ids
    return {"accuracy": accuracy_score(labels, said), "f1_macro": f1_score(labels, said, average="macro")}


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Read the rows, build the model, train and evaluate."""
    set_seed(given.seed)
    folder = Path(given.data_root) / given.data
    rows = {split: read_rows(folder / f"{split}.csv") for split in ("train", "validation", "test")}
    classes = sorted({label for _, label in rows["train"]})
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = build_model(given.model, classes, given.technique)
    encoded = {split: encode(rows[split], tokenizer, classes, given.max_length) for split in rows}
    return measure(given, model, encoded, DataCollatorWithPadding(tokenizer), scores, "accuracy")


if __name__ == "__main__":
    logging.set_verbosity_error()
    print(json.dumps(run(arguments(__doc__))))
