"""TRL's SFTTrainer, at defaults or best practice."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import trl  # noqa: F401  # fail at import if it is missing
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from bench.arms.trainer import how, measured
from bench.instructions import ADAPTER, UNCHECKPOINTED, sft_trainer
from bench.peer import TrainingTime

LIBRARIES = ("trl", "transformers", "torch", "peft", "accelerate")


def go(job: dict[str, Any]) -> dict[str, Any]:
    """Train once from the pretrained weights."""
    set_seed(0)
    full, on_gpu = job["technique"]["name"] == "full", job["device"] == "cuda"
    frozen = torch.bfloat16 if on_gpu else torch.float32  # best practice on each device
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32 if full else frozen)
    return trained(job, model, **({} if full else {"peft_config": peft.LoraConfig(**ADAPTER)}))


def trained(job: dict[str, Any], model: Any, **more: Any) -> dict[str, Any]:
    """Train a model on the conversations of a job."""
    rows = [json.loads(line) for line in Path(job["data"]).read_text(encoding="utf-8").splitlines()]
    timer = TrainingTime()
    with tempfile.TemporaryDirectory() as output:
        settings = {"output_dir": output, **how(job), **(UNCHECKPOINTED if job["best"] else {})}
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        trainer = sft_trainer(model, tokenizer, rows, settings, callbacks=[timer], **more)
        return measured(trainer, timer, list(trainer.train_dataset), job)
