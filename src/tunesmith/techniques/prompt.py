"""Soft prompts: learned vectors stand among the embedded tokens (Lester 2021, arXiv 2104.08691).

    decoder             p_1 ... p_n  x_1 ... x_T
    encoder             x_1  p_1 ... p_n  x_1 x_2 ... x_T        (x_1 is [CLS], which heads read)
    encoder-decoder     p_1 ... p_n  x_1 ... x_T  into the encoder; the decoder attends to all of them

Outwards nothing changes: what comes out of the virtual tokens is taken away, so no head, pooler or token output sees
it. An encoder's first token is repeated so that what the head reads is a real token's state, in an order that PEFT,
which puts all its vectors in front, can be given as well: its first vector is then the embedding of x_1.
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
    learn_only,
    load_prompt_learning,
    peft_task_type,
    prompt_learning_tensors,
    saved_whole,
    stacks_for_peft,
    virtual_tokens_of,
)

LEARNING_RATE = 3e-2
"""The best of three on validation (sst2, one epoch, one seed) with a model 384 wide: docs/techniques/prompt.md."""


class SoftPrompt(nn.Module):
    """The vectors that are put before a text: those that learn, after the embedding of the first token if it counts."""

    first: Tensor | None
    present: bool = True

    def __init__(self, weight: Tensor, first: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float())  # (virtual tokens, width)
        self.register_buffer("first", None if first is None else first.detach().float())  # (1, width)

    def forward(self) -> Tensor:
        """All of them, in order; none while they are absent."""  # (positions added, width)
        vectors = self.weight if self.first is None else torch.cat([self.first, self.weight])
        return vectors if self.present else vectors[:0]


class Prompt(Technique):
    """Learned vectors stand among the embedded tokens (Lester 2021, arXiv 2104.08691).

    Learns n d parameters for n virtual tokens, and what is new (the head).
    Use it with large models, and where a task must be no more than a few kilobytes. It cannot be merged.
    """

    artefact: ClassVar[Literal["adapter", "model"]] = "adapter"
    starts_as_base: ClassVar[bool] = False
    cannot_merge: ClassVar[str] = "it is in the input, not in a weight"

    num_virtual_tokens: int = Field(20, ge=1, description="how many vectors learn")
    init_text: str | None = Field(
        None,
        min_length=1,
        description="start as these words, repeated or cut; default: as words drawn at random",
    )

    @property
    def virtual_tokens(self) -> int:
        """With room for the repeated first token."""
        return self.num_virtual_tokens + 1

    def apply(self, model: Any, anatomy: Anatomy, processor: Any) -> None:
        """Put the vectors before what enters the blocks, and take away what comes out of them."""
        saved_whole(anatomy)
        embedding = model.get_input_embeddings()
        body = model.get_submodule(anatomy.backbone)
        encoder_decoder = bool(model.config.is_encoder_decoder)
        stack = _stack(model, body)
        first = None
        if not encoder_decoder and _reads_ahead(body, embedding):
            first = _looked_up(embedding, stack, torch.tensor([_first_token(processor)]))
        embedding.prompt = SoftPrompt(_looked_up(embedding, stack, self._start(embedding, processor)), first)
        stack.register_forward_pre_hook(partial(_insert, embedding), with_kwargs=True)
        if encoder_decoder:
            model.get_decoder().register_forward_pre_hook(partial(_open_mask, embedding.prompt), with_kwargs=True)
        else:
            stack.register_forward_hook(partial(_take_away, embedding.prompt), with_kwargs=True)
        name = next(name for name, parameter in model.named_parameters() if parameter is embedding.prompt.weight)
        learn_only(model, {name} | anatomy.learns_always)

    @contextmanager
    def absent(self, model: nn.Module) -> Iterator[None]:
        """No vectors."""
        prompt = _prompt(model)
        prompt.present = False
        try:
            with fast_path(model).all_tokens():
                yield
        finally:
            prompt.present = True

    def _start(self, embedding: Any, processor: Any) -> Tensor:
        """The tokens that the vectors start as."""
        count = self.num_virtual_tokens
        if self.init_text is None:
            drawn: Tensor = torch.randint(len(processor), (count,)) % embedding.num_embeddings
            return drawn
        ids = processor(self.init_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise RecipeError("nothing is left of it as tokens", where="technique.init_text", hint="write some words")
        return torch.tensor((ids * count)[:count])

    def learning_rate(self, anatomy: Anatomy) -> float:
        """`LEARNING_RATE`; a vector that is looked up, not multiplied, knows no width."""
        return LEARNING_RATE

    def adapter_config(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
        """A PEFT `PromptTuningConfig`; PEFT gives an encoder-decoder no prompt but for sequence to sequence, and
        forgets to multiply what it looks up for one that does.
        """
        config: Any = model.config
        multiplies = getattr(_stack(model, model.get_submodule(anatomy.backbone)), "embed_scale", 1.0) != 1.0
        theirs = not config.is_encoder_decoder or (stacks_for_peft(model) == 2 and not multiplies)
        positions, width = _prompt(model)().shape
        return {
            "peft_type": "PROMPT_TUNING" if theirs else f"{OWN_TYPE}PROMPT",
            "task_type": peft_task_type(model),
            "inference_mode": True,
            "num_virtual_tokens": positions,
            "token_dim": width,
            "num_transformer_submodules": stacks_for_peft(model),
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
            "modules_to_save": saved_whole(anatomy) or None,
            "prompt_tuning_init": "RANDOM",
        }

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """PEFT's names; it keeps a second copy for a decoder that it does not use."""
        rows = _prompt(model)().detach()
        return prompt_learning_tensors(model, rows.repeat(stacks_for_peft(model), 1))

    def load_adapter(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Put saved vectors in place, however many there are."""
        prompt, device = _prompt(model), _prompt(model).weight.device
        rows = load_prompt_learning(model, tensors, super().load_adapter).to(device)
        rows = rows[: len(rows) // stacks_for_peft(model)]
        if rows.shape[-1] != prompt.weight.shape[-1]:
            what = f"the prompt is {rows.shape[-1]} wide, and this model's embeddings {prompt.weight.shape[-1]}"
            raise CheckpointError(what, hint="load it over the base model that it was trained on")
        if prompt.first is not None:
            prompt.first.copy_(rows[:1])
            rows = rows[1:]
        prompt.weight = nn.Parameter(rows.float().clone())

    @classmethod
    def from_adapter(cls, folder: Path) -> Self:
        """The technique that a PEFT prompt was trained with, as far as its answers go.

        Raises:
            CheckpointError: the folder cannot be read.
            RecipeError: it holds another kind of adapter.
        """
        return cls.model_validate(virtual_tokens_of(folder, "PROMPT_TUNING"))


def _prompt(model: Any) -> SoftPrompt:
    found: SoftPrompt = model.get_input_embeddings().prompt
    return found


def _stack(model: Any, body: Any) -> Any:
    """What the vectors go into."""
    return model.get_encoder() if model.config.is_encoder_decoder else body


def _looked_up(embedding: Any, stack: Any, ids: Tensor) -> Tensor:
    """What a stack makes of tokens before its first block: Marian's multiplies what it looks up, but not what it is
    given.
    """
    found: Tensor = embedding(ids.to(embedding.weight.device)) * getattr(stack, "embed_scale", 1.0)
    return found


def _first_token(processor: Any) -> int:
    """The token that every text of an encoder begins with.

    Raises:
        RecipeError: there is none, so a head would read what comes out of a virtual token.
    """
    token = processor.cls_token_id if processor.cls_token_id is not None else processor.bos_token_id
    if token is None:
        what = "this tokenizer begins texts with no token of its own, whose state a head could read"
        raise RecipeError(what, where="technique", hint="use technique=prefix, which puts nothing before the text")
    return int(token)


@torch.no_grad()
def _reads_ahead(body: Any, embedding: Any) -> bool:
    """Whether the first token's state depends on those after it."""
    was_training = body.training
    body.eval()
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=embedding.weight.device) % embedding.num_embeddings
    one, other = body(input_ids=ids)[0][:, 0]
    body.train(was_training)
    return not torch.equal(one, other)


