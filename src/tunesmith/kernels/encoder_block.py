"""An encoder's block whose norms follow the sums (BERT, Devlin 2019, arXiv 1810.04805), in few passes over memory:

    h = norm(x + D (W_o attend(W_q x, W_k x, W_v x)))        z = norm(h + D (W_down f(W_up h)))

The block's modules stay where they are and say what is multiplied; only the way through them is another, and only while
the block computes without padding. A block is known by its parts' roles, and taken when its answer stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from tunesmith.kernels.attention import Rows, attend
from tunesmith.kernels.linears import ACTIVATIONS, Activation, compute_dtype, linears, part_of
from tunesmith.kernels.norms import add_norm
from tunesmith.kernels.padding_free import Layout, layout_in, same_answers
from tunesmith.kernels.tail import Tail, asking, tail_of

__all__ = ["use_encoder_blocks"]

PARTS = ("query", "key", "value", "attention_output", "mlp_up", "mlp_down")


@dataclass(frozen=True)
class Way:
    """The parts of one block, and what is not a module of them."""

    block: nn.Module
    attention: nn.Module
    """What holds the query's map, and a prefix where there is one."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_output: nn.Module
    mlp_up: nn.Module
    mlp_down: nn.Module
    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    activation: Activation
    head_width: int
    dropouts: tuple[nn.Module | None, nn.Module | None, nn.Module | None]
    """Of the attention's shares, of the attention's output, of the MLP's."""

    def __call__(self, x: Tensor, layout: Layout, wanted: Tensor | None = None) -> Tensor:
        """(total, width) -> (total, width), or zeros but where it is `wanted` (row, place)."""
        x = x.to(compute_dtype(x))
        of_shares, of_attention, of_mlp = (
            one.p if isinstance(one, nn.Dropout) and one.training else 0.0 for one in self.dropouts
        )
        places: Tensor | None = None
        groups: Sequence[Rows] = layout.groups
        if wanted is None:
            q, k, v = _mapped(x, self.query, self.key, self.value)
        else:
            places, groups = asking(layout, wanted)
            k, v = _mapped(x, self.key, self.value)
            x = x.index_select(0, places)
            (q,) = _mapped(x, self.query)
        prefix = getattr(self.attention, "prefix", None)
        seen = attend(
            q,
            k,
            v,
            groups,
            width=self.head_width,
            scaling=self.head_width**-0.5,
            dropout=of_shares,
            prefix=None if prefix is None else prefix(),
        )
        (y,) = _mapped(seen, self.attention_output)
        x = _added(x, y, self.norms[0], of_attention)
        (u,) = _mapped(x, self.mlp_up)
        (y,) = _mapped(u, self.mlp_down, activation=self.activation)
        x = _added(x, y, self.norms[1], of_mlp)
        return x if places is None else x.new_zeros(layout.total, x.shape[1]).index_copy(0, places, x)


def _mapped(x: Tensor, *modules: nn.Module, activation: Activation = "none") -> tuple[Tensor, ...]:
    """What maps of one input give; a module that is no `Part` is called as it is."""
    parts = [part_of(module) for module in modules]
    if all(part is not None for part in parts):
        return linears(x, parts, activation)  # type: ignore[arg-type]
    x = ACTIVATIONS[activation](x)
    return tuple(module(x[None])[0].to(x.dtype) for module in modules)


def _added(x: Tensor, y: Tensor, norm: nn.LayerNorm, dropout: float) -> Tensor:
    return add_norm(x, y, norm.weight, norm.bias, norm.eps, dropout)


def use_encoder_blocks(model: Any, blocks: Sequence[nn.Module], roles: Sequence[Mapping[str, Sequence[str]]]) -> bool:
    """Let a model's padding-free blocks go this way, in place; whether they do.

    `roles` are the paths inside each block. All blocks are taken, or none.
    """
    found = [way for block, own in zip(blocks, roles, strict=True) if (way := _way(model, block, own)) is not None]
    if not found or len(found) < len(blocks):
        return False

    def take() -> None:
        for way in found:
            way.block.forward = MethodType(_forward(way), way.block)

    def leave() -> None:
        for way in found:
            del way.block.forward

    if not same_answers(model, take, leave):
        return False
    last = found[-1]
    recorded: list[tuple[Tensor, Layout]] = []
    last.block.forward = MethodType(_forward(last, recorded=recorded), last.block)
    model.tail = tail_of(model, recorded)
    if model.tail is not None:
        model.tail.watch(model)
    last.block.forward = MethodType(_forward(last, tail=model.tail), last.block)
    return True


def _forward(way: Any, tail: Tail | None = None, recorded: list[Any] | None = None) -> Any:
    """The block's own forward; `recorded` keeps what it gives."""
    plain = type(way.block).forward

    def forward(block: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout = layout_in(args, kwargs)
        if layout is None or hidden_states.shape[0] != 1:
            return plain(block, hidden_states, *args, **kwargs)
        out = way(hidden_states[0], layout, None if tail is None else tail.wanted(layout))
        if recorded is not None:
            out = out.detach().requires_grad_()
            recorded.append((out, layout))
        return out[None]

    return forward


def _way(model: Any, block: nn.Module, roles: Mapping[str, Sequence[str]]) -> Way | None:
    """The parts of a block, where they are those of the module's formula and nothing else learns or stands beside."""
    if any(len(roles.get(role, ())) != 1 for role in PARTS) or "last_norm" not in roles or "mlp_gate" in roles:
        return None
    paths = {role: roles[role][0] for role in PARTS}
    norms = [block.get_submodule(path) for path in roles["norm"]]
    settings = model.config
    activation = _NAMES.get(str(getattr(settings, "hidden_act", getattr(settings, "activation", None))))
    heads = getattr(settings, "num_attention_heads", None)
    if len(norms) != 2 or any(type(norm) is not nn.LayerNorm for norm in norms) or not activation or not heads:
        return None
    modules = {role: block.get_submodule(path) for role, path in paths.items()}
    attention = paths["query"].rpartition(".")[0]
    width = settings.hidden_size // heads
    beside = {role: _dropout_beside(block, paths[role]) for role in ("query", "attention_output", "mlp_down")}
    if beside["attention_output"] is beside["query"]:
        beside["attention_output"] = None  # DistilBERT: the one dropout there is that of the shares
    return Way(
        block,
        block.get_submodule(attention),
        **modules,
        norms=(norms[0], norms[1]),  # type: ignore[arg-type]
        activation=activation,
        head_width=width,
        dropouts=(beside["query"], beside["attention_output"], beside["mlp_down"]),
    )


_NAMES: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


def _dropout_beside(block: nn.Module, path: str) -> nn.Module | None:
    """The dropout that stands in the same module as a part."""
    parent = block.get_submodule(path.rpartition(".")[0])
    return next((module for module in parent.children() if isinstance(module, nn.Dropout)), None)
