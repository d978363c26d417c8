"""Conversations as tokens, and which of them are the answers: found by construction, whatever the template.

Let r(m) be what the template makes of messages m, and p(m) the same with the beginning of an answer behind it. The
answer m[i] begins behind p(m[:i]); that and r(m[:i + 1]) must be beginnings of r(m), and p(m[:i]) one in tokens too, so
that a model learns behind exactly what it is asked with. Where a template rewrites what went before, there is no such
place, and it is refused. An answer goes up to the token that ends it, which is learned as well.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from jinja2 import TemplateError

from tunesmith.data.text.conversations import Message
from tunesmith.data.text.templates import PLAIN, TEMPLATES
from tunesmith.data.text.texts import MAX_CHARS_PER_TOKEN
from tunesmith.errors import DataError, RecipeError, shorten

TrainOn = Literal["answers", "last_answer", "all"]
NOT_CUT, SOME_CUT, ALL_CUT, TEMPLATE_REFUSED = 0, 1, 2, 3
"""What of an example's answers lies beyond the tokens that are read; or the template refuses it."""

_PROBE = (
    {"role": "user", "content": "Is it so?"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "It still is."},
)
_SYSTEM = {"role": "system", "content": "Be short."}
_ESCAPED = re.compile("\ue000(\\d+)\ue001")
"""Stands for a special token that is a part of what somebody said, while the template is filled in."""


class UnsplittableError(ValueError):
    """A conversation cannot be split at its answers; says why."""


@dataclass(frozen=True)
class RenderedChat:
    """A filled-in template, and where in it the answers that are learned begin and end (with what ends them)."""

    text: str
    starts: list[int]
    stops: list[int]


