"""A conversation with a run: each line is a user message, answers are streamed.

tunesmith chat runs/alpaca-lora
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from tunesmith.data.columns import of_kind
from tunesmith.data.text.conversations import Message
from tunesmith.deploy.predict import FineTunedModel
from tunesmith.errors import RecipeError
from tunesmith.recipe.fields import Generation

NEW_CONVERSATION = "/new"
"""The line that starts a new conversation."""


def chat(
    model: FineTunedModel,
    lines: Iterable[str],
    say: Callable[[str], None],
    settings: Generation,
    system: str | None = None,
) -> list[Message]:
    """Answer each line in the context of the conversation so far; return the last conversation.

    `system` replaces the run's system message.

    Raises:
        RecipeError: the run was not trained on conversations.
    """
    if of_kind(model.task.columns, "messages") is None or not model.bound.rows_are_examples:
        hint = "use `tunesmith predict`"
        raise RecipeError("this run was not trained on conversations", where=model.recipe.output, hint=hint)
    task = model.task.model_copy(update={"generate": settings})
    model = replace(model, bound=task.bind(model.processor, model.model.config, model.data))
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    for line in lines:
        if line.strip() == NEW_CONVERSATION:
            messages = list(opening)
        if not line.strip() or line.strip() == NEW_CONVERSATION:
            continue
        messages.append({"role": "user", "content": line.strip()})
        answer = model.stream({"messages": messages}, say)
        say("\n" if answer else "(no answer)\n")
        if answer:
            messages.append({"role": "assistant", "content": answer})
        else:
            messages.pop()  # chat templates refuse two user messages in a row
    return messages
