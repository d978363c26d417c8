"""Fingerprint of an adapter's base: sha256 of its weights, tokenizer and chat template.

`adapter/tunesmith.json` has the hashes of the original base and of the base snapshot (`base/`), which differs where the
recipe set a chat template or added tokens. An adapter is refused over any other base: it would load, and give wrong
answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.errors import CheckpointError
from tunesmith.models import load as models
from tunesmith.models.sources import Source

FILE = "tunesmith.json"
SNAPSHOT = "dress"
"""Key of the snapshot's hashes in the file, unchanged since the first version."""


def compute(source: Source, snapshot: Path, kind: models.ProcessorKind) -> dict[str, Any]:
    """Return the hashes of a base and of its snapshot."""
    return {
        "base_sha256": models.base_hash(source),
        "base": {"weights": models.weight_hashes(source), **_of_processor(source, kind)},
        SNAPSHOT: _of_processor(replace(source, folder=snapshot), kind),
    }


def read(file: Path) -> dict[str, Any]:
    """Return the fingerprint in the file of an adapter.

    Raises:
        ValueError: the file has no fingerprint.
    """
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(known, dict) or not {"base_sha256", "base", SNAPSHOT} <= known.keys():
        raise ValueError("it has no fingerprint of a base")
    return known


def check(known: Mapping[str, Any], source: Source, snapshot: Path, adapter: Path, kind: models.ProcessorKind) -> None:
    """Refuse a base or a base snapshot other than in training.

    Raises:
        CheckpointError: with the part that differs.
    """
    base, hint = known["base"], "use the base that the adapter was trained on"
    if models.base_hash(source) != known["base_sha256"]:
        what = f"the adapter was trained on other weights of {source.spec}"
        raise CheckpointError(
            f"{what}: {_first_difference(base['weights'], models.weight_hashes(source))}", where=str(adapter), hint=hint
        )
    if difference := _first_difference(base, _of_processor(source, kind) | {"weights": base["weights"]}):
        raise CheckpointError(f"{source.spec} has changed since training: {difference}", where=str(adapter), hint=hint)
    if difference := _first_difference(known[SNAPSHOT], _of_processor(replace(source, folder=snapshot), kind)):
        what = f"the base snapshot has changed since training: {difference}"
        raise CheckpointError(what, where=str(snapshot), hint="restore the folder as the run wrote it")


def _of_processor(source: Source, kind: models.ProcessorKind) -> dict[str, str | None]:
    processor = models.load_processor(source, kind=kind)
    if kind == "image_processor":
        return {"image processor": models.processor_hash(processor)}
    return {"tokenizer": models.tokenizer_hash(processor), "chat template": models.template_hash(processor)}


def _first_difference(known: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Return the first part that differs, with the start of both hashes; empty if all are equal."""
    for name in {**known, **current}:
        if (was := known.get(name)) != (now := current.get(name)):
            return f"the {name} differs (sha256 {(now or 'none')[:12]}, was {(was or 'none')[:12]})"
    return ""
