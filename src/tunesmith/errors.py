"""The user's errors: each says where, what is wrong and the way out, and carries its exit code.

Everything else that is raised is a programmer's error (exit code 1). Exit codes: 0 done, 1 a bug of ours, 2 usage or
recipe, 3 data, 4 resources, 5 numbers, 6 checkpoint or resume, 75 interrupted and resumable.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DataError",
    "Interrupted",
    "NumericError",
    "RecipeError",
    "ResourceError",
    "UserError",
    "counted",
    "did_you_mean",
    "redact",
    "shorten",
]

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SECRET_NAME = r"[\w-]*(?:token|secret|password|passwd|api[-_]?key)"
_SECRETS = (
    (re.compile(r"(\w{2,}:/{1,2})[^/\s\"'<>]+@"), r"\1***@"),
    (re.compile(r"\b(hf_|sk-|AKIA|ghp_|github_pat_|glpat-|pypi-AgE)[A-Za-z0-9_-]{8,}"), r"\1***"),
    (re.compile(rf"(?<!\S)(--?{_SECRET_NAME} |[-'\"]*{_SECRET_NAME}=)('[^']*'|[^\s'\"]+)", re.IGNORECASE), r"\1***"),
)


class UserError(Exception):
    """What the user can mend. `str()` reads `where: what; hint` on one line, without control characters or secrets."""

    exit_code = 2
    stage: int | None = None
    """Of a recipe's stages the one in which it came up, from 1."""

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        text = f"{where}: {what}" if where else what
        super().__init__(redact(CONTROL.sub("?", f"{text}; {hint}" if hint else text)))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it in a notebook: where a user erred is in the words, not in our code."""
        return [f"{type(self).__name__}: {self}"]


class RecipeError(UserError):
    """A key, a value or a command that cannot be meant."""

    exit_code = 2


class DataError(UserError):
    """A file or a row that cannot be learned from; names file, row or line, column and value."""

    exit_code = 3


class ResourceError(UserError):
    """Memory, disk or network that is not there."""

    exit_code = 4


class NumericError(UserError):
    """NaN, infinity or divergence."""

    exit_code = 5


class CheckpointError(UserError):
    """A checkpoint that cannot be trusted, or a resume that would not continue the same run."""

    exit_code = 6


class Interrupted(UserError):
    """A signal stopped the run after a checkpoint was written; the message is the command that resumes it."""

    exit_code = 75


def redact(text: str) -> str:
    """The text without credentials: user and password in addresses, tokens, what `--token` or `password=` says."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 row`, `1,200 rows`; `plural` where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The nearest option as `did you mean 'r'?`, else the list of them."""
    options = sorted(options)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(options)}" if options else ""


def shorten(value: object, limit: int = 80) -> str:
    """`value` as it is shown in an error: on one line, at most `limit` characters."""
    text = repr(value) if not isinstance(value, str) else repr(value)[1:-1]
    return f"'{text if len(text) <= limit else text[: limit - 1] + '…'}'"
