"""Low-rank adaptation: the weight stays, W' = W + s B A learns beside it (Hu 2021, arXiv 2106.09685).

A (r, in) starts random and B (out, r) at zero, s = alpha / r, or alpha / sqrt(r) with `rslora` (Kalajdzievski 2023,
arXiv 2312.03732). `dora` learns the length of each row as well (Liu 2024, arXiv 2402.09353). `lora_plus_ratio` lets B
learn faster than A (Hayou 2024, arXiv 2402.12354). `init: pissa` starts A and B as the principal part A0, B0 of W
(Meng 2024, arXiv 2404.02948) and learns W' = W + s (B A - B0 A0). The base is never touched, so what is saved is a LoRA
of rank 2r that PEFT loads over it: B A - B0 A0 = [B - B0, B0] [A; A - A0], a form in which nothing cancels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
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
    learn_only,
    peft_task_type,
    plain_linear,
    rate_by_width,
    read_config,
    saved_whole,
    suffixes,
)

LEARNING_RATE = 2e-3
"""With two projections adapted in each block, alpha = 2r; measured on a model 384 wide (docs/techniques/lora.md)."""

PISSA_FACTOR = 0.25
"""PiSSA's factors are longer than LoRA's and both learn from the first step, so it bears a lower rate."""

RSLORA_ALPHA = 8.0
"""Default alpha with rslora: s = 2, as without it, at r = 16."""

NOT_OURS_TO_READ = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
"""Keys of PEFT's config that say nothing about the formula: found from the model and the tensors, or unused."""

HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""PEFT's ways to start that leave the base weight as it is, so that the adapter fits the untouched base."""


