"""Prefix tuning: learned keys and values that every attention sees before those of the text.

    Attention(Q, [P_K; K], [P_V; V])        (Li and Liang 2021, arXiv 2101.00190; with a head Liu 2022, 2110.07602)

The prefix starts as the keys and values that the model itself makes of tokens drawn from its vocabulary: real
activations, as the paper advises. With `reparameterize`, P = W_2 tanh(W_1 e) is learned instead, and P is saved.
Positions of the text begin after the prefix, as if it stood before the text. In an encoder-decoder the decoder has it.
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
    learn_only,
    load_prompt_learning,
    peft_task_type,
    prompt_learning_tensors,
    rate_by_width,
    saved_whole,
    stacks_for_peft,
    virtual_tokens_of,
)

LEARNING_RATE = 3e-2
"""The best of three on validation (sst2, one epoch, one seed) with a model 384 wide: docs/techniques/prefix.md."""

REPARAMETERIZED_LEARNING_RATE = 3e-4
"""Likewise; at 1e-3 the model stays at the majority class."""


class Shared(nn.Module):
    """tanh(W_1 e): what a reparameterised prefix shares between all attention modules."""

    def __init__(self, tokens: int, width: int, bottleneck: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, width))
        self.down = nn.Linear(width, bottleneck)

    def forward(self) -> Tensor:
        """What the maps of the modules start from."""  # (virtual tokens, bottleneck)
        return torch.tanh(self.down(self.weight))


class PrefixStates(nn.Module):
    """Keys and values of one attention module, learned as they are, or made of what is shared by a map of its own."""

    def __init__(self, start: Tensor, shared: Shared | None, relative: nn.Module | None) -> None:
        super().__init__()
        self.shape = tuple(start.shape)  # (2, kv heads, virtual tokens, width)
        self.present = True
        self.relative = (relative,)  # T5's relative positions, a part of another block: not to be registered here
        self.shared = shared
        if shared is None:
            self.states = nn.Parameter(start.detach().float())
        else:
            self.up = nn.Linear(shared.down.out_features, start.numel() // start.shape[2])

    def forward(self) -> Tensor:
        """Keys and values; none while they are absent."""  # (2, kv heads, virtual tokens, width)
        return self._made()[:, :, : self.tokens]

    @property
    def tokens(self) -> int:
        """How many are seen."""
        return self.shape[2] if self.present else 0

    def _made(self) -> Tensor:
        if self.shared is None:
            return self.states
        _, heads, tokens, width = self.shape
        with torch.autocast(self.up.weight.device.type, enabled=False):  # what is saved is made in fp32 too
            made: Tensor = self.up(self.shared())
        return made.view(tokens, 2, heads, width).permute(1, 2, 0, 3)

    def put(self, states: Tensor) -> None:
        """From now on these, learned as they are."""
        self.shape, self.shared = tuple(states.shape), None
        if hasattr(self, "up"):
            del self.up
        self.states = nn.Parameter(states.float().clone())

    def bias(self, queries: int, keys: int) -> Tensor:
        """T5's bias of each query for each virtual token."""  # (1, heads, queries, virtual tokens)
        relative: Any = self.relative[0]
        tokens = self.tokens
        made: Tensor = relative.compute_bias(queries, tokens + keys, past_seen_tokens=tokens)
        return made[..., :tokens]


