"""Conversations as tokens, with the positions of the answers, for any chat template.

Let r(m) be the rendered template of messages m, and p(m) the same with the generation prompt. Answer m[i] begins after
p(m[:i]). Both p(m[:i]) and r(m[:i + 1]) must be prefixes of r(m), and p(m[:i]) a prefix in tokens too, so that the
model is trained on exactly the prompt that it is given in inference. A template that rewrites earlier messages has no
such position and is refused. An answer includes the token that ends it.
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
"""Values of the field `cut`: how many answers of an example are truncated, or that the template refused it."""

_PROBE = (
    {"role": "user", "content": "Is it so?"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "It still is."},
)
_SYSTEM = {"role": "system", "content": "Be short."}
_ESCAPED = re.compile("\ue000(\\d+)\ue001")
"""Placeholder for a special token in a message while the template is rendered."""


class UnsplittableError(ValueError):
    """A rendered conversation cannot be split at its answers."""


@dataclass(frozen=True)
class RenderedChat:
    """Rendered template, with start and end (after the end token) of each trained answer, in characters."""

    text: str
    starts: list[int]
    stops: list[int]


@dataclass(frozen=True)
class ChatEncoder:
    """Encoder of conversations with a tokenizer and a chat template that were checked to fit."""

    processor: Any
    template: str
    train_on: TrainOn
    end_ids: frozenset[int] = frozenset()
    """Ids of the tokens that end an answer."""

    @classmethod
    def of(cls, processor: Any, template: str | None, train_on: TrainOn, system: str | None) -> ChatEncoder:
        """Create an encoder and check it on sample messages.

        `template` is a name, a Jinja template, or None for the tokenizer's own.

        Raises:
            RecipeError: the rendered template cannot be split at its answers, or no token ends them.
        """
        chosen = template or own_template(processor) or PLAIN
        if chosen in TEMPLATES:
            chosen = ("{{ bos_token }}" if first_token(processor) is not None else "") + TEMPLATES[chosen]
        chats, probe = cls(processor, chosen, train_on), [*([] if system is None else [_SYSTEM]), *_PROBE]
        try:
            return replace(chats, end_ids=chats._end_ids(probe))
        except (UnsplittableError, TemplateError) as error:
            hint = f"set task.chat_template to one of {', '.join(TEMPLATES)}, or to a Jinja file"
            if train_on == "answers" and isinstance(error, UnsplittableError) and error.args[1:]:
                hint = f"set task.train_on=last_answer, or {hint}"
            raise RecipeError(f"task.chat_template: {error.args[0]}", hint=hint) from error

    def _end_ids(self, messages: Sequence[Message]) -> frozenset[int]:
        """The first special token after each answer."""
        split, end_ids = self._render_and_split(messages), set()
        for start, stop, index in zip(split.starts, split.stops, self._trained_answers(messages), strict=True):
            before, content, after = split.text[start:stop].partition(messages[index]["content"])
            if not content:
                what = f"it renders the answer {shorten(messages[index]['content'])} as {shorten(before)}"
                raise UnsplittableError(what)
            if self._render(messages[:index]) == split.text[:start] and self._special_in(before):
                raise UnsplittableError(f"its generation prompt lacks {shorten(before)}, with which answers begin")
            own = [token for token in self.tokens([after])[0] if token in self.special.values()]
            if not own:
                what = f"it ends an answer with {shorten(after)}, which is no special token of this model"
                raise UnsplittableError(f"{what}, so the model would not learn to stop")
            end_ids.add(own[0])
        whole, *prompts = self.tokens([split.text, *(split.text[:start] for start in split.starts)])
        for prompt, start in zip(prompts, split.starts, strict=True):
            if whole[: len(prompt)] != prompt:
                raise UnsplittableError(f"an answer begins inside a token, after {shorten(split.text[:start][-20:])}")
        return frozenset(end_ids)

    @cached_property
    def special(self) -> dict[str, int]:
        """Special token -> id."""
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
        """Indices of the trained answers: all, or only the last, whose start is needed as the prompt."""
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
                    what = "its rendering of earlier messages changes when a message is added"
                    raise UnsplittableError(f"{what} ({_first_difference(text, split.text)})", "of earlier ones")
                places.append(len(text))
        return split

    def encode_prompt(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Encode messages as a prompt, with the generation prompt at the end."""
        (ids,) = self.tokens([self._render(self._escape_special(messages), generation_prompt=True)])
        return {"input_ids": ids, "prompt": len(ids)}

    def encode_choices(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, Any]:
        """Encode answers to choose from: the tokens of all of them concatenated, and the length of each."""
        prompt = len(self.encode_prompt(messages)["input_ids"]) if choices else 0
        rows = [("", [*messages, {"role": "assistant", "content": choice}]) for choice in choices]
        options = [fields["input_ids"][prompt:] for fields in self.encode(rows, sys.maxsize)]
        return {"options": [token for ids in options for token in ids], "option_lengths": [len(ids) for ids in options]}

    def encode(
        self, chats: Sequence[tuple[str, list[Message]]], max_length: int, *, skip: bool = False
    ) -> list[dict[str, Any]]:
        """Encode (place, conversation) pairs.

        Fields: `input_ids`; `learned`, the positions that carry loss; `cut`, how many answers are truncated; `prompt`,
        the length of the prompt of the last answer (0: truncated); `has_special_tokens`, whether a message contains
        special tokens. With `skip`, a conversation that would raise carries no loss.

        Raises:
            DataError: the template refuses a conversation, or its rendering cannot be split at the answers.
        """
        escaped = [self._escape_special(_truncate_messages(messages, max_length)) for _, messages in chats]
        splits = [self._render_or_raise(place, kept, skip) for (place, _), kept in zip(chats, escaped, strict=True)]
        texts = [part for split in splits for part in (split.text, *(split.text[:start] for start in split.starts))]
        tokens = iter(self.tokens(texts))
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
                fields | {"has_special_tokens": int(any(_ESCAPED.search(message["content"]) for message in kept))}
            )
        return encoded

    def _render_or_raise(self, place: str, messages: Sequence[Message], skip: bool) -> RenderedChat:
        """Render and split a conversation; with `skip`, an empty rendering if it is refused."""
        try:
            return self._render_and_split(messages)
        except (UnsplittableError, TemplateError) as error:
            if skip:
                return RenderedChat("", [], [])
            what = f"the chat template refuses this conversation: {error.args[0]}"
            raise DataError(what, where=place, hint="remove the row, or set task.chat_template=NAME") from error

    def _tokenize_in_pieces(self, split: RenderedChat) -> tuple[list[int], list[int]]:
        """Tokenize the parts between answer starts separately, because a token would span one of them."""
        edges = [0, *split.starts, len(split.text)]
        pieces = self.tokens([split.text[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)])
        whole, starts = list[int](), list[int]()
        for piece in pieces:
            starts.append(len(whole))
            whole += piece
        return whole, starts[1:]

    def _fields(self, whole: list[int], starts: list[int], max_length: int) -> dict[str, Any]:
        """Compute the positions that carry loss within the limit; tokens after the last of them are dropped."""
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
        """The position after the end token of the answer at `start`, at most `before`."""
        return next((place + 1 for place in range(start, before) if whole[place] in self.end_ids), before)

    def _escape_special(self, messages: Sequence[Message]) -> list[Message]:
        """Replace special tokens in the messages by placeholders."""
        numbers = {name: number for number, name in enumerate(self._names)}
        return [
            {
                **message,
                "content": self._pattern.sub(lambda match: f"\ue000{numbers[match[0]]}\ue001", message["content"]),
            }
            for message in messages
        ]

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts; special tokens in messages are tokenized as ordinary text."""
        if not texts:
            return []
        ids: list[list[int]] = self.processor(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        for number, text in enumerate(texts):
            if "\ue000" in text and len(parts := _ESCAPED.split(text)) > 1:
                ids[number] = [
                    token for place, part in enumerate(parts) for token in self._tokenize_part(part, place % 2 == 1)
                ]
        return ids

    def _tokenize_part(self, part: str, escaped: bool) -> list[int]:
        """Tokenize the text between two placeholders, or the special token of a placeholder, given by number."""
        text = self._names[int(part)] if escaped else part
        if not text:
            return []
        ids: list[int] = self.processor(text, add_special_tokens=False, split_special_tokens=escaped)["input_ids"]
        return ids


def special_tokens(processor: Any) -> dict[str, int]:
    """Special token -> id."""
    added = {str(token): index for index, token in processor.added_tokens_decoder.items() if token.special}
    return added | dict(zip(processor.all_special_tokens, processor.all_special_ids, strict=True))


def match_any(words: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern that matches any of the words, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")


def own_template(processor: Any) -> str | None:
    """The tokenizer's own chat template; the default one if there are several."""
    template: str | dict[str, str] | None = processor.chat_template
    return template.get("default") if isinstance(template, dict) else template


def first_token(processor: Any) -> int | None:
    """The BOS token, if the tokenizer puts it before every text."""
    ids, first = processor("a")["input_ids"], processor.bos_token_id
    return first if first is not None and ids[:1] == [first] else None


def _truncate_messages(messages: list[Message], max_length: int) -> list[Message]:
    """Keep the first messages, at least `max_length` tokens: rendering is quadratic in the number of messages."""
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
    """Excerpts of two texts at their first difference."""
    place = next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(0, place - 10)
    return f"{shorten(text[start : place + 30], 40)} to {shorten(other[start : place + 30], 40)}"