class LoraLinear(nn.Module):
    """A linear map with a low-rank addition, under the names it had: `weight` and `bias` stay where they were."""

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
        where = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(self.in_features, r, bias=False, **where)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, **where)
        nn.init.zeros_(self.lora_B.weight)
        self.register_buffer("pissa_A", None)
        self.register_buffer("pissa_B", None)
        if pissa:
            self._start_from_principal_part()
        start = linear.weight.detach().float().norm(dim=0 if self.transposed else 1)
        self.lora_magnitude_vector = nn.Parameter(start) if dora else None
        self.train(linear.training)

    def _start_from_principal_part(self) -> None:
        """A0 and B0, so that s B0 A0 is W's best approximation of rank r; in fp32, hence before any cast of W."""
        assert not isinstance(self.weight, QuantizedWeight)
        weight = self.weight.detach().float()
        U, S, Vh = torch.linalg.svd(weight.t() if self.transposed else weight, full_matrices=False)
        root = (S[: self.r] / self.scaling).sqrt()
        self.pissa_A, self.pissa_B = root[:, None] * Vh[: self.r], U[:, : self.r] * root
        self.lora_A.weight.data.copy_(self.pissa_A)
        self.lora_B.weight.data.copy_(self.pissa_B)

    def pack(self, bits: Bits) -> None:
        """Keep the weight in a few bits from here on."""
        assert not isinstance(self.weight, QuantizedWeight)
        weight = self.weight.detach()
        del self.weight
        self.weight = QuantizedWeight(weight.t() if self.transposed else weight, bits)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the ordinary LoRA that this is: of rank r, or 2r with PiSSA."""
        A, B = self.lora_A.weight, self.lora_B.weight
        if self.pissa_A is None or self.pissa_B is None:
            return A, B
        return torch.cat([A, A - self.pissa_A]), torch.cat([B - self.pissa_B, self.pissa_B], dim=1)

    def part(self) -> LinearPart | None:
        """This map, where it is no more than a product and a low-rank one."""
        if isinstance(self.weight, QuantizedWeight) or self.lora_magnitude_vector is not None:
            return None
        if self.dropout and self.training:
            return None
        weight = self.weight.t() if self.transposed else self.weight
        return LinearPart(weight, self.bias, *self.factors(), self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
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
        """The plain module that answers the same."""
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
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, r={self.r}, scaling={self.scaling:g}"


class Lora(Technique):
    """LoRA and its kin: W' = W + (alpha / r) B A, all else frozen (Hu 2021, arXiv 2106.09685).

    Learns r (d_in + d_out) parameters a projection, and what is new (the head). A role inside a fused projection adapts
    the whole projection.
    Use it first: near full fine-tuning with a hundredth of what learns and is stored, and it can be merged.
    """

    artefact: ClassVar[Literal["adapter", "model"]] = "adapter"

    r: int = Field(8, ge=1, description="rank of the addition")
    alpha: float = Field(16.0, gt=0, description="scale of the addition: alpha / r; default 2r, with rslora 8")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the way into A")
    target_modules: list[str] | Literal["all-linear"] = Field(
        ["query", "value"], min_length=1, description="roles, module names, or all-linear"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(r), so that high ranks learn as fast")
    dora: bool = Field(False, description="learn the length of each row of the weight as well")
    init: Literal["default", "pissa"] = Field("default", description="pissa: start from the weight's principal part")
    lora_plus_ratio: float = Field(1.0, ge=1, description="B learns this many times faster than A")
    bits: Bits | None = Field(None, description="keep the base's blocks in 4 (QLoRA) or 8 bits (extra `quantize`)")

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, keys: Any) -> Any:
        """One target may be given bare, and alpha follows the rank unless given."""
        if not isinstance(keys, dict):
            return keys
        keys = dict(keys)
        if isinstance(target := keys.get("target_modules"), str) and target != "all-linear":
            keys["target_modules"] = [target]
        if keys.get("alpha") is None and isinstance(r := keys.get("r", 8), int):
            keys["alpha"] = RSLORA_ALPHA if keys.get("rslora") else 2.0 * r
        return keys

    @property
    def starts_as_base(self) -> bool:  # type: ignore[override]
        """A base in a few bits answers nearly as before."""
        return self.bits is None

    def over_original(self) -> Self:
        """Over the weights as they are stored, not in `bits`."""
        return self.model_copy(update={"bits": None})

    @property
    def scaling(self) -> float:
        """The factor s on B A."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def apply(self, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """Put a `LoraLinear` in the place of every target."""
        saved_whole(anatomy)
        targets = anatomy.targets(self.target_modules)
        smallest = min(min(model.get_parameter(f"{path}.weight").shape) for path in targets)
        if self.init == "pissa" and self.r > smallest:
            raise RecipeError(
                f"one of the weights has {smallest} singular values, fewer than {self.r}",
                where="technique.r",
                hint=f"pissa takes r from 1 to {smallest} here",
            )
        learning = set(anatomy.learns_always)
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
            learning |= {f"{path}.{name}" for name, _ in adapted.named_parameters() if name.startswith("lora_")}
        if self.bits is not None:
            self._pack(model, anatomy, self.bits)
        learn_only(model, learning)

    def quantization(self, anatomy: Anatomy) -> dict[str, Any]:
        """Of `bits`; all linear maps but those of the blocks stay as they are stored."""
        if self.bits is None:
            return {}
        kinds = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}
        packed = self._packed(anatomy)
        whole = [path for path in anatomy.linears if path not in packed]
        return kinds.get(self.bits, {"load_in_8bit": True}) | {"llm_int8_skip_modules": whole}

    def _packed(self, anatomy: Anatomy) -> set[str]:
        """The linear maps of the blocks, and those adapted beside them."""
        return {*anatomy.targets("all-linear"), *anatomy.targets(self.target_modules)}

    def _pack(self, model: nn.Module, anatomy: Anatomy, bits: Bits) -> None:
        for path in self._packed(anatomy):
            module: Any = model.get_submodule(path)
            if isinstance(module, LoraLinear):
                module.pack(bits)
            else:
                model.set_submodule(
                    path, QuantizedLinear(module.weight, module.bias, bits, transposed=isinstance(module, Conv1D))
                )

    def merge(self, model: nn.Module) -> None:
        """Add s B A to each weight and put plain modules back."""
        for path, adapted in list(_adapted(model)):
            model.set_submodule(path, adapted.merged())
        for path, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                weight = module.weight.dequantized(module.weight.dtype)
                weight = weight.t().contiguous() if module.transposed else weight
                model.set_submodule(path, plain_linear(weight, module.bias, transposed=module.transposed))

    def learning_rate(self, anatomy: Anatomy) -> float:
        """`LEARNING_RATE`, falling with the width and with the number of projections adapted in a block."""
        holds = Counter(path for paths in anatomy.roles.values() for path in paths)
        adapted = sum(max(1, holds[path]) for path in anatomy.targets(self.target_modules))
        per_block = adapted / max(1, len(anatomy.blocks))
        rate = LEARNING_RATE * 2 / max(2.0, per_block) * (PISSA_FACTOR if self.init == "pissa" else 1)
        return rate_by_width(rate, anatomy, power=0.5)

    def lr_scale(self, name: str, anatomy: Anatomy) -> float:
        """LoRA+: B learns faster."""
        return self.lora_plus_ratio if name.endswith(".lora_B.weight") else 1.0

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """A PEFT `LoraConfig` that matches exactly the modules adapted here."""
        rank = self.r * (2 if self.init == "pissa" else 1)
        alpha = self.scaling * (math.sqrt(rank) if self.rslora else rank)
        whole = saved_whole(anatomy)
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
        """What learned, PiSSA's factors as those of a LoRA of rank 2r."""
        tensors = super().adapter_tensors(model)
        for path, adapted in _adapted(model):
            if adapted.pissa_A is not None:
                A, B = adapted.factors()
                tensors |= {_key(path, "A"): A.detach(), _key(path, "B"): B.detach()}
        return tensors

    def load_adapter(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Put saved tensors in place; on PiSSA, take A, B, A0 and B0 out of the rank 2r that was saved."""
        tensors = dict(tensors)
        for path, adapted in _adapted(model):
            A, B = tensors.get(_key(path, "A")), tensors.get(_key(path, "B"))
            if adapted.pissa_A is None or adapted.pissa_B is None or A is None or B is None:
                continue
            if (A.shape[0], B.shape[-1]) != (2 * self.r, 2 * self.r):
                raise CheckpointError(
                    f"the adapter's '{path}' has rank {A.shape[0]}; PiSSA of rank {self.r} is saved as {2 * self.r}",
                    hint="load it as it says it is, with Lora.from_adapter",
                )
            A, change_of_A = A.chunk(2)
            change_of_B, start_of_B = B.chunk(2, dim=1)
            adapted.pissa_A.copy_(A - change_of_A)
            adapted.pissa_B.copy_(start_of_B)
            tensors |= {_key(path, "A"): A, _key(path, "B"): change_of_B + start_of_B}
        super().load_adapter(model, tensors)

    @classmethod
    def from_adapter(cls, folder: Path) -> Self:
        """The technique that a PEFT LoRA folder was trained with, as far as its answers go (dropout included).

        Raises:
            CheckpointError: the folder cannot be read.
            RecipeError: the adapter is of a kind that is not implemented, named by its key.
        """
        config, path = read_config(folder, "LORA"), folder / "adapter_config.json"
        try:
            return cls.model_validate(_fields(config, path))
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise RecipeError(what, where=str(path), hint="give a PEFT adapter's folder") from error


def _adapted(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLinear))


def _key(path: str, factor: str) -> str:
    return f"{PEFT_PREFIX}{path}.lora_{factor}.weight"


def _fields(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Our keys from those of a PEFT `LoraConfig`."""
    config = {key: value for key, value in config.items() if key not in NOT_OURS_TO_READ}
    if (init := config.pop("init_lora_weights", True)) not in HARMLESS_INITS:
        raise RecipeError(
            f"init_lora_weights {shorten(init)} changed the base weight, so the adapter does not fit the base itself",
            where=str(path),
            hint="save it from PEFT with path_initial_model_for_weight_conversion",
        )
    targets, chosen = config.pop("target_modules", None), _modules_in(path.parent)
    narrowed = [config.pop(key, None) for key in ("exclude_modules", "layers_to_transform", "layers_pattern")]
    if isinstance(targets, list) and not any(narrowed):
        targets = [target for target in targets if any(f".{module}".endswith(f".{target}") for module in chosen)]
    else:
        targets = chosen
    if config.get("bias") == "none":
        del config["bias"]
    ours = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora", "use_dora": "dora"}
    if unknown := sorted(key for key, value in config.items() if key not in ours and value):
        raise RecipeError(
            f"{unknown[0]} {shorten(config[unknown[0]])} is not implemented", where=str(path), hint="merge it with PEFT"
        )
    return {"target_modules": targets, **{ours[key]: value for key, value in config.items() if key in ours}}


def _modules_in(folder: Path) -> list[str]:
    """The modules that an adapter's tensors are for."""
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            names = [name.removeprefix(PEFT_PREFIX) for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot be read ({error})", where=str(path), hint="give a PEFT adapter's folder"
        ) from error
    return sorted(name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight"))
