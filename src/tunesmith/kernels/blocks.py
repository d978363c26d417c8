"""Blocks in few passes over memory, for models that compute without padding.

Norms after the sums (BERT, Devlin 2019, arXiv 1810.04805):

    h = norm(x + D (W_o attend(W_q x, W_k x, W_v x)))        z = norm(h + D (W_down f(W_up h)))

Norms before, with rotations and a gate (LLaMA, Touvron 2023, arXiv 2302.13971):

    n = norm(x)    h = x + W_o attend(R W_q n, R W_k n, W_v n)    m = norm(h)    z = h + W_down (f(W_gate m) * W_up m)

The block's modules stay where they are and say what is multiplied; only the way through them is another, and only while
the block computes without padding. A block is known by its parts' roles, and taken when its answer stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from tunesmith.kernels.attention import Together, attend
from tunesmith.kernels.gates import gated
from tunesmith.kernels.linears import ACTIVATIONS, Activation, compute_dtype, linears, part_of
from tunesmith.kernels.norms import add_norm, add_rms_norm, rms_norm
from tunesmith.kernels.padding_free import Layout, layout_in, same_answers
from tunesmith.kernels.rotation import rotated
from tunesmith.kernels.tail import Tail, asking, tail_of

__all__ = ["use_blocks"]

Roles = Mapping[str, Sequence[str]]

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
"""By transformers' names."""


@dataclass(frozen=True)
class Parts:
    """The maps of one block, and what of it is not a module."""

    block: nn.Module
    attention: nn.Module
    """What holds the query's map, and a prefix where there is one."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_output: nn.Module
    mlp_up: nn.Module
    mlp_gate: nn.Module | None
    mlp_down: nn.Module
    norms: tuple[Any, Any]
    activation: Activation
    width: int
    """Of a head."""

    dropouts: tuple[nn.Module | None, nn.Module | None, nn.Module | None]
    """Of the attention's shares, of the attention's output, of the MLP's."""

    def attended(
        self,
        x: Tensor,
        asked: Tensor,
        together: Together,
        angles: tuple[Tensor, Tensor] | None,
        places: Tensor | None,
    ) -> Tensor:
        """W_o attend(...) of the tokens that ask, which are those of x at `places`.  # (asking, width)"""
        if places is None:
            q, k, v = _mapped(x, self.query, self.key, self.value)
        else:
            (q,), (k, v) = _mapped(asked, self.query), _mapped(x, self.key, self.value)
        if angles is not None:
            cos, sin = (one.flatten(0, -2).to(x.dtype) for one in angles)
            k = rotated(k, cos, sin)
            q = rotated(q, *((cos, sin) if places is None else (cos[places], sin[places])))
        prefix: Any = getattr(self.attention, "prefix", None)
        scaling = getattr(self.attention, "scaling", None)
        seen = attend(
            q,
            k,
            v,
            together,
            width=self.width,
            scaling=self.width**-0.5 if scaling is None else scaling,
            dropout=_share(self.dropouts[0]),
            prefix=None if prefix is None else prefix(),
        )
        return _mapped(seen, self.attention_output)[0]


