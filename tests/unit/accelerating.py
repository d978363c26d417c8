"""Fast paths on tiny models, all of them or only those without padding."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.kernels.accelerate import _sparse_embeddings, accelerate
from tunesmith.kernels.fast_path import FastPath
from tunesmith.kernels.unpadded import remove_padding
from tunesmith.models.anatomy import anatomy


def accelerated(model: Any, dtype: torch.dtype | None = None, *, device: str = "cpu", world_size: int = 1) -> FastPath:
    """Apply all fast paths to a model with at most 64 tokens, virtual tokens included."""
    return accelerate(
        model,
        anatomy(model),
        device=torch.device(device),
        autocast_dtype=dtype,
        max_tokens=40,
        world_size=world_size,
    )


def sparse_embeddings(model: Any) -> FastPath:
    """Apply only the sparse embeddings."""
    path = FastPath()
    _sparse_embeddings(model, path, 1)
    path.attach(model)
    return path


def unpadded(model: Any) -> FastPath:
    """Apply only the unpadded blocks, without the check of their outputs."""
    path = FastPath(unpadded=True, padded_attention=model.config._attn_implementation)
    remove_padding(model, [model.get_submodule(name) for name in anatomy(model).blocks], path.edits)
    path.attach(model)
    return path
