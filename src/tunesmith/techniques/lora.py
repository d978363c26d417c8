"""Low-rank adaptation: W' = W + s B A, with W frozen (Hu 2021, arXiv 2106.09685).

A (r, in) is initialized at random and B (out, r) to zero; s = alpha / r, or alpha / sqrt(r) with `rslora`
(Kalajdzievski 2023, arXiv 2312.03732). `dora` also trains a magnitude per row (Liu 2024, arXiv 2402.09353).
`lora_plus_ratio` gives B a higher learning rate than A (Hayou 2024, arXiv 2402.12354). `init: pissa` initializes A and
B to the principal components A0, B0 of W (Meng 2024, arXiv 2404.02948) and trains W' = W + s (B A - B0 A0). The base
weight does not change, so the adapter is saved as a LoRA of rank 2r that PEFT loads over it:
B A - B0 A0 = [B - B0, B0] [A; A - A0], a form without cancellation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import CheckpointError, RecipeError, shorten
from tunesmith.kernels.ops.linear import LinearPart, adapted_weight, linears, lora_linear
from tunesmith.kernels.ops.quantized import Bits, QuantizedLinear, QuantizedWeight
from tunesmith.models.anatomy import LINEAR, Anatomy
from tunesmith.techniques import (
    PEFT_PREFIX,
    Technique,
    modules_to_save,
    peft_task_type,
    plain_linear,
    rate_by_width,
    read_config,
    set_trainable,
    suffixes,
)

LEARNING_RATE = 2e-3
"""Learning rate for two adapted projections per block and alpha = 2r, at hidden size 384 (docs/techniques/lora.md)."""

PISSA_FACTOR = 0.25
"""PiSSA needs a lower learning rate: its factors are larger, and both have gradients from the first step."""

RSLORA_ALPHA = 8.0
"""Default alpha with rslora: at r = 16, s = 2 as without it."""

IGNORED_PEFT_KEYS = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
"""Keys of PEFT's config that do not change the formula, or follow from the model and the tensors."""

INITS_KEEPING_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""PEFT's initializations that do not change the base weight, so that the adapter fits the original base."""


