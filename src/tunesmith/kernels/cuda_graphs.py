"""CUDA graphs of a small encoder's forward and backward pass, one per pass and recurring input shape.

A step of BERT over some thousand tokens is a few hundred kernels of microseconds each, and launching them takes several
times as long as running them. A graph launches all of them at once. It is bound to a shape, so lengths are rounded up
to a few values. A shape is captured after it has occurred several times. Its graph is used only if its outputs and
gradients equal those of the plain pass for a batch other than the captured one. `torch.cuda.make_graphed_callables`
captures the graphs. Dropout depends on the loop's seed, with and without a graph.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

__all__ = ["CudaGraphs", "TorchCapture", "why_no_graphs"]

GRAPH_DEVICES = ("cuda",)
ROUND_LENGTH = 16
"""Lengths are multiples of this: at most eight shapes up to 128."""

MIN_OCCURRENCES = 3
"""Occurrences of a shape before its capture, which takes as long as about five steps."""

MAX_PARAMETERS, MAX_TOKENS = 400_000_000, 8192
"""Maximum size of a model and of a batch: beyond these, kernels take longer than their launch."""

GRAPH_TOLERANCE = 0.02
"""Maximum relative distance of outputs and gradients from those of the plain pass; bf16 has 8 significant bits."""

INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
Capture = Callable[[nn.Module, tuple[Tensor, ...]], Any]


class _Call(nn.Module):
    """A model as a function of tensors in a fixed order. It never changes the model's training mode."""

    def __init__(self, model: nn.Module, plain: Callable[..., Any], names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.plain, self.names = model, plain, names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.plain(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


class CudaGraphs:
    """Replacement of a model's `forward`; inputs that it does not support use the plain pass."""

    def __init__(
        self, model: Any, longest: int, capture: Capture | None, on_failure: Callable[[str], None] | None = None
    ) -> None:
        self.model, self.plain, self.longest = model, model.forward, longest
        self.capture: Capture | None = capture
        """None after a capture has failed or a graph has had different results."""
        self.on_failure = on_failure
        # recomputation needs the generator state of dropout, which a graph does not provide
        self.checkpoints: list[Any] = [one for one in model.modules() if hasattr(one, "gradient_checkpointing")]
        self.parameters: list[nn.Parameter] = list(model.parameters())  # once, because it takes milliseconds
        self.seen, self.graphs = Counter[Any](), dict[Any, Any]()
        self.waiting = False
        """True from a graph's forward pass to its backward pass, whose inputs another forward pass would overwrite."""

    def __call__(self, **inputs: Any) -> Any:
        """Run the forward pass; in training with graphs, over rounded lengths."""
        if not self._supports(inputs):
            return self.plain(**inputs)
        length, names = inputs["input_ids"].shape[1], tuple(sorted(inputs))
        logits = self._logits(names, tuple(self._rounded(inputs[name], name) for name in names))
        return SequenceClassifierOutput(logits=logits[:, :length] if logits.ndim == 3 else logits)

    def _supports(self, inputs: dict[str, Any]) -> bool:
        ids = inputs.get("input_ids")
        return (
            self.model.training
            and torch.is_grad_enabled()
            and inputs.keys() <= INPUTS
            and ids is not None
            and ids.device.type in GRAPH_DEVICES
            and ids.numel() <= MAX_TOKENS
            and not any(one.gradient_checkpointing for one in self.checkpoints)
        )

    def _rounded(self, x: Tensor, name: str) -> Tensor:
        """Pad (texts, tokens) to a rounded length."""
        length = x.shape[1]
        rounded = max(length, min(length + -length % ROUND_LENGTH, self.longest))
        pad = (self.model.config.pad_token_id or 0) if name == "input_ids" else 0
        return F.pad(x, (0, rounded - length), value=pad)

    def _logits(self, names: tuple[str, ...], inputs: tuple[Tensor, ...]) -> Tensor:
        trainable = [parameter for parameter in self.parameters if parameter.requires_grad]
        key = names, inputs[0].shape, tuple(map(id, trainable)), _autocast(inputs[0])
        self.seen[key] += 1
        plain = _Call(self.model, self.plain, names)
        recurs = self.seen[key] >= MIN_OCCURRENCES and key not in self.graphs
        if self.capture is not None and recurs and not self.waiting:
            self._try(key, plain, inputs, trainable)
        if self.capture is None or key not in self.graphs or self.waiting:
            return plain(*inputs)  # type: ignore[no-any-return]
        for parameter in trainable:
            if parameter.grad is not None:  # the graph writes the next gradient to the same memory
                parameter.grad = parameter.grad.clone()
        logits: Tensor = self.graphs[key](*inputs)
        self.waiting = True
        logits.register_hook(self._backward_done)
        return logits

    def _backward_done(self, _: Tensor) -> None:
        self.waiting = False

    def _try(self, key: Any, plain: _Call, inputs: tuple[Tensor, ...], trainable: list[nn.Parameter]) -> None:
        """Capture a graph with the batch's rows in another order; keep it if its results in this order are right."""
        assert self.capture is not None, "the caller checks it"
        try:
            with _fork_generators(inputs[0]), _no_cast_cache(inputs[0]):
                graph = self.capture(_Call(self.model, self.plain, plain.names), tuple(x.roll(1, 0) for x in inputs))
            probe = _with_padding(inputs, plain.names)
            expected, actual = (_results(call, probe, trainable) for call in (plain, graph))
            off = float(torch.dist(actual, expected) / expected.norm())
            reason = "" if off <= GRAPH_TOLERANCE else f"outputs and gradients of a graph differ by {off:.0%}"
        except torch.OutOfMemoryError:  # each graph holds a set of gradients
            self.graphs.clear()
            reason = "out of memory"
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
        if reason:
            self.capture = None
            if self.on_failure is not None:
                self.on_failure(reason)
            warnings.warn(f"CUDA graphs are off, which affects only speed: {reason}", stacklevel=2)
        else:
            self.graphs[key] = graph


class TorchCapture:
    """Capture with PyTorch; all graphs share one memory pool, because no two run at once."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, module: nn.Module, sample: tuple[Tensor, ...]) -> Any:
        """Return the captured module."""
        self.pool, stream = self.pool or torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        try:
            return torch.cuda.make_graphed_callables(module, sample, allow_unused_input=True, pool=self.pool)
        finally:
            torch.cuda.set_stream(stream)  # a failed capture leaves its own stream current


def why_no_graphs(model: Any) -> str:
    """Return the reason why a model cannot train with CUDA graphs; empty if it can."""
    if model.config.is_encoder_decoder:
        return "encoder-decoder"
    if model.get_output_embeddings() is not None:
        return "the loss selects tokens of an LM head, which a graph cannot do"
    if sum(parameter.numel() for parameter in model.parameters()) > MAX_PARAMETERS:
        return f"more than {MAX_PARAMETERS:,} parameters"
    return ""


def _autocast(x: Tensor) -> tuple[bool, torch.dtype]:
    device = x.device.type
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _no_cast_cache(x: Tensor) -> Any:
    """Return an autocast context without cache: a graph would keep using a cached cast of old weights."""
    enabled, dtype = _autocast(x)
    return torch.autocast(x.device.type, dtype, enabled, cache_enabled=False)


def _fork_generators(x: Tensor) -> Any:
    """Return a context that restores the state of the random generators."""
    return torch.random.fork_rng([x.device] if x.device.type == "cuda" else [])


def _with_padding(inputs: tuple[Tensor, ...], names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Mask the last position of all texts.

    Without padding transformers drops the mask, which a graph cannot do, and attention then draws its dropout in
    another order.
    """
    return tuple(
        F.pad(x[:, :-1], (0, 1)) if name == "attention_mask" else x for name, x in zip(names, inputs, strict=True)
    )


def _results(call: Any, inputs: tuple[Tensor, ...], trainable: list[nn.Parameter]) -> Tensor:
    """Return logits and the gradients of their sum as one vector."""
    with _fork_generators(inputs[0]), _no_cast_cache(inputs[0]):
        logits = call(*inputs)
        gradients = torch.autograd.grad(logits.float().sum(), trainable, allow_unused=True)
    parts = [part.detach().float().flatten() for part in (logits, *gradients) if part is not None]
    return torch.cat(parts)
