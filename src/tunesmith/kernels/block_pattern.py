"""What a block is made of, and how it is recognised: by the roles of its parts, and by having nothing beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from tunesmith.kernels.ops.attention import Together, attend
from tunesmith.kernels.ops.dropout import keep_scale
from tunesmith.kernels.ops.glu import gated
from tunesmith.kernels.ops.linear import ACTIVATIONS, Activation, mapped
from tunesmith.kernels.ops.rope import rotated

__all__ = ["Heads", "Parts", "Roles", "parts_of"]

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


@dataclass(frozen=True)
class Dropped:
    """A share of dropout, as `nn.Dropout` has it or as a bare number of a module; without one, none."""

    module: nn.Module | None = None
    name: str = "p"

    @property
    def in_training(self) -> float:
        """What is dropped in training."""
        return float(getattr(self.module, self.name)) if self.module is not None else 0.0

    @property
    def share(self) -> float:
        """What is dropped now."""
        return self.in_training if self.module is not None and self.module.training else 0.0


@dataclass(frozen=True)
class Around:
    """What a block is given beside the states of its tokens."""

    together: Together
    places: Tensor | None = None
    """Of the tokens that ask; None where all do."""

    angles: tuple[Tensor, Tensor] | None = None
    distances: Tensor | None = None
    """What a distance adds to scores (`distances.py`)."""

    encoded: Encoded | None = None


@dataclass(frozen=True)
class Encoded:
    """What a decoder's block sees of its encoder."""

    states: Tensor  # (total, width)
    together: Together


@dataclass(frozen=True)
class Heads:
    """The maps of one attention, and what of it is not a module."""

    module: nn.Module
    """What holds the query's map, and a prefix where there is one."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    """One map may be all three."""

    output: nn.Module
    width: int
    """Of a head."""

    heads: int
    """How many ask."""

    dropped: Dropped
    """Of the shares."""

    def attended(self, asked: Tensor, x: Tensor, around: Around) -> Tensor:
        """W_o attend(...) of the tokens that ask, some of x or of another row.  # (asking, width)"""
        places = around.places
        if self.query is self.key:
            (all_three,) = mapped(x, self.query)
            keys = (all_three.shape[1] - self.heads * self.width) // 2
            q, k, v = all_three.split([self.heads * self.width, keys, keys], 1)
            q = q if places is None else q.index_select(0, places)
        elif asked is x:
            q, k, v = mapped(x, self.query, self.key, self.value)
        else:
            (q,), (k, v) = mapped(asked, self.query), mapped(x, self.key, self.value)
        if around.angles is not None:
            cos, sin = (one.flatten(0, -2).to(x.dtype) for one in around.angles)
            k = rotated(k, cos, sin)
            q = rotated(q, *((cos, sin) if places is None else (cos[places], sin[places])))
        prefix: Any = getattr(self.module, "prefix", None)
        scaling = getattr(self.module, "scaling", None)
        seen = attend(
            q,
            k,
            v,
            around.together,
            width=self.width,
            scaling=self.width**-0.5 if scaling is None else scaling,
            dropout=self.dropped.share,
            prefix=None if prefix is None else prefix(),
            distances=around.distances,
        )
        return mapped(seen, self.output)[0]


@dataclass(frozen=True)
class Parts:
    """The maps of one block, and what of it is not a module."""

    norms_before: ClassVar[bool]
    """Whether norms stand before the sums; gates stand in such blocks alone."""

    block: nn.Module
    attention: Heads
    across: Heads | None
    """The attention to an encoder's states."""

    mlp_up: nn.Module
    mlp_gate: nn.Module | None
    mlp_down: nn.Module
    norms: tuple[Any, ...]
    activation: Activation
    dropouts: tuple[Dropped, Dropped, Dropped]
    """Of what attention gives, of what is inside the MLP, of what the MLP gives."""

    def mlp(self, x: Tensor) -> Tensor:
        """(asking, width) -> (asking, width)."""
        if self.mlp_gate is not None:
            if self.mlp_gate is self.mlp_up:
                gate, up = mapped(x, self.mlp_up)[0].chunk(2, 1)
            else:
                gate, up = mapped(x, self.mlp_gate, self.mlp_up)
            y = gated(gate, up, self.activation)
            share = self.dropouts[1].share
            return mapped(y * keep_scale(y, share) if share else y, self.mlp_down)[0]
        (up,) = mapped(x, self.mlp_up)
        if share := self.dropouts[1].share:
            up = ACTIVATIONS[self.activation](up)
            return mapped(up * keep_scale(up, share), self.mlp_down)[0]
        return mapped(up, self.mlp_down, activation=self.activation)[0]


ACTIVATION_NAMES = ("hidden_act", "hidden_activation", "activation", "activation_function", "dense_act_fn")
"""In a model's config."""

BESIDE = ("prefix", "relative_attention_bias")
"""What an attention may have beside its maps."""

Kind = TypeVar("Kind", bound=Parts)


