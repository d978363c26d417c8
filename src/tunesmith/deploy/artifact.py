"""The artifact of a run: an adapter in PEFT's layout with a base snapshot, or a whole transformers folder.

A base snapshot (`base/`) is the config and tokenizer that the adapter needs. A folder is written under a temporary name
and renamed, so that it is complete or absent. Frozen weights are copied from the original files, not from the
low-precision copies used in training; merged weights are summed in fp32.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.deploy import fingerprint
from tunesmith.models import added_tokens
from tunesmith.models import load as models
from tunesmith.models.anatomy import Anatomy
from tunesmith.models.quiet import quiet
from tunesmith.models.sources import Source
from tunesmith.recipe import Recipe
from tunesmith.techniques import OWN_TYPE, PEFT_PREFIX, Technique
from tunesmith.training.task_model import load_task_model

PEFT_ROWS = ".token_adapter.trainable_tokens_delta"
"""Suffix of PEFT's names for trained embedding rows."""


def trained_tensors(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Return trained parameters and buffers added by the technique, by name."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: state[name].detach() for name in names}


def load_trained(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the result of `trained_tensors` into a model, in place."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in state.items():
            tensors[name].copy_(value)


def write_adapter(
    folder: Path, model: nn.Module, anatomy: Anatomy, technique: Technique, source: Source, processor: Any
) -> None:
    """Write `adapter/` and `base/` of a run from its trained model."""
    with _complete(folder / "base") as base:
        model.config.save_pretrained(base)  # type: ignore[union-attr, operator]
        processor.save_pretrained(base)
    config = technique.adapter_config(model, anatomy)
    kept = technique.adapter_tensors(model)
    kept |= _rest_of_modules(model, config.get("modules_to_save") or (), kept)
    config, kept = _with_added_tokens(model, config, kept)
    tensors = {name: value.float().cpu().contiguous() for name, value in kept.items()}
    config |= {"base_model_name_or_path": source.name_for_adapter, "revision": source.revision}
    with _complete(folder / "adapter") as adapter:
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        kind = models.processor_kind(processor)
        record = fingerprint.compute(source, folder / "base", kind) | {"quantization": technique.quantization(anatomy)}
        (adapter / fingerprint.FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _with_added_tokens(
    model: nn.Module, config: dict[str, Any], kept: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Store embedding rows of added tokens under PEFT's names; in PEFT only LoRA supports them, and without a bias."""
    rows = [name for name in kept if name.endswith(f".{added_tokens.ROWS}")]
    if not rows or config["peft_type"].startswith(OWN_TYPE):
        return config, kept
    if config["peft_type"] != "LORA" or added_tokens.has_bias(model):
        return config | {"peft_type": OWN_TYPE + config["peft_type"]}, kept
    paths = [name.removeprefix(PEFT_PREFIX).rpartition(".")[0] for name in rows]
    ids = {path: list(model.get_submodule(path).added_ids) for path in paths}  # type: ignore[arg-type]
    renamed = {name.replace(f".{added_tokens.ROWS}", PEFT_ROWS) if name in rows else name: kept[name] for name in kept}
    return config | {"trainable_token_indices": ids}, renamed


def own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename embedding rows of added tokens from PEFT's names to ours."""
    return {name.replace(PEFT_ROWS, f".{added_tokens.ROWS}"): value for name, value in tensors.items()}


def _rest_of_modules(model: nn.Module, modules: Collection[str], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that PEFT expects of fully saved modules but that are not trained, such as a tied decoder."""
    prefix = PEFT_PREFIX if any(name.startswith(PEFT_PREFIX) for name in kept) else "base_model."
    rest: dict[str, Tensor] = {}
    for module in modules:
        for name, value in model.get_submodule(module).state_dict().items():
            if (key := f"{prefix}{module}.{name}") not in kept:
                rest[key] = value.clone()  # safetensors refuses tensors that share memory
    return rest


def write_model(folder: Path, recipe: Recipe, source: Source, processor: Any, state: Mapping[str, Tensor]) -> None:
    """Write `model/` of a run: the original weights in their stored dtype with the trained ones loaded and merged."""
    task, technique = recipe.task, recipe.technique
    model, anatomy = load_task_model(task, source, processor, recipe.train.seed)
    technique.apply(model, anatomy, processor)
    load_trained(model, state)
    technique.merge(model)
    added_tokens.fold(model)
    save(folder / "model", model, processor, models.unused_parts(source, model, anatomy.unused))


def save(folder: Path, model: nn.Module, processor: Any, unused: Mapping[str, Tensor] | None = None) -> None:
    """Write a plain transformers folder; `unused` checkpoint weights are kept for a later run with another head."""
    with _complete(folder) as target, quiet():
        state = {**model.state_dict(), **unused} if unused else None
        model.save_pretrained(target, state_dict=state)  # type: ignore[operator]
        processor.save_pretrained(target)


@contextmanager
def _complete(folder: Path) -> Iterator[Path]:
    writing = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        yield writing
        shutil.rmtree(folder, ignore_errors=True)
        writing.rename(folder)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
