"""Special tokens of a tokenizer, and tokenization in which those written by users are ordinary text.

A user's message may contain a special token such as `<|im_end|>`. If it were tokenized as one, the message could end
the turn. So special tokens in messages are replaced by placeholders before the chat template is rendered, and each
placeholder is tokenized as the characters of its special token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tunesmith.data.text.conversations import Message

_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
"""Placeholder for a special token in a message, by the token's number."""


def special_tokens(processor: Any) -> dict[str, int]:
    """Return special token -> id."""
    added = {str(token): index for index, token in processor.added_tokens_decoder.items() if token.special}
    return added | dict(zip(processor.all_special_tokens, processor.all_special_ids, strict=True))


def match_any(words: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern that matches any of the words, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")


def has_placeholder(text: str) -> bool:
    """Return whether a text has a placeholder for a special token."""
    return _PLACEHOLDER.search(text) is not None


@dataclass(frozen=True)
class EscapingTokenizer:
    """Tokenizer that escapes special tokens in messages and tokenizes them as ordinary text."""

    processor: Any

    @cached_property
    def ids(self) -> dict[str, int]:
        """Special token -> id."""
        return special_tokens(self.processor)

    @cached_property
    def _names(self) -> list[str]:
        return list(self.ids)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return match_any(self.ids)

    def has_special_token(self, text: str) -> bool:
        """Return whether a text contains a special token."""
        return self._pattern.search(text) is not None

    def escape(self, messages: Sequence[Message]) -> list[Message]:
        """Replace special tokens in the messages by placeholders."""
        numbers = {name: number for number, name in enumerate(self._names)}
        return [
            {
                **message,
                "content": self._pattern.sub(lambda match: f"\ue000{numbers[match[0]]}\ue001", message["content"]),
            }
            for message in messages
        ]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text; placeholders become the ordinary text of their special tokens."""
        if not texts:
            return []
        ids: list[list[int]] = self.processor(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        for number, text in enumerate(texts):
            if "\ue000" in text and len(parts := _PLACEHOLDER.split(text)) > 1:
                ids[number] = [
                    token for place, part in enumerate(parts) for token in self._tokenize_part(part, place % 2 == 1)
                ]
        return ids

    def _tokenize_part(self, part: str, is_placeholder: bool) -> list[int]:
        """Tokenize the text between two placeholders, or the special token with number `part`."""
        text = self._names[int(part)] if is_placeholder else part
        if not text:
            return []
        tokenized = self.processor(text, add_special_tokens=False, split_special_tokens=is_placeholder)
        ids: list[int] = tokenized["input_ids"]
        return ids
