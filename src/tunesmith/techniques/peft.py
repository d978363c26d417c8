"""Any other method that PEFT has, with PEFT's own code (extra `peft`): OFT, LoHa, LoKr, FourierFT, HRA ...

    technique: {name: peft, type: LOHA, config: {r: 8}}

`config` goes to PEFT as it is, its targets are query and value where it names none. What a method does and which paper
it is of stands in PEFT's documentation. Prompts and prefixes are techniques of ours, for a model must be wrapped for
PEFT's; so must it be for methods whose modules share a state (VeRA, VB-LoRA), which PEFT refuses to put in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from tunesmith.errors import CheckpointError, RecipeError, did_you_mean, shorten
from tunesmith.kernels.ops import quantized
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

REFUSALS = (ValueError, TypeError, AttributeError, LookupError, AssertionError, NotImplementedError)
"""What PEFT raises where it cannot."""

NOT_ALONE = {
    "POLY": "each text must name the task that it is of",
    "SHADOW": "it needs a second model beside it",
    "TRAINABLE_TOKENS": "it teaches rows of the embeddings, not modules",
    "XLORA": "it mixes adapters that are trained already",
}
"""What asks for more than a model and its data."""

REMARKS = (
    "Unsupported layer type",  # of norms, where PEFT tunes nothing else
    "Failed to load the CUDA extension",  # of BOFT, which works without it
    "Setting boft_n_butterfly_factor to 1",  # where it is 1 anyway
)


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
            with _without_remarks(config):
                library.inject_adapter_in_model(config, model)
        except REFUSALS as error:
            what = f"PEFT's {self.type.upper()} refuses this {anatomy.family} model: {_said(error)}"
            hint = "change technique.config, or take another type or technique=lora"
            raise RecipeError(what, where="technique.config" if self.config else "technique.type", hint=hint) from error
        theirs = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        learn_only(model, theirs | anatomy.learns_always)

    def _config(self, library: Any, model: nn.Module, anatomy: Anatomy) -> Any:
        kind = self.type.upper()
        made_by = self._made_by(library, kind)
        types = get_type_hints(made_by)
        keys = {name: self._value(name, value, types, kind) for name, value in self.config.items()}
        if "target_modules" in types and "target_modules" not in keys:
            norms = list(anatomy.roles.get("norm", ())) if kind == "LN_TUNING" else []
            keys["target_modules"] = norms or list(anatomy.targets(["query", "value"]))
        try:
            return made_by(**{"task_type": peft_task_type(model)} | keys)
        except REFUSALS as error:
            hint = f"change technique.config, which takes PEFT's fields of {kind}"
            raise RecipeError(f"PEFT refuses it: {_said(error)}", where="technique.config", hint=hint) from error

    def _made_by(self, library: Any, kind: str) -> Any:
        """PEFT's class of configs of that kind, if its modules can be put into a model in place."""
        classes = {str(kind.value): found for kind, found in library.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        tuners = {str(kind.value): found for kind, found in library.mapping.PEFT_TYPE_TO_TUNER_MAPPING.items()}
        tuners = {name: tuner for name, tuner in tuners.items() if hasattr(tuner, "uses_shared_state")}
        in_place = {name for name, tuner in tuners.items() if not tuner.uses_shared_state} - NOT_ALONE.keys()
        if kind in in_place:
            return classes[kind]
        what, hint = f"PEFT has no {self.type}", did_you_mean(kind, in_place)
        if kind in classes:
            shared = "its modules share a state, which PEFT keeps in a wrapper around the model"
            why = NOT_ALONE.get(kind) or (shared if kind in tuners else "it works on a model's inputs")
            what = f"PEFT's {self.type} cannot be put into a model in place: {why}"
            hint = (
                "another type, such as LOHA, or technique=lora" if kind in tuners else "use technique=prompt or prefix"
            )
        raise RecipeError(what, where="technique.type", hint=hint)

    @staticmethod
    def _value(name: str, value: Any, types: dict[str, Any], kind: str) -> Any:
        """The value of a field as PEFT's own types have it."""
        where = f"technique.config.{name}"
        if name not in types:
            raise RecipeError(f"PEFT's {kind} has no such field", where=where, hint=did_you_mean(name, types))
        try:
            return TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            wanted = {one["msg"].removeprefix("Input should be ").partition(",")[0] for one in error.errors()}
            raise RecipeError(f"must be {' or '.join(sorted(wanted))}, not {shorten(value)}", where=where) from None

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
        return rate_by_width(LEARNING_RATE, anatomy, power=0.5)

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


def _said(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


@contextmanager
def _without_remarks(config: Any) -> Iterator[None]:
    """Without PEFT's warnings of what changes nothing."""
    with warnings.catch_warnings():
        for remark in REMARKS if getattr(config, "boft_n_butterfly_factor", 1) == 1 else REMARKS[:-1]:
            warnings.filterwarnings("ignore", message=remark)
        yield


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    kind = _library().tuners.tuners_utils.BaseTunerLayer
    return ((path, module) for path, module in model.named_modules() if isinstance(module, kind))


def _library() -> Any:
    """PEFT, where the extra is installed."""
    try:
        with quantized.quiet_bitsandbytes():
            import peft
    except ImportError as error:
        raise RecipeError("it needs PEFT", where="technique", hint="pip install 'tunesmith[peft]'") from error
    return peft
