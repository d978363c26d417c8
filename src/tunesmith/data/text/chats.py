"""Tokenization of conversations with any chat template, and the positions of the answers.

Let r(m) be the template rendered for messages m, and p(m) the same with the generation prompt. Answer m[i] begins
after p(m[:i]) and ends after r(m[:i + 1]), including its end token. Both must be prefixes of r(m), and p(m[:i]) must be
a prefix in tokens too, so that the model is trained on the same prompt as in inference. A template that rewrites
earlier messages is refused, because its answers have no such positions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from jinja2 import TemplateError

from tunesmith.data.text.conversations import Message
from tunesmith.data.text.special_tokens import EscapingTokenizer, has_placeholder
from tunesmith.data.text.templates import PLAIN, TEMPLATES
from tunesmith.data.text.texts import MAX_CHARS_PER_TOKEN
from tunesmith.errors import DataError, RecipeError, shorten

TrainOn = Literal["answers", "last_answer", "all"]
NOT_CUT, SOME_CUT, ALL_CUT, TEMPLATE_REFUSED = 0, 1, 2, 3
"""Values of the field `cut`: no, some or all answers of an example are truncated, or the template refused it."""

_PROBE = (
    {"role": "user", "content": "Is it so?"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "It still is."},
)
_SYSTEM = {"role": "system", "content": "Be short."}


class UnsplittableError(ValueError):
    """A rendered conversation cannot be split at its answers."""


@dataclass(frozen=True)
class RenderedChat:
    """Rendered conversation, with the start and the end (after the end token) of each trained answer, in characters."""

    text: str
    starts: list[int]
    stops: list[int]


@dataclass(frozen=True)
class ChatEncoder:
    """Encoder of conversations for a tokenizer and a chat template; `of` checks that the template can be split."""

    processor: Any
    template: str
    train_on: TrainOn
    end_ids: frozenset[int] = frozenset()
    """Ids of the tokens that end an answer."""

    @classmethod
    def of(cls, processor: Any, template: str | None, train_on: TrainOn, system: str | None) -> ChatEncoder:
        """Create an encoder and check its template on sample messages.

        `template` is a name, a Jinja template, or None for the tokenizer's own. `system` is the system message of the
        recipe: if it is set, the template must support system messages.

        Raises:
            RecipeError: the rendered template cannot be split at its answers, or no token ends them.
        """
        chosen = template or own_template(processor) or PLAIN
        if chosen in TEMPLATES:
            chosen = ("{{ bos_token }}" if first_token(processor) is not None else "") + TEMPLATES[chosen]
        encoder, probe = cls(processor, chosen, train_on), [*([] if system is None else [_SYSTEM]), *_PROBE]
        try:
            return replace(encoder, end_ids=encoder._end_ids(probe))
        except (UnsplittableError, TemplateError) as error:
            hint = f"set task.chat_template to one of {', '.join(TEMPLATES)}, or to a Jinja file"
            if train_on == "answers" and isinstance(error, UnsplittableError) and error.args[1:]:
                hint = f"set task.train_on=last_answer, or {hint}"
            raise RecipeError(f"task.chat_template: {error.args[0]}", hint=hint) from error

    def _end_ids(self, messages: Sequence[Message]) -> frozenset[int]:
        """Return the first special token after each answer, and check that the template can be split.

        Raises:
            UnsplittableError: an answer is changed, has no end token, or does not begin after the generation prompt.
        """
        split, end_ids = self._render_and_split(messages), set()
        for start, stop, index in zip(split.starts, split.stops, self._trained_answers(messages), strict=True):
            before, content, after = split.text[start:stop].partition(messages[index]["content"])
            if not content:
                what = f"it renders the answer {shorten(messages[index]['content'])} as {shorten(before)}"
                raise UnsplittableError(what)
            if self._render(messages[:index]) == split.text[:start] and self.tokenizer.has_special_token(before):
                raise UnsplittableError(f"its generation prompt lacks {shorten(before)}, with which answers begin")
            special_ids = self.tokenizer.ids.values()
            end_tokens = [token for token in self.tokenizer.tokenize([after])[0] if token in special_ids]
            if not end_tokens:
                what = f"it ends an answer with {shorten(after)}, which is no special token of this model"
                raise UnsplittableError(f"{what}, so the model would not learn to stop")
            end_ids.add(end_tokens[0])
        whole, *prompts = self.tokenizer.tokenize([split.text, *(split.text[:start] for start in split.starts)])
        for prompt, start in zip(prompts, split.starts, strict=True):
            if whole[: len(prompt)] != prompt:
                raise UnsplittableError(f"an answer begins inside a token, after {shorten(split.text[:start][-20:])}")
        return frozenset(end_ids)

    @cached_property
    def tokenizer(self) -> EscapingTokenizer:
        """The tokenizer of rendered conversations."""
        return EscapingTokenizer(self.processor)

    def _trained_answers(self, messages: Sequence[Message]) -> list[int]:
        """Return the indices of the answers to locate: with `train_on=answers` all, otherwise only the last."""
        places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return places if self.train_on == "answers" else places[-1:]

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        text: str = self.processor.apply_chat_template(
            list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=generation_prompt
        )
        return text

    def _render_and_split(self, messages: Sequence[Message]) -> RenderedChat:
        """Render a conversation and locate its trained answers.

        Raises:
            UnsplittableError: the rendering of earlier messages changes when a message is added.
        """
        split = RenderedChat(self._render(messages), [], [])
        for index in self._trained_answers(messages):
            prompt = self._render(messages[:index], generation_prompt=True)
            answered = self._render(messages[: index + 1]) if index + 1 < len(messages) else split.text
            for text, places in ((prompt, split.starts), (answered, split.stops)):
                if not split.text.startswith(text):
                    what = "its rendering of earlier messages changes when a message is added"
                    raise UnsplittableError(f"{what} ({_first_difference(text, split.text)})", "of earlier ones")
                places.append(len(text))
        return split

    def encode_prompt(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Encode messages as a prompt, with the generation prompt at the end."""
        (ids,) = self.tokenizer.tokenize([self._render(self.tokenizer.escape(messages), generation_prompt=True)])
        return {"input_ids": ids, "prompt": len(ids)}

    def encode_choices(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, Any]:
        """Encode choices as answers: their concatenated tokens, and the length of each."""
        prompt = len(self.encode_prompt(messages)["input_ids"]) if choices else 0
        rows = [("", [*messages, {"role": "assistant", "content": choice}]) for choice in choices]
        options = [fields["input_ids"][prompt:] for fields in self.encode(rows, sys.maxsize)]
        return {"options": [token for ids in options for token in ids], "option_lengths": [len(ids) for ids in options]}

    def encode(
        self, chats: Sequence[tuple[str, list[Message]]], max_length: int, *, skip: bool = False
    ) -> list[dict[str, Any]]:
        """Encode (place, conversation) pairs.

        Fields: `input_ids`; `learned`, the positions with loss; `cut`, one of NOT_CUT, SOME_CUT, ALL_CUT and
        TEMPLATE_REFUSED; `prompt`, the length of the prompt of the last answer (0: truncated); `has_special_tokens`, 1
        if a message contains special tokens. With `skip`, a conversation that would raise has no loss.

        Raises:
            DataError: the template refuses a conversation, or its rendering cannot be split at the answers.
        """
        escaped = [self.tokenizer.escape(_truncate_messages(messages, max_length)) for _, messages in chats]
        splits = [self._render_or_raise(place, kept, skip) for (place, _), kept in zip(chats, escaped, strict=True)]
        texts = [part for split in splits for part in (split.text, *(split.text[:start] for start in split.starts))]
        tokens = iter(self.tokenizer.tokenize(texts))
        encoded = []
        for (_, messages), kept, split in zip(chats, escaped, splits, strict=True):
            whole, prompts = next(tokens), [next(tokens) for _ in split.starts]
            starts = [len(prompt) for prompt in prompts]
            if any(whole[: len(prompt)] != prompt for prompt in prompts):
                whole, starts = self._tokenize_in_pieces(split)
            fields: dict[str, Any] = {
                "input_ids": [self.processor.pad_token_id],
                "learned": [],
                "cut": TEMPLATE_REFUSED,
            }
            if starts:
                fields = self._fields(whole, starts, max_length)
            else:  # refused
                starts = [max_length]
            fields["prompt"] = starts[-1] if len(kept) == len(messages) and starts[-1] < max_length else 0
            fields["cut"] = max(fields["cut"], int(len(kept) < len(messages)))
            encoded.append(
                fields | {"has_special_tokens": int(any(has_placeholder(message["content"]) for message in kept))}
            )
        return encoded

    def _render_or_raise(self, place: str, messages: Sequence[Message], skip: bool) -> RenderedChat:
        """Render and split a conversation; with `skip`, return an empty rendering if the template refuses it."""
        try:
            return self._render_and_split(messages)
        except (UnsplittableError, TemplateError) as error:
            if skip:
                return RenderedChat("", [], [])
            what = f"the chat template refuses this conversation: {error.args[0]}"
            raise DataError(what, where=place, hint="remove the row, or set task.chat_template=NAME") from error

    def _tokenize_in_pieces(self, split: RenderedChat) -> tuple[list[int], list[int]]:
        """Tokenize the parts between answer starts separately, so that no token spans an answer start.

        Return the tokens and the answer starts in tokens.
        """
        edges = [0, *split.starts, len(split.text)]
        pieces = self.tokenizer.tokenize([split.text[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)])
        whole, starts = list[int](), list[int]()
        for piece in pieces:
            starts.append(len(whole))
            whole += piece
        return whole, starts[1:]

    def _fields(self, whole: list[int], starts: list[int], max_length: int) -> dict[str, Any]:
        """Return tokens and positions with loss within `max_length`; tokens after the last position are dropped."""
        learned = list(range(1, len(whole)))
        if self.train_on != "all":
            learned = [
                place
                for start, limit in zip(starts, [*starts[1:], len(whole)], strict=True)
                for place in range(start, self._answer_end(whole, start, limit))
            ]
        kept = [place for place in learned if place < max_length]
        cut = NOT_CUT if len(kept) == len(learned) else SOME_CUT if kept else ALL_CUT
        return {"input_ids": whole[: kept[-1] + 1 if kept else max_length], "learned": kept, "cut": cut}

    def _answer_end(self, whole: list[int], start: int, limit: int) -> int:
        """Return the position after the end token of the answer at `start`, at most `limit`."""
        return next((place + 1 for place in range(start, limit) if whole[place] in self.end_ids), limit)


def own_template(processor: Any) -> str | None:
    """Return the tokenizer's own chat template; if it has several, the one named `default`."""
    template: str | dict[str, str] | None = processor.chat_template
    return template.get("default") if isinstance(template, dict) else template


def first_token(processor: Any) -> int | None:
    """Return the BOS token if the tokenizer puts it before every text, else None."""
    ids, first = processor("a")["input_ids"], processor.bos_token_id
    return first if first is not None and ids[:1] == [first] else None


def _truncate_messages(messages: list[Message], max_length: int) -> list[Message]:
    """Keep the first messages, with at least `max_length` tokens. This limits rendering, which takes quadratic time."""
    chars, kept = 0, list[Message]()
    for message in messages[:max_length]:
        kept.append(message)
        chars += len(message["content"])
        if chars > max_length * MAX_CHARS_PER_TOKEN:
            break
    while kept and not any(message["role"] == "assistant" for message in kept):
        kept = messages[: len(kept) + 1]
    return kept


def _first_difference(text: str, other: str) -> str:
    """Return excerpts of two texts at their first difference."""
    place = next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(0, place - 10)
    return f"{shorten(text[start : place + 30], 40)} to {shorten(other[start : place + 30], 40)}"
