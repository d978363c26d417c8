"""A small encoder's forward and backward pass on a GPU as one CUDA graph each, for every shape that comes again.

A step of BERT over some thousand tokens is a few hundred kernels of microseconds: starting them takes several times as
long as they do. A graph starts them all at once. It is bound to a shape, so lengths are rounded up to few; a shape is
captured when it has come several times, and its graph used only where it gives, for another batch than it was captured
with, the plain pass's answer and gradients. `torch.cuda.make_graphed_callables` does the capturing; dropout draws from
the seed that the loop sets, in a graph as without one.
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

__all__ = ["Graphs", "use_graphs"]

GRAPHS_ON = ("cuda",)
ROUND_LENGTH = 16
"""Tokens of a text are rounded up to these: at most eight shapes up to 128."""

OFTEN = 3
"""How often a shape comes before it is captured, which takes as long as some five steps."""

MOST_PARAMETERS, MOST_TOKENS = 400_000_000, 8192
"""Of a model, and of a batch: beyond, kernels take longer than their start."""

CLOSE = 0.02
"""How far answers and gradients may lie from those of the plain pass, of their norm: bf16 has eight bits."""

INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
Capture = Callable[[nn.Module, tuple[Tensor, ...]], Any]


class _Call(nn.Module):
    """A model as a function of tensors in a fixed order. Its modes are the model's own: it is never set to one."""

    def __init__(self, model: nn.Module, plain: Callable[..., Any], names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.plain, self.names = model, plain, names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.plain(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


class Graphs:
    """Stands in a model's `forward`; what it does not take goes the plain way."""

    def __init__(self, model: Any, longest: int, capture: Capture) -> None:
        self.model, self.plain, self.longest = model, model.forward, longest
        self.capture: Capture | None = capture
        """None once one failed, or gave another answer."""
        # a pass that is computed twice asks for the state that dropout draws from, which a graph cannot give
        self.checkpoints: list[Any] = [one for one in model.modules() if hasattr(one, "gradient_checkpointing")]
        self.parameters: list[nn.Parameter] = list(model.parameters())  # asked for once: that takes milliseconds
        self.seen, self.graphs = Counter[Any](), dict[Any, Any]()
        self.waiting = False
        """For a backward pass, which needs what the next forward pass would overwrite."""

    def __call__(self, **inputs: Any) -> Any:
        """As the model's `forward`, with texts rounded up in training."""
        if not self._takes(inputs):
            return self.plain(**inputs)
        length, names = inputs["input_ids"].shape[1], tuple(sorted(inputs))
        logits = self._logits(names, tuple(self._rounded(inputs[name], name) for name in names))
        return SequenceClassifierOutput(logits=logits[:, :length] if logits.ndim == 3 else logits)

    def _takes(self, inputs: dict[str, Any]) -> bool:
        ids = inputs.get("input_ids")
        return (
            self.model.training
            and torch.is_grad_enabled()
            and inputs.keys() <= INPUTS
            and ids is not None
            and ids.device.type in GRAPHS_ON
            and ids.numel() <= MOST_TOKENS
            and not any(one.gradient_checkpointing for one in self.checkpoints)
        )

    def _rounded(self, x: Tensor, name: str) -> Tensor:
        """(texts, tokens) with padding up to a length that many share."""
        length = x.shape[1]
        rounded = max(length, min(length + -length % ROUND_LENGTH, self.longest))
        pad = (self.model.config.pad_token_id or 0) if name == "input_ids" else 0
        return F.pad(x, (0, rounded - length), value=pad)

    def _logits(self, names: tuple[str, ...], given: tuple[Tensor, ...]) -> Tensor:
        learning = [parameter for parameter in self.parameters if parameter.requires_grad]
        key = names, given[0].shape, tuple(map(id, learning)), _autocast(given[0])
        self.seen[key] += 1
        plain = _Call(self.model, self.plain, names)
        if self.capture is not None and self.seen[key] >= OFTEN and key not in self.graphs and not self.waiting:
            self._try(key, plain, given, learning)
        if self.capture is None or key not in self.graphs or self.waiting:
            return plain(*given)  # type: ignore[no-any-return]
        for parameter in learning:
            if parameter.grad is not None:  # it lies where the graph is about to write the next one
                parameter.grad = parameter.grad.clone()
        logits: Tensor = self.graphs[key](*given)
        self.waiting = True
        logits.register_hook(self._passed)
        return logits

    def _passed(self, _: Tensor) -> None:
        self.waiting = False

    def _try(self, key: Any, plain: _Call, given: tuple[Tensor, ...], learning: list[nn.Parameter]) -> None:
        """Capture a shape with the batch's rows in another order; keep it where its answer to this order is right."""
        assert self.capture is not None, "it is asked before"
        try:
            with _drawing_nothing(given[0]), _without_kept_casts(given[0]):
                graph = self.capture(_Call(self.model, self.plain, plain.names), tuple(x.roll(1, 0) for x in given))
            expected, found = (_answered(call, _with_padding(given, plain.names), learning) for call in (plain, graph))
            off = float(torch.dist(found, expected) / expected.norm())
            trouble = "" if off <= CLOSE else f"a graph's answer and gradients are off by {off:.0%}"
        except torch.OutOfMemoryError:  # each holds a set of gradients: without them there is more room
            self.graphs.clear()
            trouble = "they take more memory than there is"
        except RuntimeError as error:
            trouble = str(error).partition("\n")[0]
        if trouble:
            self.capture = None
            warnings.warn(f"no CUDA graphs for this model, which costs time only: {trouble}", stacklevel=2)
        else:
            self.graphs[key] = graph


class _Cuda:
    """Captures by PyTorch; all graphs in one pool of memory, since no two are at work at once."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, module: nn.Module, sample: tuple[Tensor, ...]) -> Any:
        self.pool, stream = self.pool or torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        try:
            return torch.cuda.make_graphed_callables(module, sample, allow_unused_input=True, pool=self.pool)
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind


def use_graphs(model: Any, longest: int) -> bool:
    """Let a small encoder on a GPU, whose texts have at most `longest` tokens, learn by graphs, in place; whether."""
    size = sum(parameter.numel() for parameter in model.parameters())
    if model.config.is_encoder_decoder or model.get_output_embeddings() is not None or size > MOST_PARAMETERS:
        return False  # a map over a vocabulary is asked at places that no graph knows
    model.forward = Graphs(model, longest, _Cuda())
    return True


def _autocast(x: Tensor) -> tuple[bool, torch.dtype]:
    device = x.device.type
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _without_kept_casts(x: Tensor) -> Any:
    """A weight's cast that autocast keeps would stand in the graph as it was."""
    enabled, dtype = _autocast(x)
    return torch.autocast(x.device.type, dtype, enabled, cache_enabled=False)


def _drawing_nothing(x: Tensor) -> Any:
    """What is drawn inside is drawn again behind it."""
    return torch.random.fork_rng([x.device] if x.device.type == "cuda" else [])


def _with_padding(given: tuple[Tensor, ...], names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Texts that all end before the last place: with no padding at all transformers leaves the mask out, which a graph
    cannot, and attention then draws its dropout in another order.
    """
    return tuple(
        F.pad(x[:, :-1], (0, 1)) if name == "attention_mask" else x for name, x in zip(names, given, strict=True)
    )


def _answered(call: Any, given: tuple[Tensor, ...], learning: list[nn.Parameter]) -> Tensor:
    """Logits, and gradients of their sum, as one row of numbers."""
    with _drawing_nothing(given[0]), _without_kept_casts(given[0]):
        logits = call(*given)
        gradients = torch.autograd.grad(logits.float().sum(), learning, allow_unused=True)
    parts = [part.detach().float().flatten() for part in (logits, *gradients) if part is not None]
    return torch.cat(parts)