class Prefix(Technique):
    """Keys and values learn that every attention sees before those of the text (Li 2021, arXiv 2101.00190).

    Learns 2 n d_kv parameters an attention for n virtual tokens, and what is new (the head). With a head it is
    P-tuning v2.
    Use it where a prompt is too weak; it makes no sequence longer, so it is cheaper. It cannot be merged.
    """

    artefact: ClassVar[Literal["adapter", "model"]] = "adapter"
    starts_as_base: ClassVar[bool] = False
    cannot_merge: ClassVar[str] = "it is in the input of the attention, not in a weight"

    num_virtual_tokens: int = Field(20, ge=1, description="how many keys and values each attention gets")
    reparameterize: int | None = Field(
        None, ge=1, description="learn them through a two-layer network of this width, which is dropped after"
    )

    @property
    def virtual_tokens(self) -> int:
        """The positions before the text."""
        return self.num_virtual_tokens

    def apply(self, model: Any, anatomy: Anatomy, processor: Any) -> None:
        """Give every attention module its keys and values."""
        saved_whole(anatomy)
        body = model.get_submodule(anatomy.backbone)
        seen = self._ask(model, body, len(processor), anatomy)
        shared = None
        if self.reparameterize:
            shared = Shared(self.num_virtual_tokens, anatomy.hidden_size, self.reparameterize)
        modules: list[Any] = [model.get_submodule(one.path) for one in seen]
        relative = next((module for module in modules if getattr(module, "has_relative_attention_bias", False)), None)
        for one, module in zip(seen, modules, strict=True):
            start = torch.stack([one.key, one.value])
            places = torch.arange(self.num_virtual_tokens) % start.shape[2]
            module.prefix = PrefixStates(start[:, :, places], shared, relative)
        use_prefixes(model)
        if "position_ids" in signature(body.forward).parameters:
            body.register_forward_pre_hook(partial(_begin_after, modules[0].prefix), with_kwargs=True)
        names = {name for name, _ in model.named_parameters() if ".prefix." in name}
        learn_only(model, names | anatomy.learns_always)

    @contextmanager
    def absent(self, model: nn.Module) -> Iterator[None]:
        """No prefixes."""
        prefixes = _prefixes(model)
        for prefix in prefixes:
            prefix.present = False
        try:
            yield
        finally:
            for prefix in prefixes:
                prefix.present = True

    def _ask(self, model: Any, body: Any, vocabulary: int, anatomy: Anatomy) -> list[AttentionInputs]:
        """What each attention that is to have a prefix makes of tokens drawn from the vocabulary."""
        count = max(4, min(self.num_virtual_tokens, 64))
        ids = torch.randint(vocabulary, (1, count)) % model.get_input_embeddings().num_embeddings
        seen = attention_inputs(model, body, ids)
        if model.config.is_encoder_decoder:
            seen = [one for one in seen if one.queries == one.key.shape[1] == 3]
        seen = list({one.path: one for one in reversed(seen)}.values())[::-1]  # a shared module once
        if not seen:
            raise RecipeError(
                f"this {anatomy.family} model's attention cannot be given keys and values from outside",
                where="technique",
                hint="use technique=prompt, which needs nothing of the attention",
            )
        return seen

    def learning_rate(self, anatomy: Anatomy) -> float:
        """`LEARNING_RATE`; keys and values are not multiplied with the width."""
        return rate_by_width(REPARAMETERIZED_LEARNING_RATE, anatomy) if self.reparameterize else LEARNING_RATE

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """A PEFT `PrefixTuningConfig`; PEFT's prefixes are past keys, which not every model takes.

        A decoder on an encoder counts its positions from past keys on, and is given none from outside: only where they
        are relative (T5) are its answers PEFT's.
        """
        prefixes, config = _prefixes(model), cast(Any, model).config
        takes_past = "past_key_values" in signature(model.get_submodule(anatomy.backbone).forward).parameters
        relative = stacks_for_peft(model) == 2 and prefixes[0].relative[0] is not None
        theirs = takes_past and (not config.is_encoder_decoder or relative)
        _, heads, tokens, width = prefixes[0].shape
        return {
            "peft_type": "PREFIX_TUNING" if theirs else f"{OWN_TYPE}PREFIX",
            "task_type": peft_task_type(model),
            "inference_mode": True,
            "num_virtual_tokens": tokens,
            "token_dim": heads * width,
            "num_transformer_submodules": stacks_for_peft(model),
            "num_attention_heads": heads,
            "num_layers": len(prefixes) * stacks_for_peft(model),
            "encoder_hidden_size": heads * width,
            "prefix_projection": False,
            "modules_to_save": saved_whole(anatomy) or None,
        }

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """PEFT's names: all keys and values as one matrix (virtual tokens, modules * 2 * kv heads * width)."""
        flat = [prefix().detach().permute(2, 0, 1, 3).flatten(1) for prefix in _prefixes(model)]
        if stacks_for_peft(model) == 2:  # it deals pairs out to self- and cross-attention in turn, and drops the latter
            flat = [part for one in flat for part in (one, torch.zeros_like(one))]
        return prompt_learning_tensors(model, torch.cat(flat, 1))

    def load_adapter(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Put saved keys and values in place, however many there are."""
        prefixes = _prefixes(model)
        rows = load_prompt_learning(model, tensors, super().load_adapter).to(next(model.parameters()).device)
        _, heads, _, width = prefixes[0].shape
        pairs, rest = divmod(rows.shape[-1], 2 * heads * width)
        if rest or pairs not in (len(prefixes), len(prefixes) * stacks_for_peft(model)):
            what = f"the prefix is {rows.shape[-1]} wide, and this model takes {len(prefixes) * 2 * heads * width}"
            raise CheckpointError(what, hint="load it over the base model that it was trained on")
        flat = rows.chunk(pairs, 1)
        for number, prefix in enumerate(prefixes):
            states = flat[number * stacks_for_peft(model) % pairs]
            prefix.put(states.view(len(rows), 2, heads, width).permute(1, 2, 0, 3))

    @classmethod
    def from_adapter(cls, folder: Path) -> Self:
        """The technique that a PEFT prefix was trained with, as far as its answers go.

        Raises:
            CheckpointError: the folder cannot be read.
            RecipeError: it holds another kind of adapter.
        """
        return cls.model_validate(virtual_tokens_of(folder, "PREFIX_TUNING"))


def _prefixes(model: nn.Module) -> list[PrefixStates]:
    return [module for module in model.modules() if isinstance(module, PrefixStates)]


def _begin_after(prefix: PrefixStates, body: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """Positions of the text as if the prefix stood before it."""
    given = by_name(body, args, given)
    if given.get("position_ids") is None:
        shown = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        first = first_position(body)
        given["position_ids"] = torch.arange(first, first + shown.shape[1], device=shown.device)[None]
    given["position_ids"] = given["position_ids"] + prefix.tokens
    return (), given
