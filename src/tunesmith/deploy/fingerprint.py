"""What an adapter belongs to: the weights, the tokenizer and the chat template of its base, each by its sha256.

`adapter/tunesmith.json` has those of the base as it came and those of `base/`, what the run has dressed it in (other
where the recipe gave a template or added tokens). An adapter over anything else is refused, for it would answer, and
wrongly.
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


def fingerprint(source: Source, dress: Path, kind: models.ProcessorKind) -> dict[str, Any]:
    """The hashes of a base and of what it is dressed in."""
    return {
        "base_sha256": models.base_hash(source),
        "base": {"weights": models.weight_hashes(source), **_of_processor(source, kind)},
        "dress": _of_processor(replace(source, folder=dress), kind),
    }


def read(file: Path) -> dict[str, Any]:
    """What `fingerprint` found when the adapter was written.

    Raises:
        ValueError: the file does not say it.
    """
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(known, dict) or not {"base_sha256", "base", "dress"} <= known.keys():
        raise ValueError("it does not say what the adapter belongs to")
    return known


def check(known: Mapping[str, Any], source: Source, dress: Path, adapter: Path, kind: models.ProcessorKind) -> None:
    """Refuse a base or a dress that is not the one of training.

    Raises:
        CheckpointError: names what differs.
    """
    base, hint = known["base"], "give the base it was trained on"
    if models.base_hash(source) != known["base_sha256"]:
        what = f"the adapter belongs to other weights of {source.spec}"
        raise CheckpointError(
            f"{what}: {_first(base['weights'], models.weight_hashes(source))}", where=str(adapter), hint=hint
        )
    if found := _first(base, _of_processor(source, kind) | {"weights": base["weights"]}):
        raise CheckpointError(f"{source.spec} is not as it was in training: {found}", where=str(adapter), hint=hint)
    if found := _first(known["dress"], _of_processor(replace(source, folder=dress), kind)):
        what = f"what the base is dressed in is not as the run left it: {found}"
        raise CheckpointError(what, where=str(dress), hint="take the folder as it was written")


def _of_processor(source: Source, kind: models.ProcessorKind) -> dict[str, str | None]:
    processor = models.load_processor(source, kind=kind)
    if kind == "image_processor":
        return {"image processor": models.processor_hash(processor)}
    return {"tokenizer": models.tokenizer_hash(processor), "chat template": models.template_hash(processor)}


def _first(known: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What differs first, with the beginnings of both hashes; empty where nothing does."""
    for name in {**known, **found}:
        if (was := known.get(name)) != (now := found.get(name)):
            return f"the {name} differs (sha256 {(now or 'none')[:12]}, was {(was or 'none')[:12]})"
    return ""
