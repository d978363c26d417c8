"""tunesmith: fine-tune any pretrained model on your own data.

import tunesmith
result = tunesmith.train("recipe.yaml")
tunesmith.load(result["run"]).predict(["A lovely film."])
"""

import os
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported; set it to 0 to allow it

__all__ = ["Recipe", "Step", "Task", "Technique", "evaluate", "load", "predict", "train"]

_HOMES = {
    "Recipe": "tunesmith.recipe",
    "Step": "tunesmith.training.loop",
    "Task": "tunesmith.tasks",
    "Technique": "tunesmith.techniques",
    "evaluate": "tunesmith.studies.score",
    "load": "tunesmith.deploy.several",
    "predict": "tunesmith.deploy.predict",
    "train": "tunesmith.studies.stages",
}


def __getattr__(name: str) -> Any:
    """Public names are found on first use, so that `import tunesmith` costs nothing."""
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("tunesmith")
    if name not in _HOMES:
        raise AttributeError(f"module 'tunesmith' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
