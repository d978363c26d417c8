"""How a model is adapted: one file per technique, its fields are its recipe keys.

A technique decides what learns: after `apply`, `requires_grad` says what learns and what is saved. It asks the anatomy
where things are, never a model's class name, and knows neither tasks nor the loop.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.models.anatomy import Anatomy
from tunesmith.registry import Plugin

PEFT_PREFIX = "base_model.model."
PEFT_TASK_TYPES = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
"""What PEFT calls a task -> the model classes that do it."""

MEASURED_WIDTH = 384
"""The hidden size of the model that default learning rates were measured on."""


class Technique(Plugin):
    """The contract. Parameters that `anatomy.learns_always` names (a new head) learn under every technique."""

    artefact: ClassVar[Literal["adapter", "model"]] = "model"
    """What a run leaves: `adapter/` in PEFT's layout, or a whole `model/`."""

    starts_as_base: ClassVar[bool] = True
    """Whether the model answers as before right after `apply`."""

    @abstractmethod
    def apply(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Change `model` in place so that `requires_grad` is exactly what learns. Parameters keep their names.

        Raises:
            RecipeError: the technique cannot serve this model; says the mathematical reason and the way out.
        """

    def merge(self, model: nn.Module) -> None:
        """Fold what was learned into plain modules, in place, in fp32."""

    @abstractmethod
    def learning_rate(self, anatomy: Anatomy) -> float:
        """The default learning rate for this model, where it comes from is on the technique's card."""

    def lr_scale(self, name: str, anatomy: Anatomy) -> float:
        """A factor on the learning rate of one parameter."""
        return 1.0

    def thaw(self, model: nn.Module, anatomy: Anatomy, progress: float) -> None:
        """Toggle `requires_grad` within what `apply` left learning; `progress` is 0..1 of the run."""

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """PEFT's `adapter_config.json`, without the base model's name."""
        raise AssertionError(f"{self.name} leaves a whole model, not an adapter")

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What `adapter_model.safetensors` holds, under PEFT's names."""
        return {PEFT_PREFIX + name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def load_adapter(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """The inverse of `adapter_tensors` on a model that `apply` has prepared.

        Raises:
            CheckpointError: the adapter does not fit this model, or lacks a part of what learns.
        """
        state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        own = dict(model.named_parameters())
        learns = [name for name, parameter in own.items() if parameter.requires_grad]
        if missing := [name for name in learns if name not in state]:
            raise CheckpointError(
                f"the adapter lacks {len(missing)} of the {len(learns)} parameters it must hold, first '{missing[0]}'",
                hint="it was saved without its head, by another technique or from another model",
            )
        for name, tensor in state.items():
            if name not in own or own[name].shape != tensor.shape:
                raise CheckpointError(
                    f"the adapter's '{name}' {tuple(tensor.shape)} has no place in this model",
                    hint="load it over the base model that it was trained on",
                )
            own[name].requires_grad_(True).data.copy_(tensor)


def learn_only(model: nn.Module, names: Collection[str]) -> None:
    """Set `requires_grad` so that exactly the parameters in `names` learn.

    Raises:
        RecipeError: none of the model's parameters is among them.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("nothing would learn in this model", where="technique")


def rate_by_width(rate: float, anatomy: Anatomy) -> float:
    """A rate measured at `MEASURED_WIDTH`, for this model: Adam's best rate falls as 1 / width (Yang 2022, muP)."""
    return rate * MEASURED_WIDTH / anatomy.hidden_size


def rate_by_depth(decay: float, name: str, anatomy: Anatomy) -> float:
    """The factor decay ** (n + 1 - depth) of ULMFiT (Howard 2018) and ELECTRA (Clark 2020); 1 for a head."""
    return 1.0 if name in anatomy.learns_always else decay ** (len(anatomy.blocks) + 1 - anatomy.depth_of(name))


def peft_task_type(model: nn.Module) -> str | None:
    """What PEFT calls the task of this model's class; None where it has no name for it."""
    kind = type(model).__name__
    return next((task for task, classes in PEFT_TASK_TYPES.items() if kind in classes.values()), None)
