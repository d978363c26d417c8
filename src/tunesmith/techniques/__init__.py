"""How a model is adapted: one file per technique, its fields are its recipe keys.

A technique decides what learns: after `apply`, `requires_grad` says what learns and what is saved. It asks the anatomy
where things are, never a model's class name, and knows neither tasks nor the loop.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

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

OWN_TYPE = "TUNESMITH_"
"""How the `peft_type` of an adapter begins that PEFT cannot load."""

MEASURED_WIDTH = 384
"""The hidden size of the model that default learning rates were measured on."""

HEAD_FACTOR = 10.0
"""How much faster a new head learns than pretrained weights at the rate they bear, which leaves it behind on few
examples: measured in docs/techniques/full.md and freeze.md."""


class Technique(Plugin):
    """The contract. Parameters that `anatomy.learns_always` names (a new head) learn under every technique."""

    artefact: ClassVar[Literal["adapter", "model"]] = "model"
    """What a run leaves: `adapter/` in PEFT's layout, or a whole `model/`."""

    starts_as_base: ClassVar[bool] = True
    """Whether the model answers as before right after `apply`."""

    cannot_merge: ClassVar[str] = ""
    """Why what was learned cannot be folded into plain modules; empty where it can."""

    def over_original(self) -> Self:
        """The technique as it is merged: over the stored weights, where it has kept others in memory."""
        return self

    def quantization(self, anatomy: Anatomy) -> dict[str, Any]:
        """The fields of transformers' `BitsAndBytesConfig` that load the base as it is kept, if not as stored."""
        return {}

    @property
    def virtual_tokens(self) -> int:
        """How many of the positions that the model has are taken from the text."""
        return 0

    @abstractmethod
    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Change `model` in place so that `requires_grad` is exactly what learns. Parameters keep their names.

        Raises:
            RecipeError: the technique cannot serve this model; says the mathematical reason and the way out.
        """

    @contextmanager
    def absent(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model answers without what does not start as the base: what it scores there is the base's."""
        yield

    def merge(self, model: nn.Module) -> None:
        """Fold what was learned into plain modules, in place, in fp32.

        Raises:
            RecipeError: that cannot be; says why.
        """
        if self.cannot_merge:
            hint = f"keep base and adapter apart; technique={{name: {self.name}, continue: true}} trains it on"
            raise RecipeError(f"{self.name} cannot be merged: {self.cannot_merge}", hint=hint)

    @abstractmethod
    def learning_rate(self, anatomy: Anatomy) -> float:
        """The default learning rate for this model, where it comes from is on the technique's card."""

    def head_learning_rate(self, learning_rate: float) -> float:
        """The default rate of a new head, where all else learns at `learning_rate`."""
        return learning_rate

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
        tied = dict(model.named_parameters(remove_duplicate=False)).keys() - own.keys()
        learns = [name for name, parameter in own.items() if parameter.requires_grad]
        if missing := [name for name in learns if name not in state]:
            raise CheckpointError(
                f"the adapter lacks {len(missing)} of the {len(learns)} parameters it must hold, first '{missing[0]}'",
                hint="it was saved without its head, by another technique or from another model",
            )
        for name, tensor in state.items():
            if name in tied:  # the base has it under its first name
                continue
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


def rate_by_width(rate: float, anatomy: Anatomy, power: float = 1.0) -> float:
    """A rate measured at `MEASURED_WIDTH`, for this model: Adam's best rate falls as 1 / width^power.

    By muP (Yang 2022) a map of `width` inputs wants power 1, and what is added to states or multiplies them 0. Of a
    pair, down from the width and up from a few, the one wants 1 and the other 0; together they were best at 1/2
    (measured at 384 and 2,048, bench/results/2026-11-25-cpu-width.md).
    """
    return float(rate * (MEASURED_WIDTH / anatomy.hidden_size) ** power)


def rate_by_depth(decay: float, name: str, anatomy: Anatomy) -> float:
    """The factor decay ** (n + 1 - depth) of ULMFiT (Howard 2018) and ELECTRA (Clark 2020); 1 for a head."""
    return 1.0 if name in anatomy.learns_always else decay ** (len(anatomy.blocks) + 1 - anatomy.depth_of(name))


