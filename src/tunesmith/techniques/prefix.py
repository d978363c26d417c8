"""Prefix tuning: trained keys and values in front of those of the text, in every attention layer.

    Attention(Q, [P_K; K], [P_V; V])        (Li and Liang 2021, arXiv 2101.00190; with a head Liu 2022, 2110.07602)

The prefix is initialized with the model's keys and values for random tokens of its vocabulary: real activations, as the
paper recommends. With `reparameterize`, P = W_2 tanh(W_1 e) is trained instead, and P is saved. Positions of the text
start after the prefix. An encoder-decoder has the prefix in its decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.kernels.prefix import AttentionInputs, attention_inputs, use_prefixes
from tunesmith.models.anatomy import Anatomy
from tunesmith.models.load import first_position
from tunesmith.techniques import (
    OWN_TYPE,
    Technique,
    by_name,
    load_prompt_learning,
    modules_to_save,
    peft_task_type,
    prompt_learning_tensors,
    rate_by_width,
    set_trainable,
    stacks_for_peft,
    virtual_tokens_of,
)

LEARNING_RATE = 3e-2
"""Best of three on validation (sst2, one epoch, one seed) at hidden size 384: docs/techniques/prefix.md."""

REPARAMETERIZED_LEARNING_RATE = 3e-4
"""The same with `reparameterize`; at 1e-3 the model predicts only the majority class."""


class PrefixEncoder(nn.Module):
    """tanh(W_1 e): the part of a reparameterized prefix that all attention layers share."""

    def __init__(self, tokens: int, width: int, bottleneck: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, width))
        self.down = nn.Linear(width, bottleneck)

    def forward(self) -> Tensor:
        """Return the input of each layer's own projection."""  # (virtual tokens, bottleneck)
        return torch.tanh(self.down(self.weight))