class NormsAfter(Parts):
    """The first of the module's formulas."""

    def __call__(
        self, x: Tensor, together: Together, places: Tensor | None, angles: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """(total, width) -> (asking, width)."""
        asked = x if places is None else x.index_select(0, places)
        y = self.attended(x, asked, together, angles, places)
        h = _added(asked, y, self.norms[0], _share(self.dropouts[1]))
        (u,) = _mapped(h, self.mlp_up)
        (y,) = _mapped(u, self.mlp_down, activation=self.activation)
        return _added(h, y, self.norms[1], _share(self.dropouts[2]))


class NormsBefore(Parts):
    """The second."""

    def __call__(
        self, x: Tensor, together: Together, places: Tensor | None, angles: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """(total, width) -> (asking, width)."""
        before, after = self.norms
        n = rms_norm(x, before.weight, _eps(before))
        asked, x = (n, x) if places is None else (n.index_select(0, places), x.index_select(0, places))
        h, m = add_rms_norm(x, self.attended(n, asked, together, angles, places), after.weight, _eps(after))
        assert self.mlp_gate is not None, "it has one"
        gate, up = _mapped(m, self.mlp_gate, self.mlp_up)
        return h + _mapped(gated(gate, up, self.activation), self.mlp_down)[0]


def _mapped(x: Tensor, *modules: nn.Module, activation: Activation = "none") -> tuple[Tensor, ...]:
    """What maps of one input give; a module that is no `Part` is called as it is."""
    parts = [part_of(module) for module in modules]
    if all(part is not None for part in parts):
        return linears(x, parts, activation)  # type: ignore[arg-type]
    x = ACTIVATIONS[activation](x)
    return tuple(module(x[None])[0].to(x.dtype) for module in modules)


def _added(x: Tensor, y: Tensor, norm: nn.LayerNorm, dropout: float) -> Tensor:
    return add_norm(x, y, norm.weight, norm.bias, norm.eps, dropout)


def _share(dropout: nn.Module | None) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def use_blocks(model: Any, blocks: Sequence[nn.Module], roles: Sequence[Roles]) -> bool:
    """Let a model's padding-free blocks go one of these ways, in place; whether they do.

    `roles` are the paths inside each block. All blocks are taken, or none.
    """
    ways = [way for block, own in zip(blocks, roles, strict=True) if (way := _way(model, block, own)) is not None]
    if not ways or len(ways) < len(blocks):
        return False

    def take() -> None:
        for way in ways:
            way.block.forward = MethodType(_forward(way), way.block)

    def leave() -> None:
        for way in ways:
            del way.block.forward

    if not same_answers(model, take, leave):
        return False
    last, recorded = ways[-1], list[tuple[Tensor, Layout]]()
    last.block.forward = MethodType(_forward(last, recorded=recorded), last.block)
    model.block_tail = tail_of(model, recorded)
    if model.block_tail is not None:
        model.block_tail.watch(model)
    last.block.forward = MethodType(_forward(last, tail=model.block_tail), last.block)
    return True


def _forward(
    way: NormsAfter | NormsBefore, tail: Tail | None = None, recorded: list[tuple[Tensor, Layout]] | None = None
) -> Any:
    """The block's own forward; `recorded` keeps what it gives."""
    plain = type(way.block).forward

    def forward(block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout = layout_in(args, kwargs)
        if layout is None or hidden_states.shape[0] != 1:
            return plain(block, hidden_states, *args, **kwargs)

        def computed(hidden_states: Tensor) -> Tensor:
            x = hidden_states[0].to(compute_dtype(hidden_states))
            wanted = None if tail is None else tail.read_of(layout)
            places, together = (None, layout.together) if wanted is None else asking(layout, wanted)
            out = way(x, together, places, kwargs.get("position_embeddings"))
            return out if places is None else out.new_zeros(layout.total, out.shape[1]).index_copy(0, places, out)

        # since 5.2x transformers checkpoints in the class's `forward`, which this one stands in the place of
        again = getattr(block, "gradient_checkpointing", False) and block.training and hasattr(plain, "__wrapped__")
        out = block._gradient_checkpointing_func(computed, hidden_states) if again else computed(hidden_states)
        if recorded is not None:
            out = out.detach().requires_grad_()
            recorded.append((out, layout))
        return out[None]

    return forward


def _way(model: Any, block: nn.Module, roles: Roles) -> NormsAfter | NormsBefore | None:
    """The parts of a block, where they are those of one of the formulas and it has no others."""
    names = ["query", "key", "value", "attention_output", "mlp_up", "mlp_down"]
    names += ["mlp_gate"] if "mlp_gate" in roles else []
    settings = model.config
    activation = _ACTIVATIONS.get(str(getattr(settings, "hidden_act", getattr(settings, "activation", None))))
    if any(len(roles.get(name, ())) != 1 for name in names) or len(roles.get("norm", ())) != 2 or not activation:
        return None
    parts: dict[str, Any] = {name: block.get_submodule(roles[name][0]) for name in names}
    norms = [block.get_submodule(path) for path in roles["norm"]]
    known = {id(parameter) for module in (*parts.values(), *norms) for parameter in module.parameters()}
    attention = block.get_submodule(roles["query"][0].rpartition(".")[0])
    known |= {id(parameter) for parameter in getattr(attention, "prefix", nn.Identity()).parameters()}
    if any(id(parameter) not in known for parameter in block.parameters()):
        return None
    after = "last_norm" in roles
    if after != ("mlp_gate" not in roles) or after != all(type(norm) is nn.LayerNorm for norm in norms):
        return None
    if not after and any(getattr(norm, "weight", None) is None or hasattr(norm, "bias") for norm in norms):
        return None
    beside = [_dropout_beside(block, roles[name][0]) for name in ("query", "attention_output", "mlp_down")]
    if beside[1] is beside[0]:
        beside[1] = None  # DistilBERT: the one dropout there is that of the shares
    if not _dropouts_known(settings, block, parts, beside, after=after):
        return None
    width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    kind = NormsAfter if after else NormsBefore
    return kind(
        block,
        attention,
        **({"mlp_gate": None} | parts),
        norms=(norms[0], norms[1]),
        activation=activation,
        width=width,
        dropouts=(beside[0], beside[1], beside[2]),
    )


def _dropouts_known(
    settings: Any, block: nn.Module, parts: Mapping[str, nn.Module], beside: Sequence[nn.Module | None], *, after: bool
) -> bool:
    """Whether a block's dropout is all where the formula has it: elsewhere, or as a bare number, it would be lost."""
    number: float = getattr(settings, "attention_dropout", None) or 0.0
    if beside[0] is None and number:
        return False
    if after and beside[2] is None:
        return False
    placed = beside if after else beside[:1]
    inside = {id(module) for part in parts.values() for module in part.modules()}
    dropouts = [module for module in block.modules() if isinstance(module, nn.Dropout) and id(module) not in inside]
    return all(not module.p or any(module is one for one in placed) for module in dropouts)


def _dropout_beside(block: nn.Module, path: str) -> nn.Module | None:
    """The dropout that stands in the same module as a part."""
    parent = block.get_submodule(path.rpartition(".")[0])
    return next((module for module in parent.children() if isinstance(module, nn.Dropout)), None)
