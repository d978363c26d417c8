"""Finds techniques and tasks by name: the name of a plug-in is the name of its file, with dashes.

Third parties register theirs under the entry points `tunesmith.techniques` and `tunesmith.tasks`. This is the one
dynamic import of the package.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

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


class About(NamedTuple):
    """What a plug-in is, in its own words, and its recipe keys."""

    name: str
    what: str
    keys: list[str]


def _called(module: str) -> str:
    return module.rpartition(".")[2].replace("_", "-")


def _files(kind: Kind) -> dict[str, Path]:
    """Name -> file of the plug-ins of this package."""
    found = Path(__file__).with_name(f"{kind}s").glob("[!_]*.py")
    return {_called(path.stem): path for path in found}


def _points(kind: Kind) -> dict[str, EntryPoint]:
    """Name -> entry point of the plug-ins of third parties, which come before ours of the same name."""
    return {point.name: point for point in entry_points(group=f"tunesmith.{kind}s")}


def names(kind: Kind) -> list[str]:
    """All known plug-ins of a kind, sorted, without importing them."""
    return sorted(_files(kind).keys() | _points(kind).keys())


def about(kind: Kind) -> list[About]:
    """All plug-ins of a kind, sorted; those of this package are read, not imported, for that takes seconds."""
    theirs = _points(kind)  # asked once: each time goes through all packages that are installed
    found = [_imported(kind, name) for name in theirs]
    found += [_read(kind, name, file) for name, file in _files(kind).items() if name not in theirs]
    return sorted(found)


def _read(kind: Kind, name: str, file: Path) -> About:
    """A plug-in as its file says it."""
    parts = ast.parse(file.read_text(encoding="utf-8")).body
    base = kind.capitalize()
    (plugin,) = (
        part
        for part in parts
        if isinstance(part, ast.ClassDef) and any(isinstance(one, ast.Name) and one.id == base for one in part.bases)
    )
    fields = (
        part.target.id
        for part in plugin.body
        if isinstance(part, ast.AnnAssign)
        and isinstance(part.target, ast.Name)
        and not ast.unparse(part.annotation).startswith("ClassVar")
    )
    keys = [field for field in fields if not field.startswith("_")]
    return About(name, ast.get_docstring(plugin) or "", keys)


def _imported(kind: Kind, name: str) -> About:
    plugin = get(kind, name)
    return About(name, inspect.getdoc(plugin) or "", list(plugin.model_fields))


def check_name(kind: Kind, name: str) -> None:
    """Whether a name is known, without importing what it stands for.

    Raises:
        RecipeError: no plug-in has that name.
    """
    if name not in names(kind):
        raise RecipeError(f"no {kind} is called '{name}'", hint=did_you_mean(name, names(kind)))


@cache
def get(kind: Kind, name: str) -> type[Plugin]:
    """The class behind a name.

    Raises:
        RecipeError: no plug-in has that name.
    """
    check_name(kind, name)
    if name in _points(kind):
        found: type[Plugin] = _points(kind)[name].load()
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
