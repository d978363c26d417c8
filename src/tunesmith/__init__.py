"""Fine-tune any pretrained model on your own data.

import tunesmith
result = tunesmith.train("recipe.yaml")
tunesmith.load(result["run"]).predict(["A lovely film."])
"""

import os
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read on import of huggingface_hub; 0 allows it

__all__ = ["Recipe", "Step", "Task", "Technique", "evaluate", "load", "predict", "train"]

_MODULES = {
    "Recipe": "tunesmith.recipe",
    "Step": "tunesmith.training.loop",
    "Task": "tunesmith.tasks",
    "Technique": "tunesmith.techniques",
    "evaluate": "tunesmith.studies.score",
    "load": "tunesmith.deploy.multi_adapter",
    "predict": "tunesmith.deploy.predict",
    "train": "tunesmith.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import tunesmith` is fast."""
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("tunesmith")
    if name not in _MODULES:
        raise AttributeError(f"module 'tunesmith' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