def _insert(embedding: Any, stack: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """A stack's inputs with the vectors before the tokens; where generating goes on from a cache, they are in it."""
    given = by_name(stack, args, given)
    vectors = embedding.prompt()
    more = (len(vectors), 0)
    if given.get("attention_mask") is not None:
        given["attention_mask"] = F.pad(given["attention_mask"], more, value=1)
    if given.get("position_ids") is not None:
        given["position_ids"] = given["position_ids"] + len(vectors)
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return (), given
    ids, embedded = given.pop("input_ids", None), given.get("inputs_embeds")
    if embedded is None:
        embedded = _looked_up(embedding, stack, ids)
    given["inputs_embeds"] = torch.cat([vectors.to(embedded.dtype).expand(len(embedded), -1, -1), embedded], 1)
    if given.get("position_ids") is not None:
        before = torch.arange(len(vectors), device=embedded.device).expand(len(given["position_ids"]), -1)
        given["position_ids"] = torch.cat([before, given["position_ids"]], 1)
    if given.get("token_type_ids") is not None:
        given["token_type_ids"] = F.pad(given["token_type_ids"], more, value=0)
    return (), given


def _take_away(prompt: SoftPrompt, stack: Any, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
    """A stack's output for the text alone: the repeated first token's state is that of the one in front."""
    count = len(prompt())
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length() > output[0].shape[1]:
        return output  # they came out of an earlier call

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


def _open_mask(prompt: SoftPrompt, decoder: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """A decoder sees what came out of the vectors."""
    given = by_name(decoder, args, given)
    if given.get("encoder_attention_mask") is not None:
        given["encoder_attention_mask"] = F.pad(given["encoder_attention_mask"], (len(prompt()), 0), value=1)
    return (), given
