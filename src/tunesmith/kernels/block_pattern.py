"""The parts of a transformer block, found by the roles of its modules, and the check that it has no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from tunesmith.kernels.ops.attention import AttentionGroups, attend
from tunesmith.kernels.ops.dropout import keep_scale
from tunesmith.kernels.ops.elementwise import ACTIVATIONS, Activation, glu, rope
from tunesmith.kernels.ops.grad_buffers import GradBuffers
from tunesmith.kernels.ops.linear import apply_linears

__all__ = ["AttentionPart", "BlockInputs", "BlockPattern", "EncoderStates", "Roles", "UnsupportedBlock", "match_block"]

Roles = Mapping[str, Sequence[str]]

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Name in transformers' configs -> `Activation`."""


class UnsupportedBlock(Exception):
    """A block that does not match a pattern; the message is the reason."""


@dataclass(frozen=True)
class DropoutPart:
    """A dropout probability: `p` of an `nn.Dropout`, or an attribute of another module. It is 0 without a module."""

    module: nn.Module | None = None
    name: str = "p"

    @property
    def in_training(self) -> float:
        """Probability in training mode."""
        return float(getattr(self.module, self.name)) if self.module is not None else 0.0

    @property
    def p(self) -> float:
        """Probability in the module's current mode."""
        return self.in_training if self.module is not None and self.module.training else 0.0


@dataclass(frozen=True)
class BlockInputs:
    """Inputs of a block in addition to its hidden states."""

    groups: AttentionGroups
    positions: Tensor | None = None
    """Positions of the query tokens; None if all tokens are queries."""

    cos_sin: tuple[Tensor, Tensor] | None = None
    """Cosine and sine of the rotary position embedding."""

    relative_bias: Tensor | None = None
    encoder: EncoderStates | None = None


@dataclass(frozen=True)
class EncoderStates:
    """Encoder states that a decoder block attends to."""

    states: Tensor  # (total, width)
    groups: AttentionGroups


@dataclass(frozen=True)
class AttentionPart:
    """Projections and settings of one attention module."""

    module: nn.Module
    """Parent of the query projection, and of a prefix if there is one."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    """The same module as `query` and `key` if the three projections are fused."""

    output: nn.Module
    width: int
    """Width of a head."""

    num_heads: int
    """Number of query heads."""

    dropout: DropoutPart
    """Dropout on the attention weights."""

    buffers: GradBuffers

    def __call__(self, queries: Tensor, x: Tensor, inputs: BlockInputs) -> Tensor:
        """Return W_o attend(...) for the query tokens; keys and values are projections of x.  # (queries, width)"""
        positions = inputs.positions
        if self.query is self.key:
            (fused,) = self._apply(x, self.query)
            keys = (fused.shape[1] - self.num_heads * self.width) // 2
            q, k, v = fused.split([self.num_heads * self.width, keys, keys], 1)
            q = q if positions is None else q.index_select(0, positions)
        elif queries is x:
            q, k, v = self._apply(x, self.query, self.key, self.value)
        else:
            (q,), (k, v) = self._apply(queries, self.query), self._apply(x, self.key, self.value)
        if inputs.cos_sin is not None:
            cos, sin = (one.flatten(0, -2).to(x.dtype) for one in inputs.cos_sin)
            k = rope(k, cos, sin)
            q = rope(q, *((cos, sin) if positions is None else (cos[positions], sin[positions])))
        prefix: Any = getattr(self.module, "prefix", None)
        scaling = getattr(self.module, "scaling", None)
        output = attend(
            q,
            k,
            v,
            inputs.groups,
            width=self.width,
            scaling=self.width**-0.5 if scaling is None else scaling,
            dropout=self.dropout.p,
            prefix=None if prefix is None else prefix(),
            bias=inputs.relative_bias,
        )
        return self._apply(output, self.output)[0]

    def _apply(self, x: Tensor, *modules: nn.Module) -> tuple[Tensor, ...]:
        return apply_linears(x, *modules, buffers=self.buffers)


