"""Finds techniques and tasks by name: the name of a plug-in is the name of its file, with dashes.

Third parties register theirs under the entry points `tunesmith.techniques` and `tunesmith.tasks`. This is the one
dynamic import of the package.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from tunesmith.errors import RecipeError, did_you_mean

Kind = Literal["task", "technique"]


class Keys(BaseModel):
    """A set of recipe keys: frozen, strict, nothing unknown, no NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )


class Plugin(Keys):
    """A task or a technique: its fields are its recipe keys."""

    name: ClassVar[str] = ""


def names(kind: Kind) -> list[str]:
    """All known plug-ins of a kind, sorted, without importing them."""
    package = importlib.import_module(f"tunesmith.{kind}s")
    own = {module.name.replace("_", "-") for module in pkgutil.iter_modules(package.__path__)}
    return sorted(own | {point.name for point in entry_points(group=f"tunesmith.{kind}s")})


@cache
def get(kind: Kind, name: str) -> type[Plugin]:
    """The class behind a name.

    Raises:
        RecipeError: no plug-in has that name.
    """
    if name not in names(kind):
        raise RecipeError(f"no {kind} is called '{name}'", hint=did_you_mean(name, names(kind)))
    for point in entry_points(group=f"tunesmith.{kind}s"):
        if point.name == name:
            found: type[Plugin] = point.load()
            found.name = name
            return found
    module = importlib.import_module(f"tunesmith.{kind}s.{name.replace('-', '_')}")
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Plugin) and value.__module__ == module.__name__
    ]
    assert len(own) == 1, f"{module.__name__} must define exactly one plug-in, it defines {own}"
    own[0].name = name
    return own[0]
