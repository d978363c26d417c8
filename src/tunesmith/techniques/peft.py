"""Other PEFT methods through the PEFT library (extra `peft`): OFT, LoHa, LoKr, FourierFT, HRA ...

    technique: {name: peft, type: LOHA, config: {r: 8}}

`config` is passed to PEFT; its default targets are query and value. PEFT's documentation describes the methods. Prompts
and prefixes have their own techniques, because PEFT's need a wrapper around the model; so do methods whose modules
share state (VeRA, VB-LoRA), which PEFT cannot inject in place.
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
    modules_to_save,
    peft_task_type,
    rate_by_width,
    set_trainable,
)

LEARNING_RATE = 2e-3
"""LoRA's learning rate; no method has been measured, so tune it."""

PEFT_ERRORS = (ValueError, TypeError, AttributeError, LookupError, AssertionError, NotImplementedError)
"""Exceptions that PEFT raises for unsupported configs or models."""

UNSUPPORTED = {
    "POLY": "each example needs a task id",
    "SHADOW": "it needs a second model",
    "TRAINABLE_TOKENS": "it trains rows of the embeddings, not modules",
    "XLORA": "it mixes adapters that have already been trained",
}
"""Methods that need more than a model and its data -> reason."""

IGNORED_WARNINGS = (
    "Unsupported layer type",  # LN_TUNING, where only norms are adapted
    "Failed to load the CUDA extension",  # BOFT, which works without it
    "Setting boft_n_butterfly_factor to 1",  # already 1
)


