"""The model of a task before training: the base with the task's head (seeded) and its added tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from tunesmith.models import added_tokens
from tunesmith.models import load as models
from tunesmith.models.anatomy import Anatomy
from tunesmith.models.sources import Source
from tunesmith.tasks import Task


def load_task_model(
    task: Task, source: Source, processor: Any, seed: int, *, folded: bool = False
) -> tuple[nn.Module, Anatomy]:
    """Load the model and its anatomy; `folded`: the embeddings already contain the added tokens, as in `model/`."""
    return models.load_model(
        source,
        model_class=task.auto_class,
        config=task.head_config(),
        seed=seed,
        pad_token_id=getattr(processor, "pad_token_id", None),
        added=range(0) if folded else added_tokens.ids(processor, task.added_tokens),
    )
