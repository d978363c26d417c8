"""Soft prompts: trained vectors among the embedded tokens (Lester 2021, arXiv 2104.08691).

    decoder             p_1 ... p_n  x_1 ... x_T
    encoder             x_1  p_1 ... p_n  x_1 x_2 ... x_T        (x_1 is [CLS], which heads read)
    encoder-decoder     p_1 ... p_n  x_1 ... x_T  into the encoder; the decoder attends to all of them

Output shapes do not change: the outputs of virtual tokens are removed, so no head, pooler or token output sees them.
An encoder's first token is repeated, so that the head reads the state of a real token, in an order that PEFT (which
puts all vectors in front) can also express: its first vector is the embedding of x_1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.kernels.fast_path import fast_path
from tunesmith.models.anatomy import Anatomy
from tunesmith.techniques import (
    OWN_TYPE,
    Technique,
    by_name,
    load_prompt_learning,
    modules_to_save,
    peft_task_type,
    prompt_learning_tensors,
    set_trainable,
    stacks_for_peft,
    virtual_tokens_of,
)

LEARNING_RATE = 3e-2
"""Best of three on validation (sst2, one epoch, one seed) at hidden size 384: docs/techniques/prompt.md."""


class SoftPrompt(nn.Module):
    """Vectors in front of a text: the trained ones, after the embedding of the first token for an encoder."""

    first: Tensor | None
    enabled: bool = True

    def __init__(self, weight: Tensor, first: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float())  # (virtual tokens, width)
        self.register_buffer("first", None if first is None else first.detach().float())  # (1, width)

    def forward(self) -> Tensor:
        """Return all vectors in order; empty while disabled."""  # (added positions, width)
        vectors = self.weight if self.first is None else torch.cat([self.first, self.weight])
        return vectors if self.enabled else vectors[:0]


class Prompt(Technique):
    """Soft prompts, trained vectors among the embedded tokens (Lester 2021, arXiv 2104.08691).

    Trains n d parameters for n virtual tokens, and the new head.
    Use it with large models, and for adapters of a few kilobytes. It cannot be merged.
    """

    artifact: ClassVar[Literal["adapter", "model"]] = "adapter"
    starts_as_base: ClassVar[bool] = False
    cannot_merge: ClassVar[str] = "it is part of the input, not of a weight"

    num_virtual_tokens: int = Field(20, ge=1, description="number of trained vectors")
    init_text: str | None = Field(
        None,
        min_length=1,
        description="text to initialize from, repeated or cut; default: random tokens",
    )

    @property
    def virtual_tokens(self) -> int:
        """Number of added positions, with the repeated first token."""
        return self.num_virtual_tokens + 1

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Return random initialization and initialization from a text."""
        return [{"num_virtual_tokens": 5}, {"num_virtual_tokens": 5, "init_text": "great or bad"}]

    def apply(self, model: Any, anatomy: Anatomy, processor: Any) -> None:
        """Insert the vectors before the first block, and remove their outputs after the last."""
        modules_to_save(anatomy)
        embedding = model.get_input_embeddings()
        body = model.get_submodule(anatomy.backbone)
        encoder_decoder = bool(model.config.is_encoder_decoder)
        stack = _stack(model, body)
        first = None
        if not encoder_decoder and _is_bidirectional(body, embedding):
            first = _embed(embedding, stack, torch.tensor([_first_token(processor)]))
        embedding.prompt = SoftPrompt(_embed(embedding, stack, self._initial_tokens(embedding, processor)), first)
        stack.register_forward_pre_hook(partial(_insert, embedding), with_kwargs=True)
        if encoder_decoder:
            model.get_decoder().register_forward_pre_hook(partial(_extend_mask, embedding.prompt), with_kwargs=True)
        else:
            stack.register_forward_hook(partial(_remove_outputs, embedding.prompt), with_kwargs=True)
        name = next(name for name, parameter in model.named_parameters() if parameter is embedding.prompt.weight)
        set_trainable(model, {name} | anatomy.always_trainable)

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """Run the model without the vectors."""
        prompt = _prompt(model)
        prompt.enabled = False
        try:
            with fast_path(model).all_tokens():
                yield
        finally:
            prompt.enabled = True

    def _initial_tokens(self, embedding: Any, processor: Any) -> Tensor:
        """Return the tokens whose embeddings initialize the vectors."""
        count = self.num_virtual_tokens
        if self.init_text is None:
            random: Tensor = torch.randint(len(processor), (count,)) % embedding.num_embeddings
            return random
        ids = processor(self.init_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise RecipeError("has no tokens", where="technique.init_text", hint="give some words")
        return torch.tensor((ids * count)[:count])

    def learning_rate(self, anatomy: Anatomy) -> float:
        """Return `LEARNING_RATE`, independent of the width."""
        return LEARNING_RATE

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """Return a PEFT `PromptTuningConfig`, or a config of our own where PEFT's outputs would differ.

        PEFT supports an encoder-decoder only for sequence-to-sequence tasks, and ignores `embed_scale` of models that
        scale their embeddings.
        """
        config: Any = model.config
        scales = getattr(_stack(model, model.get_submodule(anatomy.backbone)), "embed_scale", 1.0) != 1.0
        loads_in_peft = not config.is_encoder_decoder or (stacks_for_peft(model) == 2 and not scales)
        positions, width = _prompt(model)().shape
        return {
            "peft_type": "PROMPT_TUNING" if loads_in_peft else f"{OWN_TYPE}PROMPT",
            "task_type": peft_task_type(model),
            "inference_mode": True,
            "num_virtual_tokens": positions,
            "token_dim": width,
            "num_transformer_submodules": stacks_for_peft(model),
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
            "modules_to_save": modules_to_save(anatomy) or None,
            "prompt_tuning_init": "RANDOM",
        }

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors under PEFT's names, with its unused copy for a decoder."""
        rows = _prompt(model)().detach()
        return prompt_learning_tensors(model, rows.repeat(stacks_for_peft(model), 1))

    def load_adapter(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load saved vectors, of any number."""
        prompt, device = _prompt(model), _prompt(model).weight.device
        rows = load_prompt_learning(model, tensors, super().load_adapter).to(device)
        rows = rows[: len(rows) // stacks_for_peft(model)]
        if rows.shape[-1] != prompt.weight.shape[-1]:
            what = f"the prompt has width {rows.shape[-1]}, this model's embeddings {prompt.weight.shape[-1]}"
            raise CheckpointError(what, hint="load it with the base model that it was trained on")
        if prompt.first is not None:
            prompt.first.copy_(rows[:1])
            rows = rows[1:]
        prompt.weight = nn.Parameter(rows.float().clone())

    @classmethod
    def from_adapter(cls, folder: Path) -> Self:
        """Return the technique of a PEFT prompt.

        Raises:
            CheckpointError: the folder cannot be read.
            RecipeError: the adapter has another type.
        """
        return cls.model_validate(virtual_tokens_of(folder, "PROMPT_TUNING"))


def _prompt(model: Any) -> SoftPrompt:
    prompt: SoftPrompt = model.get_input_embeddings().prompt
    return prompt


def _stack(model: Any, body: Any) -> Any:
    """Return the module whose inputs get the vectors."""
    return model.get_encoder() if model.config.is_encoder_decoder else body


def _embed(embedding: Any, stack: Any, ids: Tensor) -> Tensor:
    """Return embeddings as a stack uses them: Marian scales those of `input_ids`, but not `inputs_embeds`."""
    embedded: Tensor = embedding(ids.to(embedding.weight.device)) * getattr(stack, "embed_scale", 1.0)
    return embedded


def _first_token(processor: Any) -> int:
    """Return the token that every text of an encoder starts with.

    Raises:
        RecipeError: there is none, so a head would read the output of a virtual token.
    """
    token = processor.cls_token_id if processor.cls_token_id is not None else processor.bos_token_id
    if token is None:
        what = "this tokenizer does not start texts with a special token, which the head would read"
        raise RecipeError(what, where="technique", hint="use technique=prefix, which inserts no tokens")
    return int(token)


@torch.no_grad()
def _is_bidirectional(body: Any, embedding: Any) -> bool:
    """Return whether the state of the first token depends on later tokens."""
    was_training = body.training
    body.eval()
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=embedding.weight.device) % embedding.num_embeddings
    one, other = body(input_ids=ids)[0][:, 0]
    body.train(was_training)
    return not torch.equal(one, other)


def _insert(embedding: Any, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Insert the vectors before the tokens; during generation the cache already has them."""
    kwargs = by_name(stack, args, kwargs)
    vectors = embedding.prompt()
    padding = (len(vectors), 0)
    if kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"] = F.pad(kwargs["attention_mask"], padding, value=1)
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"] + len(vectors)
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return (), kwargs
    ids, embedded = kwargs.pop("input_ids", None), kwargs.get("inputs_embeds")
    if embedded is None:
        embedded = _embed(embedding, stack, ids)
    kwargs["inputs_embeds"] = torch.cat([vectors.to(embedded.dtype).expand(len(embedded), -1, -1), embedded], 1)
    if kwargs.get("position_ids") is not None:
        before = torch.arange(len(vectors), device=embedded.device).expand(len(kwargs["position_ids"]), -1)
        kwargs["position_ids"] = torch.cat([before, kwargs["position_ids"]], 1)
    if kwargs.get("token_type_ids") is not None:
        kwargs["token_type_ids"] = F.pad(kwargs["token_type_ids"], padding, value=0)
    return (), kwargs


def _remove_outputs(prompt: SoftPrompt, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Remove the outputs of the vectors; the repeated first token takes the state of the one in front."""
    count = len(prompt())
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > output[0].shape[1]:
        return output  # the vectors were in an earlier call

    def text(states: Tensor) -> Tensor:
        if prompt.first is None:
            return states[:, count:]
        return torch.cat([states[:, :1], states[:, count + 1 :]], 1)

    if isinstance(output, tuple):
        return (text(output[0]), *output[1:])
    output["last_hidden_state"] = text(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(text(states) for states in output["hidden_states"])
    return output


def _extend_mask(prompt: SoftPrompt, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Extend the mask, so that a decoder attends to the outputs of the vectors."""
    kwargs = by_name(decoder, args, kwargs)
    if kwargs.get("encoder_attention_mask") is not None:
        kwargs["encoder_attention_mask"] = F.pad(kwargs["encoder_attention_mask"], (len(prompt()), 0), value=1)
    return (), kwargs
