"""Blocks in few passes over memory, for models that compute without padding.

Norms after the sums (BERT, Devlin 2019, arXiv 1810.04805; BART, Lewis 2020, arXiv 1910.13461):

    h = norm(x + D (W_o attend(W_q x, W_k x, W_v x)))        z = norm(h + D (W_down f(W_up h)))

Norms before them (mBART, Liu 2020, arXiv 2001.08210), with rotations R and a gate (LLaMA, Touvron 2023, arXiv
2302.13971):

    n = norm(x)    h = x + D (W_o attend(R W_q n, R W_k n, W_v n))    m = norm(h)    z = h + D (W_down f(W_up m))
                                                                          or z = h + W_down (f(W_gate m) * W_up m)

A decoder's block has a second attention, whose keys and values are maps of the encoder's states, and a norm of its own,
between the two parts. The block's modules stay where they are and say what is multiplied; only the way through them is
another, and only while the block computes without padding. A block is known by its parts' roles, and taken when its
answer stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.kernels.attention import Together, attend
from tunesmith.kernels.dropout import keep_scale
from tunesmith.kernels.gates import gated
from tunesmith.kernels.layout import Layout
from tunesmith.kernels.linears import ACTIVATIONS, Activation, compute_dtype, linears, part_of
from tunesmith.kernels.norms import add_norm, add_rms_norm, rms_norm
from tunesmith.kernels.padding_free import across_in, argument_names, layout_in, same_answers
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
    "swish": "silu",
}
"""By transformers' names."""

STATES = "encoder_hidden_states"
"""The name under which a decoder's block is given its encoder's states."""


@dataclass(frozen=True)
class Dropped:
    """A share of dropout, as `nn.Dropout` has it or as a bare number of a module."""

    module: nn.Module
    name: str = "p"

    def share(self) -> float:
        """What is dropped now."""
        return float(getattr(self.module, self.name)) if self.module.training else 0.0


@dataclass(frozen=True)
class Heads:
    """The maps of one attention, and what of it is not a module."""

    module: nn.Module
    """What holds the query's map, and a prefix where there is one."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    width: int
    """Of a head."""

    dropped: Dropped | None
    """Of the shares."""

    def attended(
        self,
        asked: Tensor,
        x: Tensor,
        together: Together,
        angles: tuple[Tensor, Tensor] | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """W_o attend(...) of the tokens that ask; with angles, these are those of x at `places`.  # (asking, width)"""
        if asked is x:
            q, k, v = _mapped(x, self.query, self.key, self.value)
        else:
            (q,), (k, v) = _mapped(asked, self.query), _mapped(x, self.key, self.value)
        if angles is not None:
            cos, sin = (one.flatten(0, -2).to(x.dtype) for one in angles)
            k = rotated(k, cos, sin)
            q = rotated(q, *((cos, sin) if places is None else (cos[places], sin[places])))
        prefix: Any = getattr(self.module, "prefix", None)
        scaling = getattr(self.module, "scaling", None)
        seen = attend(
            q,
            k,
            v,
            together,
            width=self.width,
            scaling=self.width**-0.5 if scaling is None else scaling,
            dropout=_share(self.dropped),
            prefix=None if prefix is None else prefix(),
        )
        return _mapped(seen, self.output)[0]


@dataclass(frozen=True)
class Encoded:
    """What a decoder's block sees of its encoder."""

    states: Tensor  # (total, width)
    together: Together


@dataclass(frozen=True)
class Parts:
    """The maps of one block, and what of it is not a module."""

    block: nn.Module
    attention: Heads
    across: Heads | None
    """The attention to an encoder's states."""

    mlp_up: nn.Module
    mlp_gate: nn.Module | None
    mlp_down: nn.Module
    norms: tuple[Any, ...]
    activation: Activation
    dropouts: tuple[Dropped | None, Dropped | None, Dropped | None]
    """Of what attention gives, of what is inside the MLP, of what the MLP gives."""

    def mlp(self, x: Tensor) -> Tensor:
        """(asking, width) -> (asking, width)."""
        if self.mlp_gate is not None:
            gate, up = _mapped(x, self.mlp_gate, self.mlp_up)
            return _mapped(gated(gate, up, self.activation), self.mlp_down)[0]
        (up,) = _mapped(x, self.mlp_up)
        if share := _share(self.dropouts[1]):
            up = ACTIVATIONS[self.activation](up)
            return _mapped(up * keep_scale(up, share), self.mlp_down)[0]
        return _mapped(up, self.mlp_down, activation=self.activation)[0]


