"""One run of the peer on named entities: transformers' Trainer (and PEFT for LoRA) at its best practice.

    python bench/peer_entities.py --model FOLDER --data wnut17 --data-root build/splits --technique lora \\
        --learning-rate 2e-3 --epochs 3 --seed 0 --test

As transformers' own example has it: words split by the tokenizer, loss at the first sub-word of each, entity scores by
seqeval, the best epoch by F1 on validation kept; all else as in `peer_classification.py`. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_classification import (
    LIBRARIES,
    TrainingTime,
    arguments,
    device_name,
    peak_memory_bytes,
    training_arguments,
)
from peft import LoraConfig, get_peft_model
from seqeval.metrics import f1_score
from splits import Sentences, read_sentences
from torch import nn
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    logging,
    set_seed,
)

IGNORED = -100


def build_model(folder: str, tags: list[str], technique: str) -> nn.Module:
    """The pretrained model with a new head; what learns is what the technique says."""
    model = AutoModelForTokenClassification.from_pretrained(
        folder,
        num_labels=len(tags),
        id2label=dict(enumerate(tags)),
        label2id={name: index for index, name in enumerate(tags)},
        dtype=torch.float32,
    )
    if technique == "head":
        model.base_model.requires_grad_(False)
    if technique == "lora":
        targets = ["query", "value"]
        config = LoraConfig(task_type="TOKEN_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=targets)
        model = get_peft_model(model, config)
    return model


def encode(sentences: Sentences, tokenizer: Any, tags: list[str], max_length: int) -> list[dict[str, Any]]:
    """Token ids of each sentence, and the tag of each word at its first sub-word."""
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
    """Micro and macro F1 of entities, as the Trainer asks for them."""

    def scores(prediction: EvalPrediction) -> dict[str, float]:
        said = np.argmax(prediction.predictions, axis=-1)
        counted = prediction.label_ids != IGNORED
        sides = [
            [[tags[tag] for tag in row[own]] for row, own in zip(side, counted, strict=True)]
            for side in (prediction.label_ids, said)
        ]
        macro = f1_score(*sides, average="macro", zero_division=0)
        return {"f1": f1_score(*sides, zero_division=0), "f1_macro": macro}

    return scores


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Train, keep the best epoch, score it."""
    set_seed(given.seed)
    folder = Path(given.data_root) / given.data
    sentences = {split: read_sentences(folder / f"{split}.conll") for split in ("train", "validation", "test")}
    tags = sorted({tag for split in sentences.values() for sentence in split for _, tag in sentence})
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = build_model(given.model, tags, given.technique)
    encoded = {split: encode(sentences[split], tokenizer, tags, given.max_length) for split in sentences}
    timer = TrainingTime()
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model=model,
            args=training_arguments(given, output, metric="f1"),
            train_dataset=encoded["train"],
            eval_dataset=encoded["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorForTokenClassification(tokenizer),
            compute_metrics=entity_scores(tags),
            callbacks=[timer],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    dev = trainer.evaluate(encoded["validation"])
    best = trainer.state.best_metric
    assert best is None or abs(dev["eval_f1"] - best) < 0.02, "the best epoch was not put back"
    test = trainer.evaluate(encoded["test"]) if given.test else {}
    answered = {name: sum(tag != IGNORED for row in rows for tag in row["labels"]) for name, rows in encoded.items()}
    return {
        "dev_f1": dev["eval_f1"],
        "dev_f1_macro": dev["eval_f1_macro"],
        "test_f1": test.get("eval_f1"),
        "test_f1_macro": test.get("eval_f1_macro"),
        "words_lost": {name: sum(map(len, sentences[name])) - count for name, count in answered.items()},
        "learning_rate": given.learning_rate,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(timer.seconds, 2),
        "examples_per_second": round(len(encoded["train"]) * given.epochs / timer.seconds, 2),
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in (*LIBRARIES, "seqeval")},
        },
        "device": device_name(trainer.args.device),
    }


if __name__ == "__main__":
    logging.set_verbosity_error()
    print(json.dumps(run(arguments(__doc__))))