class PrefixStates(nn.Module):
    """Prefix of one attention layer: keys and values trained directly, or projected from a shared encoder."""

    def __init__(self, start: Tensor, shared: PrefixEncoder | None, relative: nn.Module | None) -> None:
        super().__init__()
        self.shape = tuple(start.shape)  # (2, kv heads, virtual tokens, width)
        self.enabled = True
        self.relative = (relative,)  # module of T5's relative bias in another block; a tuple, so not registered here
        self.shared = shared
        if shared is None:
            self.states = nn.Parameter(start.detach().float())
        else:
            self.up = nn.Linear(shared.down.out_features, start.numel() // start.shape[2])

    def forward(self) -> Tensor:
        """Return keys and values; empty while disabled."""  # (2, kv heads, virtual tokens, width)
        return self._states()[:, :, : self.tokens]

    @property
    def tokens(self) -> int:
        """Number of virtual tokens; 0 while disabled."""
        return self.shape[2] if self.enabled else 0

    def _states(self) -> Tensor:
        if self.shared is None:
            return self.states
        _, heads, tokens, width = self.shape
        with torch.autocast(self.up.weight.device.type, enabled=False):  # in fp32, as it is saved
            states: Tensor = self.up(self.shared())
        return states.view(tokens, 2, heads, width).permute(1, 2, 0, 3)

    def replace(self, states: Tensor) -> None:
        """Set keys and values, which are trained directly from now on."""
        self.shape, self.shared = tuple(states.shape), None
        if hasattr(self, "up"):
            del self.up
        self.states = nn.Parameter(states.float().clone())

    def bias(self, queries: int, keys: int) -> Tensor:
        """Return T5's relative bias of each query for each virtual token."""  # (1, heads, queries, virtual tokens)
        relative: Any = self.relative[0]
        tokens = self.tokens
        bias: Tensor = relative.compute_bias(queries, tokens + keys, past_seen_tokens=tokens)
        return bias[..., :tokens]


class Prefix(Technique):
    """Trained keys and values in front of those of the text, in every attention layer (Li 2021, arXiv 2101.00190).

    Trains 2 n d_kv parameters per attention layer for n virtual tokens, and the new head. With a head it is
    P-tuning v2.
    Use it where a soft prompt is too weak; it is also cheaper, as sequences do not grow. It cannot be merged.
    """

    artifact: ClassVar[Literal["adapter", "model"]] = "adapter"
    starts_as_base: ClassVar[bool] = False
    cannot_merge: ClassVar[str] = "it is part of the attention's input, not of a weight"

    num_virtual_tokens: int = Field(20, ge=1, description="number of keys and values per attention layer")
    reparameterize: int | None = Field(
        None, ge=1, description="train them through a two-layer network of this width, which is dropped after training"
    )

    @property
    def virtual_tokens(self) -> int:
        """Number of positions before the text."""
        return self.num_virtual_tokens

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Return a direct and a reparameterized prefix."""
        return [{"num_virtual_tokens": 5}, {"num_virtual_tokens": 5, "reparameterize": 16}]

    def apply(self, model: Any, anatomy: Anatomy, processor: Any) -> None:
        """Add keys and values to every attention layer."""
        modules_to_save(anatomy)
        body = model.get_submodule(anatomy.backbone)
        recorded = self._record(model, body, len(processor), anatomy)
        shared = None
        if self.reparameterize:
            shared = PrefixEncoder(self.num_virtual_tokens, anatomy.hidden_size, self.reparameterize)
        modules: list[Any] = [model.get_submodule(layer.path) for layer in recorded]
        relative = next((module for module in modules if getattr(module, "has_relative_attention_bias", False)), None)
        for layer, module in zip(recorded, modules, strict=True):
            start = torch.stack([layer.key, layer.value])
            columns = torch.arange(self.num_virtual_tokens) % start.shape[2]
            module.prefix = PrefixStates(start[:, :, columns], shared, relative)
        use_prefixes(model)
        if "position_ids" in signature(body.forward).parameters:
            body.register_forward_pre_hook(partial(_shift_positions, modules[0].prefix), with_kwargs=True)
        names = {name for name, _ in model.named_parameters() if ".prefix." in name}
        set_trainable(model, names | anatomy.always_trainable)

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """Run the model without prefixes."""
        prefixes = _prefixes(model)
        for prefix in prefixes:
            prefix.enabled = False
        try:
            yield
        finally:
            for prefix in prefixes:
                prefix.enabled = True

    def _record(self, model: Any, body: Any, vocabulary: int, anatomy: Anatomy) -> list[AttentionInputs]:
        """Record keys and values for random tokens in each attention layer that gets a prefix."""
        count = max(4, min(self.num_virtual_tokens, 64))
        ids = torch.randint(vocabulary, (1, count)) % model.get_input_embeddings().num_embeddings
        recorded = attention_inputs(model, body, ids)
        if model.config.is_encoder_decoder:
            recorded = [call for call in recorded if call.queries == call.key.shape[1] == 3]
        recorded = list({call.path: call for call in reversed(recorded)}.values())[::-1]  # a shared module once
        if not recorded:
            raise RecipeError(
                f"the attention of this {anatomy.family} model does not accept extra keys and values",
                where="technique",
                hint="use technique=prompt, which does not change the attention",
            )
        return recorded

    def learning_rate(self, anatomy: Anatomy) -> float:
        """Return `LEARNING_RATE`; with `reparameterize` its own, scaled by the width."""
        return rate_by_width(REPARAMETERIZED_LEARNING_RATE, anatomy) if self.reparameterize else LEARNING_RATE

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """Return a PEFT `PrefixTuningConfig`, or a config of our own where PEFT's outputs would differ.

        PEFT passes prefixes as past keys, which not every model accepts. They also shift the absolute positions of an
        encoder-decoder, so only relative positions (T5) give the same outputs there.
        """
        prefixes, config = _prefixes(model), cast(Any, model).config
        takes_past = "past_key_values" in signature(model.get_submodule(anatomy.backbone).forward).parameters
        relative = stacks_for_peft(model) == 2 and prefixes[0].relative[0] is not None
        loads_in_peft = takes_past and (not config.is_encoder_decoder or relative)
        _, heads, tokens, width = prefixes[0].shape
        return {
            "peft_type": "PREFIX_TUNING" if loads_in_peft else f"{OWN_TYPE}PREFIX",
            "task_type": peft_task_type(model),
            "inference_mode": True,
            "num_virtual_tokens": tokens,
            "token_dim": heads * width,
            "num_transformer_submodules": stacks_for_peft(model),
            "num_attention_heads": heads,
            "num_layers": len(prefixes) * stacks_for_peft(model),
            "encoder_hidden_size": heads * width,
            "prefix_projection": False,
            "modules_to_save": modules_to_save(anatomy) or None,
        }

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return all keys and values as PEFT's matrix (virtual tokens, layers * 2 * kv heads * width)."""
        flat = [prefix().detach().permute(2, 0, 1, 3).flatten(1) for prefix in _prefixes(model)]
        if stacks_for_peft(model) == 2:  # PEFT alternates self- and cross-attention, and drops the latter
            flat = [part for states in flat for part in (states, torch.zeros_like(states))]
        return prompt_learning_tensors(model, torch.cat(flat, 1))

    def load_adapter(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load saved keys and values, of any number of virtual tokens."""
        prefixes = _prefixes(model)
        rows = load_prompt_learning(model, tensors, super().load_adapter).to(next(model.parameters()).device)
        _, heads, _, width = prefixes[0].shape
        pairs, rest = divmod(rows.shape[-1], 2 * heads * width)
        if rest or pairs not in (len(prefixes), len(prefixes) * stacks_for_peft(model)):
            what = f"the prefix has width {rows.shape[-1]}, this model needs {len(prefixes) * 2 * heads * width}"
            raise CheckpointError(what, hint="load it with the base model that it was trained on")
        flat = rows.chunk(pairs, 1)
        for number, prefix in enumerate(prefixes):
            states = flat[number * stacks_for_peft(model) % pairs]
            prefix.replace(states.view(len(rows), 2, heads, width).permute(1, 2, 0, 3))

    @classmethod
    def from_adapter(cls, folder: Path) -> Self:
        """Return the technique of a PEFT prefix.

        Raises:
            CheckpointError: the folder cannot be read.
            RecipeError: the adapter has another type.
        """
        return cls.model_validate(virtual_tokens_of(folder, "PREFIX_TUNING"))


def _prefixes(model: nn.Module) -> list[PrefixStates]:
    return [module for module in model.modules() if isinstance(module, PrefixStates)]


def _shift_positions(prefix: PrefixStates, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Shift the positions of the text, so that they start after the prefix."""
    kwargs = by_name(body, args, kwargs)
    if kwargs.get("position_ids") is None:
        inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        first = first_position(body)
        kwargs["position_ids"] = torch.arange(first, first + inputs.shape[1], device=inputs.device)[None]
    kwargs["position_ids"] = kwargs["position_ids"] + prefix.tokens
    return (), kwargs
