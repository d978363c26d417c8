"""Facts about the machine for users and bug reports: device, memory, library versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tunesmith.models.sources import cache_home
from tunesmith.storage.files import free_bytes
from tunesmith.training import machine

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
