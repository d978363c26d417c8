"""The check that decides if a fast path stays: the same outputs and gradients as the model's own code.

The model runs in training mode with dropout 0, in the run's dtype, on four texts of realistic lengths, up to the first
block that completes one of every kind of block. Outputs of that block, gradients of the states that enter the first
block, and gradients of all parameters between must be equal within `OUTPUT_TOLERANCE` and `GRADIENT_TOLERANCE`. In half
precision a model may be so ill-conditioned that its own results miss fp32's by more; then the fast path may be as far
from the model's results as `ROUNDING_FACTOR` times these are from fp32's. A last check of the whole model in eval mode,
on four short texts, covers the blocks above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.kernels.edits import set_mode
from tunesmith.kernels.unpadded import layout_in

__all__ = ["OUTPUT_TOLERANCE", "PROBE_ERRORS", "Probe", "explain", "short_batch"]

PROBE_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Exceptions that a model may raise for an unexpected input or mask."""

LENGTHS, SHORT_LENGTHS, SHORT_TARGETS = (96, 95, 93, 70), (8, 5, 3, 6), (4, 2, 8, 6)
"""Tokens of the texts. 96 is more than one side of the narrowest sliding window (ModernBERT: 64) and a multiple of 32,
which oneDNN computes without a kernel for the remainder. With and without padding the texts have the same number of
rows (384 and 32), so both need the same kernels; a kernel takes about 0.5 MB."""

OUTPUT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest distance of outputs, relative to their norm; bf16 has 8 significant bits."""

GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""Largest distance of each gradient, relative to its norm. A wrong or missing term differs by its whole norm."""

GRADIENT_FLOOR = 2e-2
"""Share of the largest gradient's norm below which a gradient is compared with that norm instead: the gradient of a
key's bias is zero except for rounding errors."""

ROUNDING_FACTOR = 3.0
"""FlashAttention's tests allow twice the rounding error; here several products follow one another."""

WHOLE_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}
"""The same for the whole model, whose depth adds up rounding errors."""


class _Stop(Exception):
    """The probed blocks are done."""


@dataclass(frozen=True)
class _Results:
    """Named tensors of one pass."""

    tensors: dict[str, Tensor]
    floors: dict[str, float]