def parts_of(model: Any, block: nn.Module, roles: Roles, kind: type[Kind]) -> Kind | None:
    """The parts of a block, where they are those of the formula `kind` and it has no others.

    `roles` are the paths inside the block.
    """
    settings = model.config
    names = (getattr(settings, name, None) for name in ACTIVATION_NAMES)
    activation = next((_ACTIVATIONS.get(name) for name in names if isinstance(name, str)), None)
    modules = {role: [block.get_submodule(path) for path in paths] for role, paths in roles.items()}
    maps = [modules.get(role, []) for role in ("query", "key", "value", "attention_output")]
    single = [modules.get(role, []) for role in ("mlp_up", "mlp_down", *(["mlp_gate"] if "mlp_gate" in roles else []))]
    heads = len(maps[0])
    if activation is None or heads not in (1, 2) or {len(one) for one in maps} != {heads}:
        return None
    if {len(one) for one in single} != {1} or len({id(one[0]) for one in maps[:3]}) == 2:
        return None
    norms = modules.get("norm", [])
    if len(norms) != heads + 1 or not _norms_fit(norms, kind, roles):
        return None
    attentions = [block.get_submodule(path.rpartition(".")[0]) for path in roles["query"]]
    parts = [*chain(*maps, *single), *norms]
    called = {id(module) for part in chain(*maps, *single) for module in part.modules()} | {id(block)}
    if any((one._forward_hooks or one._forward_pre_hooks) and id(one) not in called for one in block.modules()):
        return None  # what a hook does to a module that is not called would be lost: an adapter around a norm
    beside = [module for one in attentions for name in BESIDE if (module := getattr(one, name, None)) is not None]
    known = chain(parts, beside)
    if {id(one) for one in block.parameters()} - {id(one) for module in known for one in module.parameters()}:
        return None
    dropouts = _dropouts(settings, block, roles, attentions, parts)
    if dropouts is None:
        return None
    of_shares, others = dropouts
    width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    found = [
        Heads(attention, q, k, v, output, getattr(attention, "head_dim", width), settings.num_attention_heads, dropped)
        for attention, q, k, v, output, dropped in zip(attentions, *maps, of_shares, strict=True)
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
        dropouts=others,
    )


def _norms_fit(norms: Sequence[Any], kind: type[Parts], roles: Roles) -> bool:
    """Whether the formula has such norms; the first of ModernBERT is none."""
    gate = "mlp_gate" in roles
    if all(type(norm) in (nn.LayerNorm, nn.Identity) for norm in norms):
        return not (gate and not kind.norms_before) and not (kind.norms_before and "last_norm" in roles)
    plain = all(getattr(norm, "weight", None) is not None and not hasattr(norm, "bias") for norm in norms)
    return plain and kind.norms_before


def _dropouts(
    settings: Any, block: nn.Module, roles: Roles, attentions: Sequence[nn.Module], parts: Sequence[nn.Module]
) -> tuple[list[Dropped], tuple[Dropped, Dropped, Dropped]] | None:
    """The dropout of each attention's shares, and the three of `Parts`; None where there is any elsewhere."""
    of_shares = [_dropouts_in(attention)[0] for attention in attentions]
    if getattr(settings, "attention_dropout", None) and any(one.module is None for one in of_shares):
        return None
    if (found := _dropouts_of_layers(block, roles)) is not None:
        *of_sums, inside, of_mlp = found
        known = _dropouts_known(block, parts, [*of_shares, *found]) and len({one.in_training for one in of_sums}) == 1
        return (of_shares, (of_sums[0], inside, of_mlp)) if known else None
    homes = [block.get_submodule(roles[role][0].rpartition(".")[0]) for role in ("attention_output", "mlp_down")]
    in_block, in_attention = _dropouts_in(block), _dropouts_in(attentions[0])[1:]
    output = ([*in_attention, *in_block] if homes[0] is attentions[0] else _dropouts_in(homes[0]))[0]
    of_mlp = _dropouts_in(homes[1])[0]
    inside = Dropped(block, "activation_dropout") if hasattr(block, "activation_dropout") else Dropped()
    others = (output, inside, of_mlp)
    if "mlp_gate" in roles:  # such blocks have none but that of the shares, or it is nowhere known
        others = (Dropped(), Dropped(), Dropped())
    elif of_mlp.module is None:
        return None
    return (of_shares, others) if _dropouts_known(block, parts, [*of_shares, *others]) else None


def _dropouts_of_layers(block: nn.Module, roles: Roles) -> list[Dropped] | None:
    """Where attention and MLP stand in a layer each, with the dropout of its sum (T5): those of the attentions' layers,
    that inside the MLP, that of its layer.
    """
    mlp = roles["mlp_down"][0].rpartition(".")[0]
    layers = [path.rpartition(".")[0] for path in (*(path.rpartition(".")[0] for path in roles["query"]), mlp)]
    if not all(layers):
        return None
    of_layers = [_dropouts_in(block.get_submodule(path))[0] for path in layers]
    if any(one.module is None for one in of_layers):
        return None
    return [*of_layers[:-1], _dropouts_in(block.get_submodule(mlp))[0], of_layers[-1]]


def _dropouts_in(module: nn.Module) -> list[Dropped]:
    """The dropouts that stand in a module, or its share as a number; one that drops nothing where there is none."""
    if isinstance(getattr(module, "dropout", None), int | float):
        return [Dropped(module, "dropout")]
    return [Dropped(child) for child in module.children() if isinstance(child, nn.Dropout)] or [Dropped()]


def _dropouts_known(block: nn.Module, parts: Sequence[nn.Module], placed: Sequence[Dropped]) -> bool:
    """Whether a block's dropout is all where the formula has it: elsewhere it would be lost."""
    inside = {id(module) for part in parts for module in part.modules()}
    known = {(id(one.module), one.name) for one in placed}
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
