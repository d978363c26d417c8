"""How a model is adapted: one file per technique, its fields are its recipe keys.

A technique decides what learns: after `apply`, `requires_grad` says what learns and what is saved. It asks the anatomy
where things are, never a model's class name, and knows neither tasks nor the loop.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from tunesmith.models.anatomy import Anatomy
from tunesmith.registry import Plugin

PEFT_PREFIX = "base_model.model."


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
        """The inverse of `adapter_tensors` on a model that `apply` has prepared."""
        state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
        assert not unexpected, f"the adapter has tensors this model has no place for: {unexpected[:3]}"
