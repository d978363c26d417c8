"""Errors that the user can fix: place, what is wrong, fix, and the exit code.

Any other exception is a bug (exit code 1). Exit codes: 0 done, 1 bug, 2 usage or recipe, 3 data, 4 resources,
5 numerical (NaN, divergence), 6 checkpoint or resume, 75 interrupted and resumable.
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
    """Error that the user can fix; `str()` is `where: what; hint` without control characters or secrets."""

    exit_code = 2
    stage: int | None = None
    """Number of the stage that raised it, from 1, in a recipe with stages."""

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        text = f"{where}: {what}" if where else what
        super().__init__(redact(CONTROL.sub("?", f"{text}; {hint}" if hint else text)))

    def _render_traceback_(self) -> list[str]:
        """Show one line in a notebook (IPython) instead of a traceback through our code."""
        return [f"{type(self).__name__}: {self}"]


class RecipeError(UserError):
    """Invalid recipe key, value or command."""

    exit_code = 2


class DataError(UserError):
    """File or row that cannot be trained on; names file, line, column and value."""

    exit_code = 3


class ResourceError(UserError):
    """Missing memory, disk space, device or network."""

    exit_code = 4


class NumericError(UserError):
    """Non-finite loss or gradients, or divergence."""

    exit_code = 5


class CheckpointError(UserError):
    """Corrupt checkpoint, or a resume that would not continue the same run."""

    exit_code = 6


class Interrupted(UserError):
    """Run stopped by a signal after a checkpoint was written; the message has the command that resumes it."""

    exit_code = 75


def redact(text: str) -> str:
    """Return the text without credentials: user and password in URLs, tokens, values of `--token` or `password=`."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return `1 row` or `1,200 rows`; `plural` is for nouns that do not just add an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return the nearest option as `did you mean 'r'?`, or the list of all options."""
    options = sorted(options)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(options)}" if options else ""


def shorten(value: object, limit: int = 80) -> str:
    """Return a value as shown in an error: quoted, on one line, at most `limit` characters."""
    text = repr(value) if not isinstance(value, str) else repr(value)[1:-1]
    return f"'{text if len(text) <= limit else text[: limit - 1] + '…'}'"
