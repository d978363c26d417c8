"""A conversation with a run: what is said goes in line by line, answers come out as they are written.

tunesmith chat runs/alpaca-lora
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from tunesmith.data.columns import of_kind
from tunesmith.data.text.conversations import Message
from tunesmith.deploy.predict import Tuned
from tunesmith.errors import RecipeError
from tunesmith.recipe.fields import Generation

ANEW = "/new"
"""Begins another conversation."""


def chat(
    tuned: Tuned, lines: Iterable[str], say: Callable[[str], None], how: Generation, system: str | None = None
) -> list[Message]:
    """Answer each of `lines` behind all that was said before; returns the conversation, or the last after `ANEW`.

    `system` is what it begins with, in the place of the run's own.

    Raises:
        RecipeError: the run holds no conversations.
    """
    if of_kind(tuned.task.columns, "messages") is None or not tuned.bound.rows_are_examples:
        hint = "`tunesmith predict` asks it"
        raise RecipeError("this run has learned no conversations", where=tuned.recipe.output, hint=hint)
    task = tuned.task.model_copy(update={"generate": how})
    told = replace(tuned, bound=task.bind(tuned.processor, tuned.model.config, tuned.data))
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    for line in lines:
        if line.strip() == ANEW:
            messages = list(opening)
        if not line.strip() or line.strip() == ANEW:
            continue
        messages.append({"role": "user", "content": line.strip()})
        answer = told.stream({"messages": messages}, say)
        say("\n" if answer else "(no answer)\n")
        if answer:
            messages.append({"role": "assistant", "content": answer})
        else:
            messages.pop()  # as if it had not been asked: a model cannot go on from a question without an answer
    return messages
