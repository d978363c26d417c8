"""One run of the peer on translation: transformers' Seq2SeqTrainer, at its best practice (`peer.py`).

    python -m bench.marian --data DATA/multi30k_en_de --output build/marian-en-de
    python -m bench.peer_translation --model build/marian-en-de --data-root DATA --data multi30k_en_de \\
        --learning-rate 2e-3 --epochs 8 --batch-size 64 --test

The same model, tokenizer, rows and budget as recipes/translate-multi30k.yaml: every parameter learns, label smoothing
0.1, warm-up over a tenth of the steps, the best epoch by loss on validation; beams of 4, scored by sacrebleu. Prints
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sacrebleu import BLEU, CHRF
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    logging,
    set_seed,
)

from bench.marian import lines
from bench.peer import (
    LIBRARIES,
    TrainingTime,
    arguments,
    device_name,
    peak_memory_bytes,
    training_arguments,
    weights_bytes,
)

STEMS = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
MORE = {"label_smoothing_factor": 0.1, "warmup_steps": 0.1, "greater_is_better": False}


def encode(folder: Path, stem: str, tokenizer: Any, max_length: int) -> tuple[Any, list[str]]:
    """Token ids of each pair, and the targets as they are written."""
    sources, targets = (list(lines(folder / f"{stem}.{language}")) for language in ("en", "de"))
    coded = tokenizer(sources, text_target=targets, truncation=True, max_length=max_length)
    return [{name: coded[name][n] for name in ("input_ids", "labels")} for n in range(len(sources))], targets


def translation_scores(trainer: Seq2SeqTrainer, rows: Any, targets: list[str], tokenizer: Any) -> dict[str, Any]:
    """BLEU and chrF of what is written by beam search."""
    said = np.asarray(trainer.predict(rows, num_beams=4, max_new_tokens=128).predictions)
    texts = tokenizer.batch_decode(np.where(said < 0, tokenizer.pad_token_id, said), skip_special_tokens=True)
    bleu = BLEU()
    scores = {"bleu": bleu.corpus_score(texts, [targets]).score, "chrf": CHRF().corpus_score(texts, [targets]).score}
    return scores | {"bleu_signature": str(bleu.get_signature())}


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Read the pairs, train, keep the best epoch, score it."""
    set_seed(given.seed)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(given.model, dtype=torch.float32)
    folder = Path(given.data_root) / given.data
    encoded = {name: encode(folder, stem, tokenizer, given.max_length) for name, stem in STEMS.items()}
    timer = TrainingTime()
    with tempfile.TemporaryDirectory() as output:
        kind = Seq2SeqTrainingArguments
        settings: Any = training_arguments(given, output, "loss", kind, predict_with_generate=False, **MORE)
        trainer = Seq2SeqTrainer(
            model=model,
            args=settings,
            train_dataset=encoded["train"][0],
            eval_dataset=encoded["validation"][0],
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            callbacks=[timer],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(f"{output}/artefact")
        artefact_bytes = weights_bytes(Path(output) / "artefact")
    settings.predict_with_generate = True
    settings.train_sampling_strategy = "random"  # grouped by length, what it writes comes back in another order
    dev = translation_scores(trainer, *encoded["validation"], tokenizer)
    test = translation_scores(trainer, *encoded["test"], tokenizer) if given.test else {}
    return {
        "dev_loss": trainer.state.best_metric,
        **{f"dev_{name}": value for name, value in dev.items()},
        **{f"test_{name}": value for name, value in test.items()},
        "learning_rate": given.learning_rate,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(timer.clock.seconds, 2),
        "examples_per_second": round(len(encoded["train"][0]) * given.epochs / timer.clock.seconds, 2),
        "cpu_seconds": round(time.process_time(), 1),
        "artefact_bytes": artefact_bytes,
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "device": device_name(trainer.args.device),
    }


if __name__ == "__main__":
    logging.set_verbosity_error()
    print(json.dumps(run(arguments(__doc__))))
