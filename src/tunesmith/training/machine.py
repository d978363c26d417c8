"""The machine: device, precision, memory, threads, and how many examples fit at once."""

from __future__ import annotations

import os
import platform
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.data.batches import Limits
from tunesmith.errors import RecipeError, ResourceError
from tunesmith.models.anatomy import Anatomy
from tunesmith.training import parallel

ACTIVATION_BYTES = 96
"""Activation bytes per token, block and hidden unit: 16 fp32 values, and half as much again for attention."""

ACTIVATION_SHARE = 0.4
"""Fraction of the memory that activations may take."""

NEVER_CUT = sys.maxsize // 2
"""Overhead at which a batch is cut into micro-batches only if it does not fit in memory."""

OVERHEAD_TOKENS = {"cpu": 256, "cuda": 8192, "mps": 2048}
"""Cost of one more forward pass, in tokens: weight repacking and dispatch on a CPU, kernel launches on a GPU."""


@dataclass(frozen=True)
class Machine:
    """A device, and the dtype of matrix products (`None`: the dtype of the weights)."""

    device: torch.device
    autocast_dtype: torch.dtype | None

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context for forward passes."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    @property
    def precision(self) -> str:
        """The precision as the recipe names it: bf16, fp16 or fp32."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.autocast_dtype, "fp32")  # type: ignore[arg-type]

    @property
    def is_slow(self) -> bool:
        """True where the processor only emulates matrix products in this precision."""
        return self.device.type == "cpu" and self.autocast_dtype is torch.bfloat16 and not _has_bf16(self.device)

    @property
    def memory_bytes(self) -> int:
        """Total memory of the device; unlike the free memory, it is the same in every run."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def limits(
        self, anatomy: Anatomy, micro_batch_size: int | str, batch_size: int, *, padding_free: bool = False
    ) -> Limits:
        """Return how many examples and tokens fit at once; without padding, smaller micro-batches save no time."""
        per_token = ACTIVATION_BYTES * anatomy.hidden_size * max(len(anatomy.blocks), 1)
        max_cost = max(int(self.memory_bytes * ACTIVATION_SHARE / per_token), 1)
        if isinstance(micro_batch_size, int):
            return Limits(micro_batch_size, sys.maxsize, NEVER_CUT)
        overhead = NEVER_CUT if padding_free else OVERHEAD_TOKENS.get(self.device.type, 2048)
        return Limits(batch_size, max_cost, overhead)

    def select(self) -> None:
        """Make this GPU the current device of seeds, streams and CUDA graphs."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def peak_memory_bytes(self) -> int:
        """Return the peak memory of this process: resident memory, or allocated memory on a GPU."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def find(device: str = "auto", precision: str = "auto", *, named: str = "train.device") -> Machine:
    """Return the machine for a device and a precision of the recipe; `named` is the option that errors refer to.

    Raises:
        ResourceError: the machine has no such device.
        RecipeError: the device does not support the precision.
    """
    target = _device(device, named)
    if precision == "auto":
        return Machine(target, torch.bfloat16 if _has_bf16(target) else None)
    if precision == "fp16" and target.type == "cpu":
        raise RecipeError("train.precision: fp16 cannot be trained on a CPU", hint="use bf16, fp32 or auto")
    if precision == "bf16" and target.type == "cuda" and not _has_bf16(target):
        raise RecipeError("train.precision: this GPU has no bf16", hint="use fp16, fp32 or auto")
    return Machine(target, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision))


def _device(name: str, named: str) -> torch.device:
    gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if gpus else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{parallel.local_rank()}" if name == "cuda" else name)  # one GPU for each process
        there = {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}[device.type]
    except (RuntimeError, KeyError):
        raise RecipeError(f"{named}: unknown device '{name}'", hint="use auto, cpu, cuda, cuda:1 or mps") from None
    if (device.index or 0) >= there:
        raise ResourceError(f"{named}: this machine has no {device}", hint="use auto or cpu")
    return device


def _has_bf16(device: torch.device) -> bool:
    """Return True where matrix products in bf16 are faster than in fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an allocation failure on a GPU, in PyTorch on a CPU, or in Python."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def store_frozen(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Store frozen matrices in the autocast dtype; trainable parameters, norms and biases stay in fp32.

    A bf16 weight takes half the memory traffic of an fp32 one, and autocast has nothing to convert. Embeddings are
    looked up, not multiplied. They keep their dtype, because their output sets the dtype of the residual stream.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in filter(Tensor.is_floating_point, model.parameters()):  # the others are quantized codes
            if parameter.requires_grad or parameter.ndim < 2 or dtype is None:
                parameter.data = parameter.data.float()
            elif id(parameter) not in looked_up:
                parameter.data = parameter.data.to(dtype)


def store_for_inference(model: nn.Module, machine: Machine) -> None:
    """Store half-precision weights in fp32 (the same values) on a CPU that only emulates their products, if they fit.

    Without AVX512-BF16, SmolLM2 in bf16 takes 3.3 times as long as in fp32 to read a prompt, and 1.6 times as long to
    generate.
    """
    emulated = (torch.float16,) if _has_bf16(machine.device) else (torch.float16, torch.bfloat16)
    halves = [one for one in (*model.parameters(), *model.buffers()) if one.dtype in emulated]
    if machine.device.type == "cpu" and 4 * sum(map(Tensor.numel, halves)) < machine.memory_bytes / 2:
        for tensor in halves:
            tensor.data = tensor.data.float()


def describe(machine: Machine) -> dict[str, Any]:
    """Return processor, memory and threads for `run.json`."""
    name = platform.processor() or platform.machine()
    if machine.device.type == "cuda":
        name = torch.cuda.get_device_name(machine.device)
    elif os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        name = models[0] if models else name
    return {
        "device": str(machine.device),
        "name": name,
        "precision": machine.precision,
        "memory_bytes": machine.memory_bytes,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