def saved_whole(anatomy: Anatomy) -> list[str]:
    """The modules that learn whole: PEFT's `modules_to_save`; rows of added tokens have a place of their own.

    Raises:
        RecipeError: what learns is a parameter that no small module holds, so PEFT's format has no place for it.
    """
    modules = dict.fromkeys(anatomy.head)
    for name in sorted(anatomy.learns_always - anatomy.added):
        owner = name.rpartition(".")[0]
        if not owner or any(f"{block}.".startswith(f"{owner}.") for block in anatomy.blocks):
            raise RecipeError(
                f"'{name}' is not in the checkpoint and must learn whole, which an adapter cannot hold",
                where="technique",
                hint="use technique=full, or a checkpoint that has it",
            )
        if not any(f"{owner}.".startswith(f"{module}.") for module in modules):
            modules[owner] = None
    return list(modules)


def suffixes(model: nn.Module, adapted: Collection[str], whole: Collection[str]) -> list[str]:
    """The shortest endings that name the adapted modules and no other one outside `whole`."""
    others = [
        f".{path}"
        for path, _ in model.named_modules()
        if path not in adapted and not any(f"{path}.".startswith(f"{module}.") for module in [*adapted, *whole])
    ]
    return sorted({_shortest(path.split("."), others) for path in adapted})


def _shortest(steps: list[str], others: list[str]) -> str:
    endings = (".".join(steps[start:]) for start in range(len(steps) - 1, 0, -1))
    return next((end for end in endings if not any(other.endswith(f".{end}") for other in others)), ".".join(steps))


def plain_linear(weight: Tensor, bias: Tensor | None, *, transposed: bool) -> nn.Module:
    """A frozen linear map with nothing around it; `transposed` is GPT-2's `Conv1D`, whose weight is (in, out)."""
    rows, columns = weight.shape
    with torch.device("meta"):  # no memory for weights that are replaced at once
        plain: Any = Conv1D(columns, rows) if transposed else nn.Linear(columns, rows, bias=bias is not None)
    plain.weight = nn.Parameter(weight.detach(), requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return plain  # type: ignore[no-any-return]


def read_config(folder: Path, peft_type: str) -> dict[str, Any]:
    """`adapter_config.json` of a PEFT adapter of one kind.

    Raises:
        CheckpointError: it cannot be read.
        RecipeError: it is of another kind.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "give a PEFT adapter's folder"
        raise CheckpointError(f"cannot be read ({error})", where=str(path), hint=hint) from error
    if not isinstance(config, dict) or config.get("peft_type") != peft_type:
        what = f"is not the config of a {peft_type} adapter"
        raise RecipeError(what, where=str(path), hint=f"peft_type must be {peft_type}")
    return config


def prompt_learning_tensors(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """What PEFT saves of a prompt or a prefix: the vectors, and under other names than elsewhere what learns whole."""
    learned = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    whole = {name: value for name, value in learned.items() if not _of_prompt(name)}
    return {"prompt_embeddings": rows} | {f"base_model.{name}": value for name, value in whole.items()}


def load_prompt_learning(
    model: nn.Module, tensors: dict[str, Tensor], load: Callable[[nn.Module, dict[str, Tensor]], None]
) -> Tensor:
    """Put what learns whole in place by `load`, and hand back the vectors.

    Raises:
        CheckpointError: the vectors are missing.
    """
    if "prompt_embeddings" not in tensors:
        raise CheckpointError("the adapter lacks its prompt_embeddings", hint="it was saved by another technique")
    own = {name: p for name, p in model.named_parameters() if p.requires_grad and _of_prompt(name)}
    whole = {name.removeprefix("base_model."): value for name, value in tensors.items() if name != "prompt_embeddings"}
    load(model, {PEFT_PREFIX + name: value for name, value in (own | whole).items()})
    return tensors["prompt_embeddings"]


def virtual_tokens_of(folder: Path, peft_type: str) -> dict[str, int]:
    """Our key of a PEFT prompt or prefix: how many virtual tokens it has is all that its answers go by."""
    return {"num_virtual_tokens": read_config(folder, peft_type)["num_virtual_tokens"]}


def stacks_for_peft(model: nn.Module) -> int:
    """How many stacks PEFT counts virtual tokens for: two in what it calls a sequence-to-sequence task."""
    return 2 if peft_task_type(model) == "SEQ_2_SEQ_LM" else 1


def by_name(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    """A forward pass's arguments under their names, for a hook that changes some."""
    return dict(zip(signature(module.forward).parameters, args, strict=False)) | given


def _of_prompt(name: str) -> bool:
    """Whether a parameter is of a prompt or a prefix: it has no name of its own in PEFT's format."""
    return not {"prompt", "prefix"}.isdisjoint(name.split("."))


def peft_task_type(model: nn.Module) -> str | None:
    """What PEFT calls the task of this model's class; None where it has no name for it."""
    kind = type(model).__name__
    return next((task for task, classes in PEFT_TASK_TYPES.items() if kind in classes.values()), None)
