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
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from tunesmith.errors import RecipeError, did_you_mean

Kind = Literal["task", "technique"]


class Keys(BaseModel):
    """A set of recipe keys: frozen, strict, nothing unknown, no NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )


class Plugin(Keys):
    """A task or a technique: its fields are its recipe keys. It is called as its file is, or its entry point."""

    name: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Name it, however it comes to be imported."""
        cls.name = _called(cls.__module__)


def _called(module: str) -> str:
    return module.rpartition(".")[2].replace("_", "-")


def names(kind: Kind) -> list[str]:
    """All known plug-ins of a kind, sorted, without importing them."""
    package = importlib.import_module(f"tunesmith.{kind}s")
    own = {_called(module.name) for module in pkgutil.iter_modules(package.__path__)}
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
    return own[0]