@dataclass(frozen=True)
class BlockPattern:
    """The parts of one block. A subclass implements its formula."""

    is_pre_norm: ClassVar[bool]
    """True if the norms come before attention and MLP. Only such blocks may have a gated MLP."""

    block: nn.Module
    attention: AttentionPart
    cross_attention: AttentionPart | None
    mlp_up: nn.Module
    mlp_gate: nn.Module | None
    mlp_down: nn.Module
    norms: tuple[Any, ...]
    activation: Activation
    dropouts: tuple[DropoutPart, DropoutPart, DropoutPart]
    """Dropout on the attention output, inside the MLP, and on the MLP output."""

    buffers: GradBuffers

    def __call__(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """Return the output of the block.  # (total, width) -> (queries, width)"""
        raise NotImplementedError

    def mlp(self, x: Tensor) -> Tensor:
        """Return the output of the MLP.  # (queries, width) -> (queries, width)"""
        if self.mlp_gate is not None:
            if self.mlp_gate is self.mlp_up:
                gate, up = self._apply(x, self.mlp_up)[0].chunk(2, 1)
            else:
                gate, up = self._apply(x, self.mlp_gate, self.mlp_up)
            y = glu(gate, up, self.activation)
            p = self.dropouts[1].p
            return self._apply(y * keep_scale(y, p) if p else y, self.mlp_down)[0]
        (up,) = self._apply(x, self.mlp_up)
        if p := self.dropouts[1].p:
            up = ACTIVATIONS[self.activation](up)
            return self._apply(up * keep_scale(up, p), self.mlp_down)[0]
        return self._apply(up, self.mlp_down, activation=self.activation)[0]

    def _apply(self, x: Tensor, *modules: nn.Module, activation: Activation = "none") -> tuple[Tensor, ...]:
        return apply_linears(x, *modules, activation=activation, buffers=self.buffers)


ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation", "activation_function", "dense_act_fn")
"""Keys of a model's config for the name of its activation."""

ATTENTION_EXTRAS = ("prefix", "relative_attention_bias")
"""Modules that an attention module may have in addition to its projections."""

Pattern = TypeVar("Pattern", bound=BlockPattern)


def match_block(model: Any, block: nn.Module, roles: Roles, kind: type[Pattern], buffers: GradBuffers) -> Pattern:
    """Return the parts of a block as a pattern of this kind; `roles` maps each role to module paths in the block.

    Raises:
        UnsupportedBlock: the block does not match the pattern.
    """
    config = model.config
    names = [name for key in ACTIVATION_KEYS if isinstance(name := getattr(config, key, None), str)]
    activation = next((_ACTIVATIONS[name] for name in names if name in _ACTIVATIONS), None)
    if activation is None:
        raise UnsupportedBlock(f"activation {names[0]} is not implemented" if names else "no known activation")
    modules = {role: [block.get_submodule(path) for path in paths] for role, paths in roles.items()}
    projections = [modules.get(role, []) for role in ("query", "key", "value", "attention_output")]
    mlp = [modules.get(role, []) for role in ("mlp_up", "mlp_down", *(["mlp_gate"] if "mlp_gate" in roles else []))]
    count = len(projections[0])
    if count not in (1, 2) or {len(one) for one in projections} != {count}:
        raise UnsupportedBlock("attention without query, key, value and output projections")
    if {len(one) for one in mlp} != {1}:
        raise UnsupportedBlock("MLP without one up and one down projection")
    if len({id(one[0]) for one in projections[:3]}) == 2:
        raise UnsupportedBlock("two of the query, key and value projections are fused")
    norms = modules.get("norm", [])
    if len(norms) != count + 1 or not _norms_match(norms, kind, roles):
        raise UnsupportedBlock(f"{len(norms)} norms of type {type(norms[0]).__name__ if norms else 'none'}")
    attentions = [block.get_submodule(path.rpartition(".")[0]) for path in roles["query"]]
    parts = [*chain(*projections, *mlp), *norms]
    called = {id(module) for part in chain(*projections, *mlp) for module in part.modules()} | {id(block)}
    for path, module in block.named_modules():  # hooks of a module run only if it is called
        if (module._forward_hooks or module._forward_pre_hooks) and id(module) not in called:
            raise UnsupportedBlock(f"hook on {path}")
    extras = [
        module for one in attentions for name in ATTENTION_EXTRAS if (module := getattr(one, name, None)) is not None
    ]
    known = {id(one) for module in chain(parts, extras) for one in module.parameters()}
    for name, parameter in block.named_parameters():
        if id(parameter) not in known:
            raise UnsupportedBlock(f"parameter {name} has no known role")
    on_weights, others = _dropouts(config, block, roles, attentions, parts)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention_parts = [
        AttentionPart(module, q, k, v, out, getattr(module, "head_dim", width), config.num_attention_heads, p, buffers)
        for module, q, k, v, out, p in zip(attentions, *projections, on_weights, strict=True)
    ]
    return kind(
        block,
        attention=attention_parts[0],
        cross_attention=attention_parts[1] if count == 2 else None,
        mlp_up=mlp[0][0],
        mlp_down=mlp[1][0],
        mlp_gate=mlp[2][0] if mlp[2:] else None,
        norms=tuple(norms),
        activation=activation,
        dropouts=others,
        buffers=buffers,
    )


def _norms_match(norms: Sequence[Any], kind: type[BlockPattern], roles: Roles) -> bool:
    """Return whether the norms fit the pattern. The first norm of ModernBERT is an identity."""
    gated = "mlp_gate" in roles
    if all(type(norm) in (nn.LayerNorm, nn.Identity) for norm in norms):
        return not (gated and not kind.is_pre_norm) and not (kind.is_pre_norm and "last_norm" in roles)
    rms = all(getattr(norm, "weight", None) is not None and not hasattr(norm, "bias") for norm in norms)
    return rms and kind.is_pre_norm


_Dropouts = tuple[list[DropoutPart], tuple[DropoutPart, DropoutPart, DropoutPart]]


def _dropouts(
    config: Any, block: nn.Module, roles: Roles, attentions: Sequence[nn.Module], parts: Sequence[nn.Module]
) -> _Dropouts:
    """Return the dropout on each attention's weights, and the three of `BlockPattern`.

    Raises:
        UnsupportedBlock: the block has another dropout, which the pattern would not apply.
    """
    on_weights = [_dropouts_in(attention)[0] for attention in attentions]
    if getattr(config, "attention_dropout", None) and any(one.module is None for one in on_weights):
        raise UnsupportedBlock("attention dropout in an unknown place")
    if (layered := _dropouts_of_layers(block, roles)) is not None:
        *of_sums, inside, of_mlp = layered
        if len({one.in_training for one in of_sums}) != 1:
            raise UnsupportedBlock("self-attention and cross-attention have different dropout")
        _refuse_other_dropout(block, parts, [*on_weights, *layered])
        return on_weights, (of_sums[0], inside, of_mlp)
    homes = [block.get_submodule(roles[role][0].rpartition(".")[0]) for role in ("attention_output", "mlp_down")]
    in_block, in_attention = _dropouts_in(block), _dropouts_in(attentions[0])[1:]
    output = ([*in_attention, *in_block] if homes[0] is attentions[0] else _dropouts_in(homes[0]))[0]
    of_mlp = _dropouts_in(homes[1])[0]
    inside = DropoutPart(block, "activation_dropout") if hasattr(block, "activation_dropout") else DropoutPart()
    others = (output, inside, of_mlp)
    if "mlp_gate" in roles:  # such blocks have no other dropout than that on attention weights
        others = (DropoutPart(), DropoutPart(), DropoutPart())
    elif of_mlp.module is None:
        raise UnsupportedBlock("no dropout after the MLP")
    _refuse_other_dropout(block, parts, [*on_weights, *others])
    return on_weights, others


def _dropouts_of_layers(block: nn.Module, roles: Roles) -> list[DropoutPart] | None:
    """Return the dropouts of a block with one sub-layer per residual sum (T5); None for any other block.

    They are that of each attention sub-layer, that inside the MLP, and that of the MLP sub-layer.
    """
    mlp = roles["mlp_down"][0].rpartition(".")[0]
    layers = [path.rpartition(".")[0] for path in (*(path.rpartition(".")[0] for path in roles["query"]), mlp)]
    if not all(layers):
        return None
    of_layers = [_dropouts_in(block.get_submodule(path))[0] for path in layers]
    if any(one.module is None for one in of_layers):
        return None
    return [*of_layers[:-1], _dropouts_in(block.get_submodule(mlp))[0], of_layers[-1]]


def _dropouts_in(module: nn.Module) -> list[DropoutPart]:
    """Return a module's attribute `dropout` if it is a number, else its dropout children, else one dropout of 0."""
    if isinstance(getattr(module, "dropout", None), int | float):
        return [DropoutPart(module, "dropout")]
    return [DropoutPart(child) for child in module.children() if isinstance(child, nn.Dropout)] or [DropoutPart()]


def _refuse_other_dropout(block: nn.Module, parts: Sequence[nn.Module], placed: Sequence[DropoutPart]) -> None:
    inside = {id(module) for part in parts for module in part.modules()}
    known = {(id(one.module), one.name) for one in placed}
    for path, module in block.named_modules():
        if id(module) in inside:
            continue
        names = [
            name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float) and value
        ]
        names += ["p"] if isinstance(module, nn.Dropout) and module.p else []
        for name in names:
            if (id(module), name) not in known:
                raise UnsupportedBlock(f"dropout at {path}.{name}".replace(" .", " "))
