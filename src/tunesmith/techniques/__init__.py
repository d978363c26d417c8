"""Fine-tuning techniques: one file each; the fields of the class are its recipe keys.

After `apply`, the parameters with `requires_grad` are those that are trained and saved. A technique finds modules
through the anatomy, never by a model's class name, and knows neither tasks nor the training loop.
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
"""PEFT's task type -> transformers' model classes."""

OWN_TYPE = "TUNESMITH_"
"""Prefix of the `peft_type` of adapters that PEFT cannot load."""

MEASURED_WIDTH = 384
"""Hidden size of the model that the default learning rates were measured on."""

HEAD_FACTOR = 10.0
"""Ratio of the learning rates of a new head and of pretrained weights: docs/techniques/full.md and freeze.md."""


class Technique(Plugin):
    """Base class of techniques. Each one trains the parameters in `anatomy.always_trainable` (a new head)."""

    artifact: ClassVar[Literal["adapter", "model"]] = "model"
    """Artifact that a run saves: `adapter/` in PEFT's format, or a whole `model/`."""

    starts_as_base: ClassVar[bool] = True
    """True if `apply` does not change the model's outputs."""

    cannot_merge: ClassVar[str] = ""
    """Reason why the adapter cannot be merged into plain modules; empty if it can."""

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Return the sets of recipe keys that the contract tests try."""
        return [{}]

    def for_merge(self) -> Self:
        """Return the technique to merge with; one with a quantized base is merged into the original weights."""
        return self

    def quantization(self, anatomy: Anatomy) -> dict[str, Any]:
        """Return the fields of transformers' `BitsAndBytesConfig` that load a quantized base; empty otherwise."""
        return {}

    @property
    def virtual_tokens(self) -> int:
        """Number of the model's positions that are not available to the text."""
        return 0

    @abstractmethod
    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Adapt `model` in place and set `requires_grad` of every parameter. Existing parameters keep their names.

        Raises:
            RecipeError: the technique does not support this model; the message has the reason and a fix.
        """

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """Make an untrained model compute the outputs of its base; a technique that starts as the base does nothing."""
        yield

    def merge(self, model: nn.Module) -> None:
        """Merge the adapter into plain modules, in place, in fp32.

        Raises:
            RecipeError: the technique cannot be merged; the message has the reason.
        """
        if self.cannot_merge:
            hint = f"use base and adapter separately; technique={{name: {self.name}, continue: true}} trains it further"
            raise RecipeError(f"{self.name} cannot be merged: {self.cannot_merge}", hint=hint)

    @abstractmethod
    def learning_rate(self, anatomy: Anatomy) -> float:
        """Return the default learning rate for this model; the technique's card has the measurements."""

    def head_learning_rate(self, learning_rate: float) -> float:
        """Return the default learning rate of a new head, given that of the other parameters."""
        return learning_rate

    def lr_scale(self, name: str, anatomy: Anatomy) -> float:
        """Return a factor on the learning rate of one parameter."""
        return 1.0

    def update_trainable(self, model: nn.Module, anatomy: Anatomy, progress: float) -> None:
        """Set `requires_grad` among the parameters that `apply` made trainable; `progress` is 0..1 of the run."""

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """Return PEFT's `adapter_config.json`, without the name of the base model."""
        raise AssertionError(f"{self.name} saves a whole model, not an adapter")

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the content of `adapter_model.safetensors`, under PEFT's names."""
        return {PEFT_PREFIX + name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def load_adapter(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load what `adapter_tensors` returned into a model after `apply`.

        Raises:
            CheckpointError: a tensor is missing or does not fit this model.
        """
        state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        own = dict(model.named_parameters())
        tied = dict(model.named_parameters(remove_duplicate=False)).keys() - own.keys()
        trainable = [name for name, parameter in own.items() if parameter.requires_grad]
        if missing := [name for name in trainable if name not in state]:
            raise CheckpointError(
                f"the adapter lacks {len(missing)} of {len(trainable)} tensors, first '{missing[0]}'",
                hint="it was saved without its head, by another technique or from another model",
            )
        for name, tensor in state.items():
            if name in tied:  # loaded under its first name
                continue
            if name not in own or own[name].shape != tensor.shape:
                raise CheckpointError(
                    f"the adapter's '{name}' {tuple(tensor.shape)} does not fit this model",
                    hint="load it with the base model that it was trained on",
                )
            own[name].requires_grad_(True).data.copy_(tensor)


def set_trainable(model: nn.Module, names: Collection[str]) -> None:
    """Make exactly the parameters in `names` trainable.

    Raises:
        RecipeError: the model has none of them.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("this model would have no trainable parameters", where="technique")


def rate_by_width(rate: float, anatomy: Anatomy, power: float = 1.0) -> float:
    """Scale a learning rate measured at `MEASURED_WIDTH` to this model's hidden size: rate / width^power.

    By muP (Yang 2022), Adam's best rate has power 1 for a linear layer with `width` inputs, and power 0 for vectors
    that are added to hidden states or multiply them. A low-rank pair has one of each; 1/2 was best for both together
    (measured at 384 and 2,048, bench/results/2026-11-25-cpu-width.md).
    """
    return float(rate * (MEASURED_WIDTH / anatomy.hidden_size) ** power)


def rate_by_depth(decay: float, name: str, anatomy: Anatomy) -> float:
    """Return decay ** (n + 1 - depth), as in ULMFiT (Howard 2018) and ELECTRA (Clark 2020); 1 for a head."""
    return 1.0 if name in anatomy.always_trainable else decay ** (len(anatomy.blocks) + 1 - anatomy.depth_of(name))


def modules_to_save(anatomy: Anatomy) -> list[str]:
    """Return the modules that are trained in full, PEFT's `modules_to_save`; rows of added tokens are saved separately.

    Raises:
        RecipeError: a trainable parameter is not in a small module, so PEFT's format cannot hold it.
    """
    modules = dict.fromkeys(anatomy.head)
    for name in sorted(anatomy.always_trainable - anatomy.added):
        owner = name.rpartition(".")[0]
        if not owner or any(f"{block}.".startswith(f"{owner}.") for block in anatomy.blocks):
            raise RecipeError(
                f"'{name}' is not in the checkpoint and must be trained in full, which an adapter cannot hold",
                where="technique",
                hint="use technique=full, or a checkpoint that has it",
            )
        if not any(f"{owner}.".startswith(f"{module}.") for module in modules):
            modules[owner] = None
    return list(modules)


def suffixes(model: nn.Module, adapted: Collection[str], whole: Collection[str]) -> list[str]:
    """Return the shortest path suffixes that match the adapted modules and no other module outside `whole`."""
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
    """Return a frozen plain linear layer; `transposed` gives GPT-2's `Conv1D`, whose weight is (in, out)."""
    rows, columns = weight.shape
    with torch.device("meta"):  # allocates no memory
        plain: Any = Conv1D(columns, rows) if transposed else nn.Linear(columns, rows, bias=bias is not None)
    plain.weight = nn.Parameter(weight.detach(), requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return plain  # type: ignore[no-any-return]


def read_config(folder: Path, peft_type: str) -> dict[str, Any]:
    """Read `adapter_config.json` of a PEFT adapter of one type.

    Raises:
        CheckpointError: it cannot be read.
        RecipeError: it has another `peft_type`.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "give the folder of a PEFT adapter"
        raise CheckpointError(f"cannot be read ({error})", where=str(path), hint=hint) from error
    if not isinstance(config, dict) or config.get("peft_type") != peft_type:
        raise RecipeError("wrong type of adapter", where=str(path), hint=f"peft_type must be {peft_type}")
    return config


def prompt_learning_tensors(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Return the tensors that PEFT saves for a prompt or prefix: its vectors, and the modules trained in full."""
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    whole = {name: value for name, value in trainable.items() if not _is_prompt(name)}
    return {"prompt_embeddings": rows} | {f"base_model.{name}": value for name, value in whole.items()}


def load_prompt_learning(
    model: nn.Module, tensors: dict[str, Tensor], load: Callable[[nn.Module, dict[str, Tensor]], None]
) -> Tensor:
    """Load the modules trained in full with `load`, and return the vectors.

    Raises:
        CheckpointError: the vectors are missing.
    """
    if "prompt_embeddings" not in tensors:
        raise CheckpointError("the adapter lacks its prompt_embeddings", hint="it was saved by another technique")
    own = {name: p for name, p in model.named_parameters() if p.requires_grad and _is_prompt(name)}
    whole = {name.removeprefix("base_model."): value for name, value in tensors.items() if name != "prompt_embeddings"}
    load(model, {PEFT_PREFIX + name: value for name, value in (own | whole).items()})
    return tensors["prompt_embeddings"]


def virtual_tokens_of(folder: Path, peft_type: str) -> dict[str, int]:
    """Return the recipe key that determines the outputs of a PEFT prompt or prefix."""
    return {"num_virtual_tokens": read_config(folder, peft_type)["num_virtual_tokens"]}


def stacks_for_peft(model: nn.Module) -> int:
    """Return PEFT's `num_transformer_submodules`: 2 for its sequence-to-sequence task type, else 1."""
    return 2 if peft_task_type(model) == "SEQ_2_SEQ_LM" else 1


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward call by name, for a hook that changes some."""
    return dict(zip(signature(module.forward).parameters, args, strict=False)) | kwargs


def _is_prompt(name: str) -> bool:
    """Return whether a parameter belongs to a prompt or prefix, which PEFT's format does not name."""
    return not {"prompt", "prefix"}.isdisjoint(name.split("."))


def peft_task_type(model: nn.Module) -> str | None:
    """Return PEFT's task type for this model's class; None if it has none."""
    kind = type(model).__name__
    return next((task for task, classes in PEFT_TASK_TYPES.items() if kind in classes.values()), None)
