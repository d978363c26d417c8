"""What is wrong with conversations and raw text as tokens, for `data check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.data.findings import Fault
from tunesmith.data.text.chats import NOT_CUT, ChatEncoder, match_any, special_tokens
from tunesmith.data.text.conversations import Message
from tunesmith.errors import DataError

LOOKAHEAD_FACTOR = 8
"""How many times what is read is looked at, so that it can be said what lies beyond."""

TokensAndFaults = tuple[list[list[int]], list[Fault]]
"""Of each row its tokens, and the faults of all."""


def chat_faults(chats: ChatEncoder, rows: Sequence[tuple[str, list[Message]]], limit: int) -> TokensAndFaults:
    """Of (place, conversation), an empty one being none: answers beyond the limit, or without an end; special tokens
    that somebody said; a first token that stands there twice; conversations that the template refuses.
    """
    ids, faults = list[list[int]](), list[Fault]()
    for place, messages in rows:
        fields: dict[str, Any] = {"input_ids": []}
        try:
            if messages:
                (fields,) = chats.encode([(place, messages)], LOOKAHEAD_FACTOR * limit)
                faults += _faults(chats, place, messages, fields, limit)
        except DataError as error:
            what = "the chat template cannot write a conversation"
            faults.append(Fault("template", what, place, error.what, error.hint, "error"))
        ids.append(fields["input_ids"])
    return ids, faults


def _faults(
    chats: ChatEncoder, place: str, messages: list[Message], fields: dict[str, Any], limit: int
) -> Iterator[Fault]:
    ids, learned, last = fields["input_ids"], fields["learned"], messages[-1]["content"]
    kept = sum(token < limit for token in learned)
    if not kept:
        what = f"no answer is within the {limit} tokens that are read: nothing is learned from a conversation"
        yield Fault("no-answer", what, place, last, "raise data.max_length, or shorten what stands before the answer")
    elif kept < len(learned) or fields["cut"] != NOT_CUT:
        what, fix = f"an answer goes beyond the {limit} tokens that are read", "raise data.max_length, or shorten it"
        yield Fault("answer-cut", what, place, last, fix)
    elif chats.train_on != "all" and ids[learned[-1]] not in chats.end_ids:
        what, fix = "an answer has no token that ends it: a model learns to go on", "task.chat_template=NAME"
        yield Fault("no-end", what, place, last, fix, "error")
    if fields["has_special_tokens"]:
        yield _special_token_fault(chats.special, place, "\n".join(message["content"] for message in messages))
    if len(ids) > 1 and ids[0] == ids[1] == chats.processor.bos_token_id:
        what, fix = "the token that begins a text stands there twice", "leave it out of the template"
        yield Fault("double-bos", what, place, chats.processor.bos_token, fix)


def text_faults(processor: Any, rows: Sequence[tuple[str, str]]) -> TokensAndFaults:
    """Of (place, raw text): special tokens that it spells."""
    special = special_tokens(processor)
    texts = [text for _, text in rows]
    coded = processor(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return coded, [
        _special_token_fault(special, place, text) for place, text in rows if match_any(special).search(text)
    ]


def _special_token_fault(special: dict[str, int], place: str, text: str) -> Fault:
    found = match_any(special).search(text)
    what = "a text spells a special token of this model, which is read as plain words"
    fix = "nothing if it is meant; remove it if another program put it there"
    return Fault("special-token", what, place, found[0] if found else "", fix)