class Probe:
    """Inputs on which a model's own code and its fast paths are compared."""

    def __init__(
        self, model: Any, blocks: Sequence[nn.Module], autocast_dtype: torch.dtype | None, max_tokens: int
    ) -> None:
        self.model, self.blocks, self.dtype = model, blocks, autocast_dtype
        self.device = next(model.parameters()).device
        longest = max(2, min(LENGTHS[0], max_tokens))
        lengths = [max(1, min(longest, one * longest // LENGTHS[0])) for one in LENGTHS]
        self.batch = _batch(model, lengths, self.device)
        self.depth = _first_of_every_kind(model, blocks)
        self._expected = self._train()
        self._whole = self._eval()
        self._rounding = dict[str, float]()
        """Name -> distance of the model's own results from those in fp32, once measured."""

    def difference(self) -> str:
        """Return how results of the first blocks differ from those at construction; empty if they are equal."""
        dtype = self.dtype or torch.float32
        tolerances = OUTPUT_TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype]
        return _compare(self._expected, self._train(), *tolerances, self._rounding)

    def whole_difference(self, logits: Tensor | None = None) -> str:
        """Return how the whole model's output differs from that at construction; empty if it is equal.

        `logits` are those for `short_batch`, if they are known.
        """
        tensor = self._eval() if logits is None else self._masked(logits)
        return _compare(self._whole, tensor, WHOLE_TOLERANCE[self.dtype or torch.float32])

    def measure_rounding(self) -> bool:
        """Measure how far the model's results in half precision are from those in fp32; False if nothing is new."""
        if self.dtype is None or self._rounding:
            return False
        try:
            with _stored_in_fp32(self.model):
                exact = self._train(autocast=False).tensors
        except PROBE_ERRORS:
            return False
        self._rounding = {
            name: float(torch.dist(tensor, exact[name]))
            for name, tensor in self._expected.tensors.items()
            if name in exact
        }
        return True

    def _train(self, *, autocast: bool = True) -> _Results:
        """Return outputs and gradients of the first blocks."""
        leaves, kept = list[Tensor](), list[Tensor]()
        last = self.blocks[self.depth]
        mask = self.batch["decoder_attention_mask" if self._is_in_decoder(self.depth) else "attention_mask"]

        def start(_: nn.Module, args: Any, kwargs: Any) -> Any:
            leaves.append((args[0] if args else kwargs["hidden_states"]).detach().clone().requires_grad_())
            return ((leaves[-1], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": leaves[-1]})

        def stop(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            states, layout = output[0] if isinstance(output, tuple) else output, layout_in(args, kwargs)
            kept.append(states if layout is None or states.shape[:2] != (1, layout.total) else layout.pad(states))
            raise _Stop

        with ExitStack() as stack:
            for module in (module for n, module in enumerate(self.blocks) if n == 0 or self._starts_decoder(n)):
                handle = module.register_forward_pre_hook(start, with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
            stack.callback(last.register_forward_hook(stop, with_kwargs=True).remove)
            stack.enter_context(_training_without_dropout(self.model))
            parameters = stack.enter_context(_all_trainable(self.model, self.blocks[: self.depth + 1]))
            with self._autocast(autocast), torch.enable_grad():
                try:
                    self.model(**self.batch)
                except _Stop:
                    pass
                states = kept[0].float()
                valid = F.pad(mask, (states.shape[1] - mask.shape[1], 0), value=1)[:, :, None]  # after virtual tokens
                direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
                (states * valid * direction).sum().backward()
            tensors = {"the output of the blocks": (states * valid).detach()}
            gradients = {
                f"the gradient of {name}": parameter.grad.float().clone()
                for name, parameter in parameters.items()
                if parameter.grad is not None
            }
            for number, leaf in enumerate(leaves):
                assert leaf.grad is not None, "the blocks depend on their input"
                gradients[f"the gradient of input {number}"] = leaf.grad.float()
        floor = GRADIENT_FLOOR * max(float(one.norm()) for one in gradients.values())
        return _Results(tensors | gradients, dict.fromkeys(gradients, floor))

    @torch.no_grad()
    def _eval(self) -> _Results:
        """Return the model's output for short texts; of an encoder-decoder the states before its head."""
        batch = short_batch(self.model)
        body = self.model.base_model if self.model.config.is_encoder_decoder else self.model
        with set_mode(self.model, training=False), self._autocast():
            output = body(**batch)
        return self._masked(output.logits if hasattr(output, "logits") else output[0])

    def _masked(self, output: Tensor) -> _Results:
        batch, output = short_batch(self.model), output.detach().float()
        mask = batch.get("decoder_attention_mask", batch["attention_mask"])
        return _Results({"the output of the model": output * mask[:, :, None] if output.ndim == 3 else output}, {})

    def _autocast(self, wanted: bool = True) -> Any:
        enabled = wanted and self.dtype is not None
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=enabled)

    def _is_in_decoder(self, number: int) -> bool:
        return bool(self.model.config.is_encoder_decoder) and any(map(self._starts_decoder, range(number + 1)))

    def _starts_decoder(self, number: int) -> bool:
        if not self.model.config.is_encoder_decoder or number == 0:
            return False
        inside = {id(module) for module in self.model.get_decoder().modules()}
        return id(self.blocks[number]) in inside and id(self.blocks[number - 1]) not in inside


def _compare(
    expected: _Results,
    results: _Results,
    tolerance: float,
    gradient_tolerance: float = 0.0,
    rounding: Mapping[str, float] = MappingProxyType({}),
) -> str:
    """Return how results differ; empty if each tensor is within its tolerance."""
    if expected.tensors.keys() != results.tensors.keys():
        return f"{min(expected.tensors.keys() ^ results.tensors.keys())} exists on one side only"
    for name, tensor in expected.tensors.items():
        own, floor = results.tensors[name], expected.floors.get(name)
        if own.shape != tensor.shape:
            return f"{name} has another shape"
        norm, distance = max(float(tensor.norm()), floor or 1e-12), float(torch.dist(own, tensor))
        allowed = tolerance if floor is None else gradient_tolerance
        if not distance <= max(allowed * norm, ROUNDING_FACTOR * rounding.get(name, 0.0)):
            return f"{name} differs by {distance / norm:.2g} of its norm, tolerance {allowed:g}"
    return ""


def explain(error: BaseException) -> str:
    """Return an exception as a reason, on one line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _first_of_every_kind(model: Any, blocks: Sequence[nn.Module]) -> int:
    """Return the index of the block with which one of every kind has been computed."""
    layer_types = getattr(model.config, "layer_types", None) or []
    kinds: dict[Any, int] = {}
    for number, block in enumerate(blocks):
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in block.modules())
        layer_type = layer_types[number] if number < len(layer_types) else None
        kinds.setdefault((repr(block), hooks, layer_type), number)
    return max(kinds.values())


def _batch(model: Any, lengths: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Return texts of these lengths; for an encoder-decoder also targets, the shortest for the longest text."""
    batch = _texts(model, lengths, device)
    if model.config.is_encoder_decoder:
        targets = _texts(model, lengths[::-1], device)
        batch |= {f"decoder_{name}": value for name, value in targets.items()}
    return batch


def short_batch(model: Any) -> dict[str, Tensor]:
    """Return texts of `SHORT_LENGTHS`; for an encoder-decoder also targets."""
    device = next(model.parameters()).device
    batch = _texts(model, SHORT_LENGTHS, device)
    if model.config.is_encoder_decoder:
        batch |= {f"decoder_{name}": value for name, value in _texts(model, SHORT_TARGETS, device).items()}
    return batch


def _texts(model: Any, lengths: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Return ids and mask of texts, without the padding token."""
    pad, size = model.config.pad_token_id or 0, model.get_input_embeddings().num_embeddings
    known = torch.tensor([token for token in range(min(1000, size)) if token != pad])
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    drawn = torch.randint(len(known), mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": known[drawn].masked_fill(mask == 0, pad).to(device), "attention_mask": mask.to(device)}


@contextmanager
def _training_without_dropout(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode with every dropout at 0, and restore both."""
    rates = list[tuple[nn.Module, str, float]]()
    for module in model.modules():
        names = ("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else tuple(vars(module))
        for name in names:
            value = getattr(module, name)
            if isinstance(value, float) and value and (name == "p" or "drop" in name):
                rates.append((module, name, value))
    devices = [one.device for one in (next(model.parameters()),) if one.device.type == "cuda"]
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        with set_mode(model, training=True), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)


@contextmanager
def _stored_in_fp32(model: nn.Module) -> Iterator[None]:
    """Store parameters of half precision in fp32 inside the context."""
    stored = [(one, one.data) for one in model.parameters() if one.dtype in (torch.bfloat16, torch.float16)]
    try:
        for one, _ in stored:
            one.data = one.data.float()
        yield
    finally:
        for one, data in stored:
            one.data = data


@contextmanager
def _all_trainable(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[dict[str, nn.Parameter]]:
    """Make all parameters of some blocks trainable inside the context; yield them by name."""
    named = {f"{n}.{name}": one for n, block in enumerate(blocks) for name, one in block.named_parameters()}
    before = [(one, one.requires_grad, one.grad) for one in model.parameters()]
    try:
        for one, _, _ in before:
            one.grad = None
        for one in named.values():
            one.requires_grad_(one.is_floating_point())
        yield named
    finally:
        for one, requires_grad, grad in before:
            one.requires_grad_(requires_grad)
            one.grad = grad
