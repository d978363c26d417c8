"""Faults of tokenized conversations and raw texts, for `data check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.data.findings import Fault
from tunesmith.data.text.chats import NOT_CUT, ChatEncoder
from tunesmith.data.text.conversations import Message
from tunesmith.data.text.special_tokens import match_any, special_tokens
from tunesmith.errors import DataError

LOOKAHEAD_FACTOR = 8
"""Conversations are tokenized up to this multiple of the limit, to report truncated answers."""

TokensAndFaults = tuple[list[list[int]], list[Fault]]
"""Tokens of each row, and the faults of all rows."""


def chat_faults(chats: ChatEncoder, rows: Sequence[tuple[str, list[Message]]], limit: int) -> TokensAndFaults:
    """Check (place, conversation) pairs; an empty conversation is skipped.

    Faults: answers beyond the limit or without an end token, special tokens in messages, a duplicate BOS token, and
    conversations that the template refuses.
    """
    ids, faults = list[list[int]](), list[Fault]()
    for place, messages in rows:
        fields: dict[str, Any] = {"input_ids": []}
        try:
            if messages:
                (fields,) = chats.encode([(place, messages)], LOOKAHEAD_FACTOR * limit)
                faults += _faults(chats, place, messages, fields, limit)
        except DataError as error:
            what = "the chat template refuses a conversation"
            faults.append(Fault("template", what, place, error.what, error.hint, "error"))
        ids.append(fields["input_ids"])
    return ids, faults


def _faults(
    chats: ChatEncoder, place: str, messages: list[Message], fields: dict[str, Any], limit: int
) -> Iterator[Fault]:
    ids, learned, last = fields["input_ids"], fields["learned"], messages[-1]["content"]
    kept = sum(position < limit for position in learned)
    if not kept:
        what = f"no answer is within the first {limit} tokens, so the conversation has no loss"
        yield Fault("no-answer", what, place, last, "raise data.max_length, or shorten the messages before the answer")
    elif kept < len(learned) or fields["cut"] != NOT_CUT:
        what, fix = f"an answer is cut at {limit} tokens", "raise data.max_length, or shorten the conversation"
        yield Fault("answer-cut", what, place, last, fix)
    elif chats.train_on != "all" and ids[learned[-1]] not in chats.end_ids:
        what = "an answer has no end token, so the model would not learn to stop"
        fix = "set task.chat_template=NAME"
        yield Fault("no-end", what, place, last, fix, "error")
    if fields["has_special_tokens"]:
        yield _special_token_fault(chats.tokenizer.ids, place, "\n".join(message["content"] for message in messages))
    if len(ids) > 1 and ids[0] == ids[1] == chats.processor.bos_token_id:
        what, fix = "the BOS token occurs twice at the beginning", "remove it from the template"
        yield Fault("double-bos", what, place, chats.processor.bos_token, fix)


def text_faults(processor: Any, rows: Sequence[tuple[str, str]]) -> TokensAndFaults:
    """Check (place, raw text) pairs for special tokens in the text."""
    special = special_tokens(processor)
    texts = [text for _, text in rows]
    ids = processor(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return ids, [_special_token_fault(special, place, text) for place, text in rows if match_any(special).search(text)]


def _special_token_fault(special: dict[str, int], place: str, text: str) -> Fault:
    match = match_any(special).search(text)
    what = "a text contains a special token of this model, which is tokenized as ordinary text"
    fix = "keep it if it is intended; remove it if it was added by preprocessing"
    return Fault("special-token", what, place, match[0] if match else "", fix)
