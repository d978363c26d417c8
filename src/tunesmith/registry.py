"""Registry of tasks and techniques: a plug-in is named after its file, with dashes.

Third parties register theirs under the entry points `tunesmith.techniques` and `tunesmith.tasks`. This is the only
dynamic import of the package.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from tunesmith.errors import RecipeError, did_you_mean

Kind = Literal["task", "technique"]


class Keys(BaseModel):
    """Section of recipe keys: frozen, strict types, no unknown keys, no NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )


class Plugin(Keys):
    """Task or technique: its fields are its recipe keys, its name is that of its file or entry point."""

    name: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Set the name from the module, however it is imported."""
        cls.name = _plugin_name(cls.__module__)


class About(NamedTuple):
    """Name, docstring and recipe keys of a plug-in."""

    name: str
    description: str
    keys: list[str]


def _plugin_name(module: str) -> str:
    return module.rpartition(".")[2].replace("_", "-")


def _files(kind: Kind) -> dict[str, Path]:
    """Name -> file of the plug-ins of this package."""
    return {_plugin_name(path.stem): path for path in Path(__file__).with_name(f"{kind}s").glob("[!_]*.py")}


def _entry_points(kind: Kind) -> dict[str, EntryPoint]:
    """Name -> entry point of the plug-ins of third parties, which take precedence over ours of the same name."""
    return _scan(kind, tuple(sys.path))


@cache
def _scan(kind: Kind, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Read the entry points of all packages on a module search path."""
    return {point.name: point for point in entry_points(group=f"tunesmith.{kind}s")}


def names(kind: Kind) -> list[str]:
    """Return the names of all plug-ins of a kind, sorted, without importing them."""
    return sorted(_files(kind).keys() | _entry_points(kind).keys())


def about(kind: Kind) -> list[About]:
    """Describe all plug-ins of a kind, sorted; those of this package are parsed, as importing them takes seconds."""
    theirs = _entry_points(kind)
    plugins = [_import(kind, name) for name in theirs]
    plugins += [_parse(kind, name, file) for name, file in _files(kind).items() if name not in theirs]
    return sorted(plugins)


def _parse(kind: Kind, name: str, file: Path) -> About:
    """Description of a plug-in from the text of its file."""
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


def _import(kind: Kind, name: str) -> About:
    plugin = get(kind, name)
    return About(name, inspect.getdoc(plugin) or "", list(plugin.model_fields))


def check_name(kind: Kind, name: str) -> None:
    """Check that a name is known, without importing the plug-in.

    Raises:
        RecipeError: no plug-in has that name.
    """
    if name not in names(kind):
        raise RecipeError(f"no {kind} is called '{name}'", hint=did_you_mean(name, names(kind)))


@cache
def get(kind: Kind, name: str) -> type[Plugin]:
    """Return the class of a name.

    Raises:
        RecipeError: no plug-in has that name.
    """
    check_name(kind, name)
    if name in _entry_points(kind):
        plugin: type[Plugin] = _entry_points(kind)[name].load()
        plugin.name = name
        return plugin
    module = importlib.import_module(f"tunesmith.{kind}s.{name.replace('-', '_')}")
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Plugin) and value.__module__ == module.__name__
    ]
    assert len(own) == 1, f"{module.__name__} must define exactly one plug-in, it defines {own}"
    return own[0]
