"""Named chat templates, for models without one or to be trained in another format.

The templates omit the BOS token. It is prepended for tokenizers that put it before every text.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import shorten

PLAIN = "plain"
"""Default template for models without one; it needs no special token except EOS."""

MAX_CHARS = 65536
"""Maximum characters of a template."""

_LOOP = "{% for message in messages %}"
_SYSTEM, _USER, _ANSWER, _END = (
    "{% if message['role'] == 'system' %}",
    "{% elif message['role'] == 'user' %}",
    "{% elif message['role'] == 'assistant' %}",
    "{% else %}{{ raise_exception('this template has no place for messages from ' + message['role']) }}"
    "{% endif %}{% endfor %}",
)
_CONTENT = "{{ message['content'] }}"


def _generation_prompt(prompt: str) -> str:
    return "{% if add_generation_prompt %}" + prompt + "{% endif %}"


def _turns(system: str, user: str, answer: str, prompt: str) -> str:
    """Build a template with a format per role."""
    parts = (_SYSTEM, system, _USER, user, _ANSWER, answer)
    return _LOOP + "".join(parts) + _END + _generation_prompt(prompt)


def _delimited(begin: str, end: str, prompt: str) -> str:
    """Build a template in which each message has a header with its role and an end token."""
    return _LOOP + begin + _CONTENT + end + "\n{% endfor %}" + _generation_prompt(prompt)


TEMPLATES: dict[str, str] = {
    PLAIN: _turns(
        _CONTENT + "\n\n", "User: " + _CONTENT + "\n", "Assistant: " + _CONTENT + "{{ eos_token }}\n", "Assistant:"
    ),
    "alpaca": _turns(
        _CONTENT + "\n\n",
        "### Instruction:\n" + _CONTENT + "\n\n",
        "### Response:\n" + _CONTENT + "{{ eos_token }}\n\n",
        "### Response:\n",
    ),
    "vicuna": _turns(
        _CONTENT + "\n\n", "USER: " + _CONTENT + "\n", "ASSISTANT: " + _CONTENT + "{{ eos_token }}\n", "ASSISTANT:"
    ),
    "chatml": _delimited("<|im_start|>{{ message['role'] }}\n", "<|im_end|>", "<|im_start|>assistant\n"),
    "zephyr": _delimited("<|{{ message['role'] }}|>\n", "{{ eos_token }}", "<|assistant|>\n"),
    "llama2": _turns(
        "[INST] <<SYS>>\n" + _CONTENT + "\n<</SYS>>\n\n",
        "{% if loop.first or messages[loop.index0 - 1]['role'] != 'system' %}[INST] {% endif %}"
        + _CONTENT + " [/INST]",
        " " + _CONTENT + "{{ eos_token }}{% if not loop.last %}{{ bos_token }}{% endif %}",
        "",
    ),
    "llama3": _delimited(
        "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ).replace("<|eot_id|>\n", "<|eot_id|>"),
    "gemma": _delimited(
        "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n",
        "<end_of_turn>",
        "<start_of_turn>model\n",
    ),
}  # fmt: skip
"""Name -> Jinja template, rendered by transformers."""


def template_text(given: str) -> str:
    """Resolve a name or a file to a template; a template is returned unchanged.

    Raises:
        ValueError: neither a known name nor a readable template file, or it is too large.
    """
    if given in TEMPLATES or "{{" in given or "{%" in given:
        return given
    try:
        text = Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError):
        known = ", ".join(TEMPLATES)
        raise ValueError(f"{shorten(given)} is neither a readable file nor one of {known}") from None
    if len(text) > MAX_CHARS or not ("{{" in text or "{%" in text):
        what = f"over {MAX_CHARS:,} characters" if len(text) > MAX_CHARS else "no Jinja template (it has no {{ }})"
        raise ValueError(f"{shorten(given)} is {what}; give a Jinja template")
    return text