class Peft(Technique):
    """Other PEFT methods through the PEFT library: OFT, LoHa, LoKr, FourierFT, HRA ...

    Trains the parameters of the method, and the new head.
    Use it to try a published method; tune the learning rate, for which there is no measured default.
    """

    artifact: ClassVar[Literal["adapter", "model"]] = "adapter"
    starts_as_base: ClassVar[bool] = False
    """False, because it depends on the method."""

    type: str = Field("LOHA", min_length=1, description="PEFT's peft_type, such as LOHA, OFT, FOURIERFT")
    config: dict[str, Any] = Field({}, description="fields of PEFT's config for that type")

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Return one additive and one multiplicative method."""
        return [{"type": "LOHA"}, {"type": "OFT", "config": {"oft_block_size": 8}}]

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Inject PEFT's modules."""
        library = _library()
        whole = modules_to_save(anatomy)
        config = self._config(library, model, anatomy)
        for name in getattr(config, "target_modules", None) or ():
            if any(f".{path}".endswith(f".{name}") for path in whole):
                raise RecipeError(f"{name} is already trained in full", where="technique.config.target_modules")
        try:
            with _ignore_warnings(config):
                library.inject_adapter_in_model(config, model)
        except PEFT_ERRORS as error:
            what = f"PEFT's {self.type.upper()} does not support this {anatomy.family} model: {_message(error)}"
            hint = "change technique.config, or use another type or technique=lora"
            raise RecipeError(what, where="technique.config" if self.config else "technique.type", hint=hint) from error
        injected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        set_trainable(model, injected | anatomy.always_trainable)

    def _config(self, library: Any, model: nn.Module, anatomy: Anatomy) -> Any:
        kind = self.type.upper()
        config_class = self._config_class(library, kind)
        types = get_type_hints(config_class)
        keys = {name: self._value(name, value, types, kind) for name, value in self.config.items()}
        if "target_modules" in types and "target_modules" not in keys:
            norms = list(anatomy.roles.get("norm", ())) if kind == "LN_TUNING" else []
            keys["target_modules"] = norms or list(anatomy.targets(["query", "value"]))
        try:
            return config_class(**{"task_type": peft_task_type(model)} | keys)
        except PEFT_ERRORS as error:
            hint = f"use the fields of PEFT's config for {kind}"
            raise RecipeError(
                f"not a valid PEFT config: {_message(error)}", where="technique.config", hint=hint
            ) from error

    def _config_class(self, library: Any, kind: str) -> Any:
        """Return PEFT's config class for a type whose modules can be injected in place."""
        classes = {str(kind.value): value for kind, value in library.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        tuners = {str(kind.value): value for kind, value in library.mapping.PEFT_TYPE_TO_TUNER_MAPPING.items()}
        tuners = {name: tuner for name, tuner in tuners.items() if hasattr(tuner, "uses_shared_state")}
        in_place = {name for name, tuner in tuners.items() if not tuner.uses_shared_state} - UNSUPPORTED.keys()
        if kind in in_place:
            return classes[kind]
        what, hint = f"PEFT has no {self.type}", did_you_mean(kind, in_place)
        if kind in classes:
            shared = "its modules share state, which PEFT keeps in a wrapper around the model"
            reason = UNSUPPORTED.get(kind) or (shared if kind in tuners else "it changes the inputs of the model")
            what = f"PEFT's {self.type} cannot be injected in place: {reason}"
            hint = (
                "use another type, such as LOHA, or technique=lora"
                if kind in tuners
                else "use technique=prompt or prefix"
            )
        raise RecipeError(what, where="technique.type", hint=hint)

    @staticmethod
    def _value(name: str, value: Any, types: dict[str, Any], kind: str) -> Any:
        """Validate the value of a config field against PEFT's type."""
        where = f"technique.config.{name}"
        if name not in types:
            raise RecipeError(f"PEFT's {kind} has no such field", where=where, hint=did_you_mean(name, types))
        try:
            return TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            expected = {item["msg"].removeprefix("Input should be ").partition(",")[0] for item in error.errors()}
            raise RecipeError(f"must be {' or '.join(sorted(expected))}, not {shorten(value)}", where=where) from None

    def merge(self, model: nn.Module) -> None:
        """Merge PEFT's modules, and replace them with plain ones."""
        for path, layer in list(_layers(model)):
            try:
                layer.merge()
            except (NotImplementedError, AttributeError, ValueError) as error:
                raise RecipeError(
                    f"PEFT cannot merge {self.type} ({error})", hint="use base and adapter separately"
                ) from error
            model.set_submodule(path, layer.get_base_layer())

    def learning_rate(self, anatomy: Anatomy) -> float:
        """Return `LEARNING_RATE`, scaled by the width."""
        return rate_by_width(LEARNING_RATE, anatomy, power=0.5)

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """Return PEFT's own config."""
        own = model.peft_config["default"].to_dict()  # type: ignore[union-attr, operator, index]
        own = {key: sorted(value) if isinstance(value, set) else value for key, value in own.items()}
        kept = {key: getattr(value, "value", value) for key, value in own.items()}
        return kept | {"inference_mode": True, "modules_to_save": modules_to_save(anatomy) or None}

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that PEFT saves, and the other trainable parameters."""
        adapter = _library().get_peft_model_state_dict(model)
        inside = tuple(f"{path}." for path, _ in _layers(model))
        other = {name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(inside)}
        return {PEFT_PREFIX + name: value.detach() for name, value in (adapter | other).items()}

    def load_adapter(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load PEFT's tensors through PEFT, and the others directly."""
        state = {name.removeprefix(PEFT_PREFIX): value for name, value in tensors.items()}
        own = dict(model.named_parameters())
        result = _library().set_peft_model_state_dict(model, {n: v for n, v in state.items() if n not in own})
        other = {n: v for n, v in state.items() if n in own}
        inside = tuple(f"{path}." for path, _ in _layers(model))
        needed = [name for name, p in own.items() if p.requires_grad and not name.startswith(inside)]
        if result.unexpected_keys or any(name not in other for name in needed):
            raise CheckpointError(
                "the adapter does not fit this model", hint="load it with the base model that it was trained on"
            )
        for name, value in other.items():
            own[name].data.copy_(value)


def _message(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


@contextmanager
def _ignore_warnings(config: Any) -> Iterator[None]:
    """Suppress PEFT's warnings that do not apply here."""
    with warnings.catch_warnings():
        for message in (
            IGNORED_WARNINGS if getattr(config, "boft_n_butterfly_factor", 1) == 1 else IGNORED_WARNINGS[:-1]
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    kind = _library().tuners.tuners_utils.BaseTunerLayer
    return ((path, module) for path, module in model.named_modules() if isinstance(module, kind))


def _library() -> Any:
    """Import PEFT.

    Raises:
        RecipeError: the extra `peft` is not installed.
    """
    try:
        with quantized.quiet_bitsandbytes():
            import peft
    except ImportError as error:
        raise RecipeError("PEFT is not installed", where="technique", hint="pip install 'tunesmith[peft]'") from error
    return peft
