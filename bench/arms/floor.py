"""Compute floor of a job: its minimum number of multiply-adds, and the machine's current rate. It trains nothing."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch

from bench.arms.ours import keywords
from bench.floor import Model, Row, product_rate
from tunesmith import recipe as recipes
from tunesmith.console import Console
from tunesmith.data.batches import collate
from tunesmith.run.prepare import Prepared, prepare
from tunesmith.training import machine
from tunesmith.training.task_model import load_task_model

LIBRARIES = ("torch",)


def go(job: dict[str, Any]) -> dict[str, Any]:
    """Return the multiply-adds (counted once per job) and the rate (measured on every call)."""
    found = machine.find(job["device"], job["precision"])
    count = _counted(json.dumps(job))
    return {"multiply_adds": count, "rate": product_rate(found.device, found.autocast_dtype or torch.float32)}


@lru_cache
def _counted(job: str) -> int:
    given = json.loads(job)
    recipe = recipes.load(None, (), keywords(given, "build/never-written"))
    quiet = Console(level=-1, to_stderr=True)
    prepared = prepare(recipe, machine.find("cpu", "fp32"), offline=True, allow_pickle=False, console=quiet)
    model, anatomy = load_task_model(prepared.task, prepared.base.source, prepared.base.processor, 0)
    prepared.technique.apply(model, anatomy, prepared.base.processor)
    return Model(model, anatomy, prepared.technique.virtual_tokens).multiply_adds(_rows(prepared), given["epochs"])


def _rows(prepared: Prepared) -> list[Row]:
    """Return the lengths of the encoded examples."""
    encoded, config = prepared.encoded["train"], cast(Any, prepared.model.config)
    baseline = prepared.bound.baseline(encoded)
    rows = []
    for index in range(len(encoded)):
        batch = collate(encoded, np.array([index]))
        written = int(batch.ragged("label").lengths[0]) if config.is_encoder_decoder else 0
        read = int(batch.ragged("input_ids").lengths[0])
        rows.append(Row(read, written, len(baseline(batch))))
    return rows