class LoraLinear(nn.Module):
    """Linear layer with a low-rank update; `weight` and `bias` keep their names."""

    pissa_A: Tensor | None
    pissa_B: Tensor | None

    def __init__(
        self,
        linear: nn.Module,
        *,
        r: int,
        scaling: float,
        dropout: float = 0.0,
        dora: bool = False,
        pissa: bool = False,
    ) -> None:
        super().__init__()
        assert isinstance(linear, LINEAR), type(linear)
        self.weight: Tensor | QuantizedWeight = linear.weight
        self.bias = linear.bias
        self.transposed = isinstance(linear, Conv1D)
        self.out_features, self.in_features = linear.weight.shape[:: -1 if self.transposed else 1]
        self.r, self.scaling, self.dropout = r, scaling, dropout
        options = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(self.in_features, r, bias=False, **options)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, **options)
        nn.init.zeros_(self.lora_B.weight)
        self.register_buffer("pissa_A", None)
        self.register_buffer("pissa_B", None)
        if pissa:
            self._init_pissa()
        magnitude = linear.weight.detach().float().norm(dim=0 if self.transposed else 1)
        self.lora_magnitude_vector = nn.Parameter(magnitude) if dora else None
        self.train(linear.training)

    def _init_pissa(self) -> None:
        """Set A0 and B0 so that s B0 A0 is the best rank-r approximation of W; in fp32, before any cast of W."""
        assert not isinstance(self.weight, QuantizedWeight)
        weight = self.weight.detach().float()
        U, S, Vh = torch.linalg.svd(weight.t() if self.transposed else weight, full_matrices=False)
        root = (S[: self.r] / self.scaling).sqrt()
        self.pissa_A, self.pissa_B = root[:, None] * Vh[: self.r], U[:, : self.r] * root
        self.lora_A.weight.data.copy_(self.pissa_A)
        self.lora_B.weight.data.copy_(self.pissa_B)

    def quantize(self, bits: Bits) -> None:
        """Quantize the base weight."""
        assert not isinstance(self.weight, QuantizedWeight)
        weight = self.weight.detach()
        del self.weight
        self.weight = QuantizedWeight(weight.t() if self.transposed else weight, bits)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the equivalent LoRA: of rank r, or 2r with PiSSA."""
        A, B = self.lora_A.weight, self.lora_B.weight
        if self.pissa_A is None or self.pissa_B is None:
            return A, B
        return torch.cat([A, A - self.pissa_A]), torch.cat([B - self.pissa_B, self.pissa_B], dim=1)

    def part(self) -> LinearPart | None:
        """Return the layer as operands of the fused kernel; None with a quantized base, DoRA or dropout."""
        if isinstance(self.weight, QuantizedWeight) or self.lora_magnitude_vector is not None:
            return None
        if self.dropout and self.training:
            return None
        weight = self.weight.t() if self.transposed else self.weight
        return LinearPart(weight, self.bias, *self.factors(), self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer."""  # (..., in) -> (..., out)
        part = self.part()
        if part is not None:
            return linears(x, [part])[0]
        return lora_linear(
            x,
            self.weight,
            self.bias,
            *self.factors(),
            self.scaling,
            transposed=self.transposed,
            dropout=self.dropout if self.training else 0.0,
            magnitude=self.lora_magnitude_vector,
        )

    def merged(self) -> nn.Module:
        """Return an equivalent plain linear layer."""
        weight = adapted_weight(
            self.weight,
            *self.factors(),
            self.scaling,
            transposed=self.transposed,
            magnitude=self.lora_magnitude_vector,
        )
        plain = plain_linear(weight.to(self.weight.dtype), self.bias, transposed=self.transposed)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Return the text in `print(model)`."""
        return f"{self.in_features}, {self.out_features}, r={self.r}, scaling={self.scaling:g}"


class Lora(Technique):
    """LoRA and variants: W' = W + (alpha / r) B A with W frozen (Hu 2021, arXiv 2106.09685).

    Trains r (d_in + d_out) parameters per adapted layer, and the new head. A target inside a fused projection adapts
    the whole projection.
    Use it first: close to full fine-tuning with about 1 % of the trainable parameters, and it can be merged.
    """

    artifact: ClassVar[Literal["adapter", "model"]] = "adapter"

    r: int = Field(8, ge=1, description="rank of the update")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / r; default 2r, with rslora 8")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of A")
    target_modules: list[str] | Literal["all-linear"] = Field(
        ["query", "value"], min_length=1, description="roles, module names, or all-linear"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(r), which suits high ranks")
    dora: bool = Field(False, description="train a magnitude per row as well (DoRA)")
    init: Literal["default", "pissa"] = Field("default", description="pissa: principal components of the weight")
    lora_plus_ratio: float = Field(1.0, ge=1, description="learning rate of B / learning rate of A (LoRA+)")
    bits: Bits | None = Field(None, description="quantize the base's blocks to 4 (QLoRA) or 8 bits (extra `quantize`)")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, keys: Any) -> Any:
        """Accept a single target without a list, and derive the default of alpha from the rank."""
        if not isinstance(keys, dict):
            return keys
        keys = dict(keys)
        if isinstance(target := keys.get("target_modules"), str) and target != "all-linear":
            keys["target_modules"] = [target]
        if keys.get("alpha") is None and isinstance(r := keys.get("r", 8), int):
            keys["alpha"] = RSLORA_ALPHA if keys.get("rslora") else 2.0 * r
        return keys

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Return LoRA, its variants and both quantizations."""
        return [
            {"r": 4},
            {"r": 4, "target_modules": "all-linear", "rslora": True},
            {"r": 2, "dora": True},
            {"r": 4, "init": "pissa"},
            {"r": 4, "lora_plus_ratio": 4.0},
            {"r": 4, "bits": 4},
            {"r": 4, "bits": 8, "target_modules": "all-linear"},
        ]

    @property
    def starts_as_base(self) -> bool:  # type: ignore[override]
        """False with a quantized base, which changes the outputs slightly."""
        return self.bits is None

    def for_merge(self) -> Self:
        """Return the technique over the original weights, without `bits`."""
        return self.model_copy(update={"bits": None})

    @property
    def scaling(self) -> float:
        """Factor s on B A."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Replace every target with a `LoraLinear`."""
        modules_to_save(anatomy)
        targets = anatomy.targets(self.target_modules)
        smallest = min(min(model.get_parameter(f"{path}.weight").shape) for path in targets)
        if self.init == "pissa" and self.r > smallest:
            raise RecipeError(
                f"{self.r} is more than the {smallest} singular values of a target",
                where="technique.r",
                hint=f"pissa takes r from 1 to {smallest} here",
            )
        trainable = set(anatomy.always_trainable)
        for path in targets:
            adapted = LoraLinear(
                model.get_submodule(path),
                r=self.r,
                scaling=self.scaling,
                dropout=self.dropout,
                dora=self.dora,
                pissa=self.init == "pissa",
            )
            model.set_submodule(path, adapted)
            trainable |= {f"{path}.{name}" for name, _ in adapted.named_parameters() if name.startswith("lora_")}
        if self.bits is not None:
            _quantize(model, self._quantized_layers(anatomy), self.bits)
        set_trainable(model, trainable)

    def quantization(self, anatomy: Anatomy) -> dict[str, Any]:
        """Return the config for `bits`; linear layers outside the blocks are not quantized."""
        if self.bits is None:
            return {}
        kinds = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}
        quantized = self._quantized_layers(anatomy)
        skipped = [path for path in anatomy.linears if path not in quantized]
        return kinds.get(self.bits, {"load_in_8bit": True}) | {"llm_int8_skip_modules": skipped}

    def _quantized_layers(self, anatomy: Anatomy) -> set[str]:
        """Return the linear layers of the blocks, and adapted ones outside."""
        return {*anatomy.targets("all-linear"), *anatomy.targets(self.target_modules)}

    def merge(self, model: nn.Module) -> None:
        """Add s B A to each weight, and replace adapted layers with plain ones."""
        for path, adapted in list(_adapted(model)):
            model.set_submodule(path, adapted.merged())
        for path, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                weight = module.weight.dequantized(module.weight.dtype)
                weight = weight.t().contiguous() if module.transposed else weight
                model.set_submodule(path, plain_linear(weight, module.bias, transposed=module.transposed))

    def learning_rate(self, anatomy: Anatomy) -> float:
        """Return `LEARNING_RATE`, scaled by the width and by the number of adapted projections per block."""
        roles_of = Counter(path for paths in anatomy.roles.values() for path in paths)
        adapted = sum(max(1, roles_of[path]) for path in anatomy.targets(self.target_modules))
        per_block = adapted / max(1, len(anatomy.blocks))
        rate = LEARNING_RATE * 2 / max(2.0, per_block) * (PISSA_FACTOR if self.init == "pissa" else 1)
        return rate_by_width(rate, anatomy, power=0.5)

    def lr_scale(self, name: str, anatomy: Anatomy) -> float:
        """Return `lora_plus_ratio` for B (LoRA+), else 1."""
        return self.lora_plus_ratio if name.endswith(".lora_B.weight") else 1.0

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """Return a PEFT `LoraConfig` that matches exactly the adapted modules."""
        rank = self.r * (2 if self.init == "pissa" else 1)
        alpha = self.scaling * (math.sqrt(rank) if self.rslora else rank)
        whole = modules_to_save(anatomy)
        return {
            "peft_type": "LORA",
            "task_type": peft_task_type(model),
            "inference_mode": True,
            "r": rank,
            "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha)) else alpha,
            "lora_dropout": self.dropout,
            "target_modules": suffixes(model, {path for path, _ in _adapted(model)}, whole),
            "modules_to_save": whole or None,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "fan_in_fan_out": any(adapted.transposed for _, adapted in _adapted(model)),
            "bias": "none",
            "init_lora_weights": True,
        }

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the trained tensors; PiSSA's factors as a LoRA of rank 2r."""
        tensors = super().adapter_tensors(model)
        for path, adapted in _adapted(model):
            if adapted.pissa_A is not None:
                A, B = adapted.factors()
                tensors |= {_key(path, "A"): A.detach(), _key(path, "B"): B.detach()}
        return tensors

    def load_adapter(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load saved tensors; with PiSSA, recover A, B, A0 and B0 from the saved rank 2r."""
        tensors = dict(tensors)
        for path, adapted in _adapted(model):
            A, B = tensors.get(_key(path, "A")), tensors.get(_key(path, "B"))
            if adapted.pissa_A is None or adapted.pissa_B is None or A is None or B is None:
                continue
            if (A.shape[0], B.shape[-1]) != (2 * self.r, 2 * self.r):
                raise CheckpointError(
                    f"the adapter's '{path}' has rank {A.shape[0]}; PiSSA of rank {self.r} is saved with {2 * self.r}",
                    hint="load it with Lora.from_adapter",
                )
            A, delta_A = A.chunk(2)
            delta_B, initial_B = B.chunk(2, dim=1)
            adapted.pissa_A.copy_(A - delta_A)
            adapted.pissa_B.copy_(initial_B)
            tensors |= {_key(path, "A"): A, _key(path, "B"): delta_B + initial_B}
        super().load_adapter(model, tensors)

    @classmethod
    def from_adapter(cls, folder: Path) -> Self:
        """Return the technique of a PEFT LoRA adapter.

        Raises:
            CheckpointError: the folder cannot be read.
            RecipeError: the adapter uses a feature that is not implemented; the message has its key.
        """
        config, path = read_config(folder, "LORA"), folder / "adapter_config.json"
        try:
            return cls.model_validate(_fields(config, path))
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise RecipeError(what, where=str(path), hint="give the folder of a PEFT adapter") from error


def _quantize(model: nn.Module, paths: Iterable[str], bits: Bits) -> None:
    """Quantize linear layers in place."""
    for path in paths:
        module: Any = model.get_submodule(path)
        if isinstance(module, LoraLinear):
            module.quantize(bits)
        else:
            model.set_submodule(
                path, QuantizedLinear(module.weight, module.bias, bits, transposed=isinstance(module, Conv1D))
            )


def _adapted(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLinear))


def _key(path: str, factor: str) -> str:
    return f"{PEFT_PREFIX}{path}.lora_{factor}.weight"


def _fields(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the recipe keys for a PEFT `LoraConfig`."""
    config = {key: value for key, value in config.items() if key not in IGNORED_PEFT_KEYS}
    if (init := config.pop("init_lora_weights", True)) not in INITS_KEEPING_BASE:
        raise RecipeError(
            f"init_lora_weights {shorten(init)} changed the base weight, so the adapter does not fit the original base",
            where=str(path),
            hint="save it from PEFT with path_initial_model_for_weight_conversion",
        )
    targets, adapted = config.pop("target_modules", None), _modules_in(path.parent)
    restrictions = [config.pop(key, None) for key in ("exclude_modules", "layers_to_transform", "layers_pattern")]
    if isinstance(targets, list) and not any(restrictions):
        targets = [target for target in targets if any(f".{module}".endswith(f".{target}") for module in adapted)]
    else:
        targets = adapted
    if config.get("bias") == "none":
        del config["bias"]
    key_map = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora", "use_dora": "dora"}
    if unknown := sorted(key for key, value in config.items() if key not in key_map and value):
        raise RecipeError(
            f"{unknown[0]} {shorten(config[unknown[0]])} is not implemented", where=str(path), hint="merge it with PEFT"
        )
    return {"target_modules": targets, **{key_map[key]: value for key, value in config.items() if key in key_map}}


def _modules_in(folder: Path) -> list[str]:
    """Return the modules that the tensors of an adapter belong to."""
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            names = [name.removeprefix(PEFT_PREFIX) for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot be read ({error})", where=str(path), hint="give the folder of a PEFT adapter"
        ) from error
    return sorted(name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight"))
