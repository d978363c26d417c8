"""Any other method that PEFT has, with PEFT's own code (extra `peft`): OFT, LoHa, LoKr, FourierFT, HRA ...

    technique: {name: peft, type: LOHA, config: {r: 8}}

`config` goes to PEFT as it is, its targets are query and value where it names none. What a method does and which paper
it is of stands in PEFT's documentation. Prompts and prefixes are techniques of ours, for a model must be wrapped for
PEFT's; so must it be for methods whose modules share a state (VeRA, VB-LoRA), which PEFT refuses to put in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from tunesmith.errors import CheckpointError, RecipeError, did_you_mean
from tunesmith.models.anatomy import Anatomy
from tunesmith.techniques import (
    PEFT_PREFIX,
    Technique,
    learn_only,
    peft_task_type,
    rate_by_width,
    saved_whole,
)

LEARNING_RATE = 2e-3
"""LoRA's, for want of a measurement of each method: tune it."""


class Peft(Technique):
    """Any other method of PEFT's, by its own code: OFT, LoHa, LoKr, FourierFT, HRA ...

    Learns what the method says, and what is new (the head).
    Use it to try a method of a paper; tune its rate, for none is measured.
    """

    artefact: ClassVar[Literal["adapter", "model"]] = "adapter"
    starts_as_base: ClassVar[bool] = False
    """Most do; it is theirs to say."""

    type: str = Field("LOHA", min_length=1, description="PEFT's peft_type, e.g. LOHA, OFT, FOURIERFT")
    config: dict[str, Any] = Field({}, description="fields of PEFT's config of that type")

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Let PEFT put its modules in."""
        library = _library()
        whole = saved_whole(anatomy)
        config = self._config(library, model, anatomy)
        for name in getattr(config, "target_modules", None) or ():
            if any(f".{path}".endswith(f".{name}") for path in whole):
                raise RecipeError(f"{name} learns whole anyway", where="technique.config.target_modules")
        try:
            with warnings.catch_warnings():  # of norms, which PEFT calls unsupported where it tunes nothing else
                warnings.filterwarnings("ignore", message="Unsupported layer type")
                library.inject_adapter_in_model(config, model)
        except (ValueError, TypeError, NotImplementedError) as error:
            what = f"PEFT refuses this {anatomy.family} model ({' '.join(str(error).split())})"
            raise RecipeError(what, where="technique", hint="see PEFT's documentation of this method") from error
        theirs = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        learn_only(model, theirs | anatomy.learns_always)

    def _config(self, library: Any, model: nn.Module, anatomy: Anatomy) -> Any:
        known = {str(kind.value): found for kind, found in library.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        tuned = {kind: found for kind, found in known.items() if kind in library.mapping.PEFT_TYPE_TO_TUNER_MAPPING}
        kind = self.type.upper()
        if kind not in tuned or issubclass(tuned[kind], library.PromptLearningConfig):
            hint = "use technique=prompt or prefix" if kind in known else did_you_mean(kind, sorted(tuned))
            raise RecipeError(
                f"PEFT has no {self.type} that adapts a model in place", where="technique.type", hint=hint
            )
        keys = dict(self.config)
        if "target_modules" in tuned[kind].__dataclass_fields__ and "target_modules" not in keys:
            norms = list(anatomy.roles.get("norm", ())) if kind == "LN_TUNING" else []
            keys["target_modules"] = norms or list(anatomy.targets(["query", "value"]))
        try:
            return tuned[kind](**{"task_type": peft_task_type(model)} | keys)
        except (TypeError, ValueError) as error:
            raise RecipeError(str(error), where="technique.config", hint=f"it takes PEFT's fields of {kind}") from error

    def merge(self, model: nn.Module) -> None:
        """Let PEFT fold what it put in, and take its modules out."""
        for path, layer in list(_layers(model)):
            try:
                layer.merge()
            except (NotImplementedError, AttributeError, ValueError) as error:
                raise RecipeError(
                    f"PEFT cannot merge {self.type} ({error})", hint="keep base and adapter apart"
                ) from error
            model.set_submodule(path, layer.get_base_layer())

    def learning_rate(self, anatomy: Anatomy) -> float:
        """`LEARNING_RATE`, falling with the width."""
        return rate_by_width(LEARNING_RATE, anatomy)

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """PEFT's own."""
        own = model.peft_config["default"].to_dict()  # type: ignore[union-attr, operator, index]
        own = {key: sorted(value) if isinstance(value, set) else value for key, value in own.items()}
        kept = {key: getattr(value, "value", value) for key, value in own.items()}
        return kept | {"inference_mode": True, "modules_to_save": saved_whole(anatomy) or None}

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What PEFT saves, and what learns beside it."""
        theirs = _library().get_peft_model_state_dict(model)
        inside = tuple(f"{path}." for path, _ in _layers(model))
        beside = {name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(inside)}
        return {PEFT_PREFIX + name: value.detach() for name, value in (theirs | beside).items()}

    def load_adapter(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Hand PEFT its part, and put the rest in place."""
        state = {name.removeprefix(PEFT_PREFIX): value for name, value in tensors.items()}
        own = dict(model.named_parameters())
        found = _library().set_peft_model_state_dict(model, {n: v for n, v in state.items() if n not in own})
        beside = {n: v for n, v in state.items() if n in own}
        inside = tuple(f"{path}." for path, _ in _layers(model))
        needed = [name for name, p in own.items() if p.requires_grad and not name.startswith(inside)]
        if found.unexpected_keys or any(name not in beside for name in needed):
            raise CheckpointError("the adapter does not fit this model", hint="load it over its own base")
        for name, value in beside.items():
            own[name].data.copy_(value)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    kind = _library().tuners.tuners_utils.BaseTunerLayer
    return ((path, module) for path, module in model.named_modules() if isinstance(module, kind))


def _library() -> Any:
    """PEFT, where the extra is installed."""
    try:
        import peft
    except ImportError as error:
        raise RecipeError("it needs PEFT", where="technique", hint="pip install 'tunesmith[peft]'") from error
    return peft