class NormsAfter(Parts):
    """The first of the module's formulas."""

    def __call__(
        self,
        x: Tensor,
        together: Together,
        places: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
        encoded: Encoded | None,
    ) -> Tensor:
        """(total, width) -> (asking, width)."""
        share = _share(self.dropouts[0])
        asked = x if places is None else x.index_select(0, places)
        _, h = _added(asked, self.attention.attended(asked, x, together, angles, places), self.norms[0], share)
        if self.across is not None and encoded is not None:
            _, h = _added(h, self.across.attended(h, encoded.states, encoded.together), self.norms[1], share)
        return _added(h, self.mlp(h), self.norms[-1], _share(self.dropouts[2]))[1]


class NormsBefore(Parts):
    """The second."""

    def __call__(
        self,
        x: Tensor,
        together: Together,
        places: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
        encoded: Encoded | None,
    ) -> Tensor:
        """(total, width) -> (asking, width)."""
        share, n = _share(self.dropouts[0]), _normed(x, self.norms[0])
        asked, x = (n, x) if places is None else (n.index_select(0, places), x.index_select(0, places))
        h, m = _added(x, self.attention.attended(asked, n, together, angles, places), self.norms[1], share)
        if self.across is not None and encoded is not None:
            h, m = _added(h, self.across.attended(m, encoded.states, encoded.together), self.norms[2], share)
        y, share = self.mlp(m), _share(self.dropouts[2])
        return torch.addcmul(h, y, keep_scale(y, share)) if share else h + y


def _mapped(x: Tensor, *modules: nn.Module, activation: Activation = "none") -> tuple[Tensor, ...]:
    """What maps of one input give; a module that is no `Part` is called as it is."""
    parts = [part_of(module) for module in modules]
    if all(part is not None for part in parts):
        return linears(x, parts, activation)  # type: ignore[arg-type]
    x = ACTIVATIONS[activation](x)
    return tuple(module(x[None])[0].to(x.dtype) for module in modules)


def _normed(x: Tensor, norm: Any) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return rms_norm(x, norm.weight, _eps(norm))


def _added(x: Tensor, y: Tensor, norm: Any, dropout: float) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    if isinstance(norm, nn.LayerNorm):
        return add_norm(x, y, norm.weight, norm.bias, norm.eps, dropout)
    return add_rms_norm(x, y, norm.weight, _eps(norm))


def _share(dropped: Dropped | None) -> float:
    return 0.0 if dropped is None else dropped.share()


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def use_blocks(model: Any, blocks: Sequence[nn.Module], roles: Sequence[Roles]) -> bool:
    """Let a model's padding-free blocks go one of these ways, in place; whether they do.

    `roles` are the paths inside each block. All blocks are taken, or none.
    """
    for kind in (NormsAfter, NormsBefore):
        ways = [way for block, own in zip(blocks, roles, strict=True) if (way := _way(model, block, own, kind))]
        if ways and len(ways) == len(blocks) and _taken(model, ways):
            return True
    return False


