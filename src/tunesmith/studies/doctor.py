"""Facts about the machine for users and bug reports: device, memory, library versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import transformers

from tunesmith.kernels.accelerate import accelerate
from tunesmith.models import sources
from tunesmith.models.anatomy import anatomy
from tunesmith.models.sources import cache_home
from tunesmith.storage.files import free_bytes
from tunesmith.training import machine

MAX_LENGTH = 512
"""As `data.max_length`."""

LIBRARIES = (
    "tunesmith",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "pydantic",
    "pyarrow",
    "scikit-learn",
    "peft",
)


def fast_paths(spec: str, *, offline: bool = False, allow_pickle: bool = False) -> dict[str, Any]:
    """Return `FastPath.dump` of a model's architecture on this machine, with random weights, all trainable."""
    source, target = sources.resolve(spec, offline=offline, allow_pickle=allow_pickle), machine.find()
    config = transformers.AutoConfig.from_pretrained(source.folder)
    model = _model_of(config).eval()
    parts = anatomy(model)
    limit = min(getattr(config, "max_position_embeddings", None) or MAX_LENGTH, MAX_LENGTH)
    model.to(target.device)
    path = accelerate(
        model,
        parts,
        device=target.device,
        autocast_dtype=target.autocast_dtype,
        max_tokens=limit - 2,  # some families start to count positions behind the padding token
        world_size=1,
    )
    return path.dump()


def _model_of(config: Any) -> Any:
    """Return a model of random weights, with the head that its checkpoint names."""
    for name in config.architectures or ():
        if (known := getattr(transformers, name, None)) is not None:
            return known._from_config(config)
    return transformers.AutoModel.from_config(config)


def examine() -> dict[str, Any]:
    """Return name -> value."""
    about = machine.describe(machine.find())
    report: dict[str, Any] = {
        "device": f"{about['device']} ({about['name']})",
        "precision": f"{about['precision']} (with train.precision=auto)",
        "memory": f"{about['memory_bytes'] / 2**30:.1f} GiB",
        "processors": f"{about['cpus']}, {about['threads']} threads in use",
        "platform": f"{about['platform']}, Python {platform.python_version()}",
        "cache": f"{cache_home()} ({free_bytes(cache_home()) / 2**30:.1f} GiB free; set TUNESMITH_HOME to move it)",
    }
    for name in LIBRARIES:
        try:
            report[name] = version(name)
        except PackageNotFoundError:
            report[name] = "not installed"
    return report