@dataclass(frozen=True)
class ChatEncoder:
    """A tokenizer and a template that have been found to fit."""

    processor: Any
    template: str
    train_on: TrainOn
    end_ids: frozenset[int] = frozenset()
    """The tokens that end an answer."""

    @classmethod
    def of(cls, processor: Any, template: str | None, train_on: TrainOn, system: str | None) -> ChatEncoder:
        """Try them on made-up messages; `template`: a name, a template, or None for the tokenizer's own.

        Raises:
            RecipeError: the template cannot be split at its answers, or ends them with nothing; says why.
        """
        chosen = template or own_template(processor) or PLAIN
        if chosen in TEMPLATES:
            chosen = ("{{ bos_token }}" if first_token(processor) is not None else "") + TEMPLATES[chosen]
        chats, said = cls(processor, chosen, train_on), [*([] if system is None else [_SYSTEM]), *_PROBE]
        try:
            return replace(chats, end_ids=chats._end_ids(said))
        except (UnsplittableError, TemplateError) as error:
            hint = f"task.chat_template=NAME, one of {', '.join(TEMPLATES)}, or a Jinja file of your own"
            if train_on == "answers" and isinstance(error, UnsplittableError) and error.args[1:]:
                hint = f"task.train_on=last_answer, or {hint}"
            raise RecipeError(f"task.chat_template: {error.args[0]}", hint=hint) from error

    def _end_ids(self, messages: Sequence[Message]) -> frozenset[int]:
        """The first token of the vocabulary's own behind each answer."""
        split, found = self._render_and_split(messages), set()
        for start, stop, index in zip(split.starts, split.stops, self._trained_answers(messages), strict=True):
            before, content, after = split.text[start:stop].partition(messages[index]["content"])
            if not content:
                raise UnsplittableError(
                    f"it writes the answer {shorten(messages[index]['content'])} as {shorten(before)}"
                )
            if self._render(messages[:index]) == split.text[:start] and self._special_in(before):
                raise UnsplittableError(f"with add_generation_prompt it does not begin one with {shorten(before)}")
            own = [token for token in self.tokens([after])[0] if token in self.special.values()]
            if not own:
                what = f"it ends an answer with {shorten(after)}, no token of this model's own"
                raise UnsplittableError(f"{what}, so that a model would not learn where to stop")
            found.add(own[0])
        whole, *prompts = self.tokens([split.text, *(split.text[:start] for start in split.starts)])
        for prompt, start in zip(prompts, split.starts, strict=True):
            if whole[: len(prompt)] != prompt:
                raise UnsplittableError(f"an answer begins within a token, behind {shorten(split.text[:start][-20:])}")
        return frozenset(found)

    @cached_property
    def special(self) -> dict[str, int]:
        """The tokenizer's special tokens."""
        return special_tokens(self.processor)

    @cached_property
    def _names(self) -> list[str]:
        return list(self.special)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return match_any(self.special)

    def _special_in(self, text: str) -> bool:
        return self._pattern.search(text) is not None

    def _trained_answers(self, messages: Sequence[Message]) -> list[int]:
        """The answers that are learned; of one at least it must be known where it begins, to ask for it: the last."""
        places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return places if self.train_on == "answers" else places[-1:]

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        text: str = self.processor.apply_chat_template(
            list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=generation_prompt
        )
        return text

    def _render_and_split(self, messages: Sequence[Message]) -> RenderedChat:
        split = RenderedChat(self._render(messages), [], [])
        for index in self._trained_answers(messages):
            prompt = self._render(messages[:index], generation_prompt=True)
            answered = self._render(messages[: index + 1]) if index + 1 < len(messages) else split.text
            for text, places in ((prompt, split.starts), (answered, split.stops)):
                if not split.text.startswith(text):
                    what = "what it writes before a message changes once the message is there"
                    raise UnsplittableError(f"{what} ({_first_difference(text, split.text)})", "of earlier ones")
                places.append(len(text))
        return split

    def encode_prompt(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The fields of a conversation that is to be answered: its tokens, all of them the prompt."""
        said = self._escape_special(messages)
        (ids,) = self.tokens([self._render(said, generation_prompt=True)])
        return {"input_ids": ids, "prompt": len(ids)}

    def encode_choices(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, Any]:
        """The fields of answers to choose from: the tokens of all of them in a row, and how many each has."""
        prompt = len(self.encode_prompt(messages)["input_ids"]) if choices else 0
        rows = [("", [*messages, {"role": "assistant", "content": choice}]) for choice in choices]
        found = [fields["input_ids"][prompt:] for fields in self.encode(rows, sys.maxsize)]
        return {"options": [token for one in found for token in one], "option_lengths": [len(one) for one in found]}

    def encode(
        self, chats: Sequence[tuple[str, list[Message]]], max_length: int, *, skip: bool = False
    ) -> list[dict[str, Any]]:
        """The fields of (place, conversation): `input_ids`, the places in them of what is `learned`, how much of the
        answers is `cut` away, the length of the `prompt` of the last one (0: not all there), and whether special tokens
        were `said`. With `skip` nothing is learned of a conversation that would raise.

        Raises:
            DataError: the template refuses a conversation, or writes it so that it cannot be split.
        """
        marked = [self._escape_special(_truncate_messages(messages, max_length)) for _, messages in chats]
        splits = [self._render_or_raise(place, said, skip) for (place, _), said in zip(chats, marked, strict=True)]
        texts = [part for split in splits for part in (split.text, *(split.text[:start] for start in split.starts))]
        tokens = iter(self.tokens(texts))
        found = []
        for (_, messages), said, split in zip(chats, marked, splits, strict=True):
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
            fields["prompt"] = starts[-1] if len(said) == len(messages) and starts[-1] < max_length else 0
            fields["cut"] = max(fields["cut"], int(len(said) < len(messages)))
            found.append(
                fields | {"has_special_tokens": int(any(_ESCAPED.search(message["content"]) for message in said))}
            )
        return found

    def _render_or_raise(self, place: str, messages: Sequence[Message], skip: bool) -> RenderedChat:
        """With `skip` nothing of a conversation that is refused."""
        try:
            return self._render_and_split(messages)
        except (UnsplittableError, TemplateError) as error:
            if skip:
                return RenderedChat("", [], [])
            what = f"the chat template cannot write this conversation: {error.args[0]}"
            raise DataError(what, where=place, hint="remove the row, or task.chat_template=NAME") from error

    def _tokenize_in_pieces(self, split: RenderedChat) -> tuple[list[int], list[int]]:
        """Tokens that end where an answer begins, and how many stand before each, where a token would reach over."""
        edges = [0, *split.starts, len(split.text)]
        pieces = self.tokens([split.text[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)])
        whole, starts = list[int](), list[int]()
        for piece in pieces:
            starts.append(len(whole))
            whole += piece
        return whole, starts[1:]

    def _fields(self, whole: list[int], starts: list[int], max_length: int) -> dict[str, Any]:
        """What is learned, within the limit; nothing is read behind the last of it."""
        learned = list(range(1, len(whole)))
        if self.train_on != "all":
            learned = [
                place
                for start, before in zip(starts, [*starts[1:], len(whole)], strict=True)
                for place in range(start, self._answer_end(whole, start, before))
            ]
        kept = [place for place in learned if place < max_length]
        cut = NOT_CUT if len(kept) == len(learned) else SOME_CUT if kept else ALL_CUT
        return {"input_ids": whole[: kept[-1] + 1 if kept else max_length], "learned": kept, "cut": cut}

    def _answer_end(self, whole: list[int], start: int, before: int) -> int:
        """Behind the token that ends the answer at `start`, which stands `before` the next answer."""
        return next((place + 1 for place in range(start, before) if whole[place] in self.end_ids), before)

    def _escape_special(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with a mark in the place of each special token that is said in them."""
        numbers = {name: number for number, name in enumerate(self._names)}
        return [
            {**one, "content": self._pattern.sub(lambda found: f"\ue000{numbers[found[0]]}\ue001", one["content"])}
            for one in messages
        ]

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Of each text its tokens; special tokens that somebody said are words like others."""
        if not texts:
            return []
        found: list[list[int]] = self.processor(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        for number, text in enumerate(texts):
            if "\ue000" in text and len(parts := _ESCAPED.split(text)) > 1:
                found[number] = [
                    token for place, part in enumerate(parts) for token in self._tokenize_part(part, place % 2 == 1)
                ]
        return found

    def _tokenize_part(self, part: str, mark: bool) -> list[int]:
        """What stands between two marks, or for one, which is given by its number."""
        text = self._names[int(part)] if mark else part
        if not text:
            return []
        found: list[int] = self.processor(text, add_special_tokens=False, split_special_tokens=mark)["input_ids"]
        return found


def special_tokens(processor: Any) -> dict[str, int]:
    """Tokens that no text is meant to spell, by their spelling."""
    found = {str(token): index for index, token in processor.added_tokens_decoder.items() if token.special}
    return found | dict(zip(processor.all_special_tokens, processor.all_special_ids, strict=True))


def match_any(words: Iterable[str]) -> re.Pattern[str]:
    """Finds each of some words, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")


def own_template(processor: Any) -> str | None:
    """The template that a tokenizer came with, of several the one for chats."""
    given: str | dict[str, str] | None = processor.chat_template
    return given.get("default") if isinstance(given, dict) else given


def first_token(processor: Any) -> int | None:
    """What a tokenizer puts before every text to begin it, if it does."""
    ids, first = processor("a")["input_ids"], processor.bos_token_id
    return first if first is not None and ids[:1] == [first] else None


def _truncate_messages(messages: list[Message], max_length: int) -> list[Message]:
    """The first messages, more than can be read: a template's work grows with the square of their number."""
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
    """Where two texts part."""
    place = next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(0, place - 10)
    return f"{shorten(text[start : place + 30], 40)} to {shorten(other[start : place + 30], 40)}"