def _taken(model: Any, ways: Sequence[NormsAfter | NormsBefore]) -> bool:
    """Whether the model's answers stay the same; then its blocks go these ways."""

    def take() -> None:
        for way in ways:
            way.block.forward = MethodType(_forward(way), way.block)

    def leave() -> None:
        for way in ways:
            del way.block.forward

    if not same_answers(model, take, leave):
        return False
    if model.config.is_encoder_decoder:
        return True
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
    names = argument_names(plain)
    place = names.index(STATES) - 1 if STATES in names else None

    def forward(block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout, across = layout_in(args, kwargs), across_in(args, kwargs)
        states = kwargs.get(STATES) if place is None or place >= len(args) else args[place]
        if layout is None or hidden_states.shape[0] != 1 or (across is None) != (states is None):
            return plain(block, hidden_states, *args, **kwargs)

        def computed(hidden_states: Tensor, states: Tensor | None) -> Tensor:
            dtype = compute_dtype(hidden_states)
            x = hidden_states[0].to(dtype)
            seen = None if states is None or across is None else Encoded(states[0].to(dtype), across.together)
            wanted = None if tail is None else tail.read_of(layout)
            places, together = (None, layout.together) if wanted is None else asking(layout, wanted)
            out = way(x, together, places, kwargs.get("position_embeddings"), seen)
            return out if places is None else out.new_zeros(layout.total, out.shape[1]).index_copy(0, places, out)

        # since 5.2x transformers checkpoints in the class's `forward`, which this one stands in the place of
        again = getattr(block, "gradient_checkpointing", False) and block.training and hasattr(plain, "__wrapped__")
        call = block._gradient_checkpointing_func if again else _called
        out = call(computed, hidden_states, states)
        if recorded is not None:
            out = out.detach().requires_grad_()
            recorded.append((out, layout))
        return out[None]

    return forward


def _called(computed: Any, *given: Any) -> Any:
    return computed(*given)


def _way(
    model: Any, block: nn.Module, roles: Roles, kind: type[NormsAfter] | type[NormsBefore]
) -> NormsAfter | NormsBefore | None:
    """The parts of a block, where they are those of the formula and it has no others."""
    settings = model.config
    names = (getattr(settings, name, None) for name in ("hidden_act", "activation", "activation_function"))
    activation = next((_ACTIVATIONS.get(name) for name in names if isinstance(name, str)), None)
    modules = {role: [block.get_submodule(path) for path in paths] for role, paths in roles.items()}
    maps = [modules.get(role, []) for role in ("query", "key", "value", "attention_output")]
    single = [modules.get(role, []) for role in ("mlp_up", "mlp_down", *(["mlp_gate"] if "mlp_gate" in roles else []))]
    heads = len(maps[0])
    if activation is None or heads not in (1, 2) or {len(one) for one in maps} != {heads}:
        return None
    if {len(one) for one in single} != {1} or maps[0][0] is maps[1][0]:
        return None
    norms = modules.get("norm", [])
    if len(norms) != heads + 1 or not _norms_fit(norms, kind, roles):
        return None
    attentions = [block.get_submodule(path.rpartition(".")[0]) for path in roles["query"]]
    parts = [*chain(*maps, *single), *norms]
    known = chain(parts, (getattr(attention, "prefix", nn.Identity()) for attention in attentions))
    if {id(one) for one in block.parameters()} - {id(one) for module in known for one in module.parameters()}:
        return None
    of_shares = [_dropout_in(attention) for attention in attentions]
    homes = [block.get_submodule(roles[role][0].rpartition(".")[0]) for role in ("attention_output", "mlp_down")]
    beside = [_dropout_in(block if home is attentions[0] else home) for home in homes]
    inside = Dropped(block, "activation_dropout") if hasattr(block, "activation_dropout") else None
    dropouts = (beside[0], inside, beside[1])
    if None in of_shares and getattr(settings, "attention_dropout", None):
        return None
    if isinstance(norms[0], nn.LayerNorm):
        placed = [*of_shares, *dropouts]
        if beside[1] is None:
            return None
    else:
        placed, dropouts = [*of_shares], (None, None, None)
    if not _dropouts_known(block, parts, placed):
        return None
    width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    found = [
        Heads(attention, query, key, value, output, getattr(attention, "head_dim", width), dropped)
        for attention, query, key, value, output, dropped in zip(attentions, *maps, of_shares, strict=True)
    ]
    return kind(
        block,
        attention=found[0],
        across=found[1] if heads == 2 else None,
        mlp_up=single[0][0],
        mlp_down=single[1][0],
        mlp_gate=single[2][0] if single[2:] else None,
        norms=tuple(norms),
        activation=activation,
        dropouts=dropouts,
    )


def _norms_fit(norms: Sequence[Any], kind: type[NormsAfter] | type[NormsBefore], roles: Roles) -> bool:
    """Whether the formula has such norms."""
    if any(norm._forward_hooks or norm._forward_pre_hooks for norm in norms):
        return False  # an adapter around a norm
    if all(type(norm) is nn.LayerNorm for norm in norms):
        return "mlp_gate" not in roles and not (kind is NormsBefore and "last_norm" in roles)
    plain = all(getattr(norm, "weight", None) is not None and not hasattr(norm, "bias") for norm in norms)
    return plain and kind is NormsBefore and "mlp_gate" in roles


def _dropout_in(module: nn.Module) -> Dropped | None:
    """The dropout that stands in a module, or its share as a number."""
    if isinstance(getattr(module, "dropout", None), float):
        return Dropped(module, "dropout")
    return next((Dropped(child) for child in module.children() if isinstance(child, nn.Dropout)), None)


def _dropouts_known(block: nn.Module, parts: Sequence[nn.Module], placed: Sequence[Dropped | None]) -> bool:
    """Whether a block's dropout is all where the formula has it: elsewhere it would be lost."""
    inside = {id(module) for part in parts for module in part.modules()}
    known = {(id(one.module), one.name) for one in placed if one is not None}
    for module in block.modules():
        if id(module) in inside:
            continue
        numbers = [
            name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float) and value
        ]
        numbers += ["p"] if isinstance(module, nn.Dropout) and module.p else []
        if any((id(module), name) not in known for name in numbers):
            return False
    return True
