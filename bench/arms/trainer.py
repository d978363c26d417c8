"""transformers' Trainer and PEFT, at defaults or best practice, for all tasks except instruction tuning."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)

from bench import peer_classification, peer_entities, peer_translation
from bench.peer import TrainingTime, best_practice, work
from bench.peer_techniques import adapt
from bench.splits import read_rows, read_sentences

LIBRARIES = ("transformers", "torch", "peft", "accelerate")
Encoded = list[dict[str, Any]]
logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def go(job: dict[str, Any]) -> dict[str, Any]:
    """Train once from the pretrained weights; `best`: use best practice, `pad_to`: pad every row to this length."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows, classes = encoded(job["task"], job["model"], job["data"], job["max_length"])
    model = _model(job, classes)
    padding = {"padding": "max_length", "max_length": job["pad_to"]} if job.get("pad_to") else {}
    to_text = job["task"] == "translation"
    settings: type[TrainingArguments] = Seq2SeqTrainingArguments if to_text else TrainingArguments
    timer = TrainingTime()
    with tempfile.TemporaryDirectory() as output:
        trainer = (Seq2SeqTrainer if to_text else Trainer)(
            model=model,
            args=settings(output_dir=output, **how(job)),
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=_collator(job["task"], tokenizer, model, padding),
            callbacks=[timer],
        )
        return measured(trainer, timer, rows, job)


def how(job: dict[str, Any]) -> dict[str, Any]:
    """Return the training arguments: the shared ones and, with `best`, those of best practice (`compiled` or not)."""
    asked = {key: job[key] for key in ("epochs", "batch_size", "learning_rate", "device")}
    compiled = {"torch_compile": bool(job.get("compiled"))}
    return work(**asked, seed=0) | (best_practice(job["precision"]) | compiled if job["best"] else {})


def measured(trainer: Any, timer: TrainingTime, rows: Encoded, job: dict[str, Any]) -> dict[str, Any]:
    """Train and return the measurements. Token counts exclude padding and virtual tokens."""
    trainer.remove_callback(PrinterCallback)
    done = trainer.train()
    both = ("input_ids", "labels") if job["task"] == "translation" else ("input_ids",)
    return {
        "seconds": timer.clock.seconds,
        "cpu_seconds": timer.clock.cpu_seconds,
        "peak_bytes": timer.clock.peak_bytes,
        "samples": len(rows) * job["epochs"],
        "tokens": sum(len(row[name]) for row in rows for name in both) * job["epochs"],
        "learned": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "loss": done.training_loss,
    }


@lru_cache(maxsize=1)
def encoded(task: str, model: str, data: str, max_length: int) -> tuple[Encoded, list[str]]:
    """Return the rows as token ids and labels, and the class names; cached for all runs of a process."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if task == "text-classification":
        rows = read_rows(Path(data))
        classes = sorted({label for _, label in rows})
        return peer_classification.encode(rows, tokenizer, classes, max_length), classes
    if task == "token-classification":
        sentences = read_sentences(Path(data))
        tags = sorted({tag for sentence in sentences for _, tag in sentence})
        return peer_entities.encode(sentences, tokenizer, tags, max_length), tags
    return peer_translation.encode(Path(data), "train", tokenizer, max_length)[0], []


def _model(job: dict[str, Any], classes: list[str]) -> Any:
    named = {key: value for key, value in job["technique"].items() if key != "name"}
    folder, technique = job["model"], job["technique"]["name"]
    if job["task"] == "text-classification":
        return peer_classification.build_model(folder, classes, technique, **named)
    if job["task"] == "token-classification":
        return peer_entities.build_model(folder, classes, technique, **named)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    return adapt(model, technique, "SEQ_2_SEQ_LM", **named)


def _collator(task: str, tokenizer: Any, model: Any, padding: dict[str, Any]) -> Any:
    if task == "translation":
        return DataCollatorForSeq2Seq(tokenizer, model=model, **padding)
    kinds = {
        "text-classification": DataCollatorWithPadding,
        "token-classification": DataCollatorForTokenClassification,
    }
    return kinds[task](tokenizer, **padding)
