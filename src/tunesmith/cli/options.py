"""What the verbs of the command line share: the options that all take, words of a recipe, what is printed."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.errors import RecipeError, UserError

if TYPE_CHECKING:
    from tunesmith.talk import Talk

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, all talk on stderr.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Warnings only.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="More detail.")]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks.")]
Offline = Annotated[bool, typer.Option("--offline", help="Open no connection.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights (weights_only).")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"tunesmith {version('tunesmith')}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]
COMMON = {
    "as_json": Json,
    "quiet": Quiet,
    "verbose": Verbose,
    "debug": Debug,
    "offline": Offline,
    "version": Version,
}
Pairs = Annotated[
    list[str] | None,
    typer.Argument(help="A recipe file, then KEY=VALUE overrides.", metavar="[RECIPE.yaml] [KEY=VALUE ...]"),
]


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options that all take; it names those it reads. `main` itself reads --debug and --offline."""
    own = inspect.signature(function, eval_str=True)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in COMMON.items()
        if name not in own.parameters
    ]

    @functools.wraps(function)
    def call(**given: Any) -> None:
        function(**{name: given[name] for name in own.parameters})

    call.__signature__ = own.replace(parameters=[*own.parameters.values(), *options])  # type: ignore[attr-defined]
    return call


def new_talk(as_json: bool, quiet: bool, verbose: bool = False) -> Talk:
    """Where a verb says its news."""
    from tunesmith.talk import Talk

    return Talk(level=-1 if quiet else int(verbose), to_stderr=as_json)


def emit(result: Any) -> None:
    """The one JSON object of `--json`; other processes of a group stay silent."""
    if os.environ.get("RANK", "") in ("", "0"):
        print(json.dumps(result, ensure_ascii=False))


def check_new(file: Path, option: str = "--output") -> None:
    """Refuse to write over a file, or where there is no folder, before any work is done."""
    if file.exists():
        hint = f"{option} NAME says another"
        raise RecipeError("there is a file already, and it is not overwritten", where=str(file), hint=hint)
    if not file.absolute().parent.is_dir():
        raise RecipeError("there is no such folder", where=str(file.parent), hint="make it first")


def refuse_early(target: str | None, pairs: list[str], *, overwrite: bool | None = None) -> None:
    """Refuse data that is not there, a recipe that cannot be meant and, where `overwrite` is told, an output that is
    taken, before seconds of imports.
    """
    from tunesmith import recipe as recipes
    from tunesmith.data.formats import check_there
    from tunesmith.run_folder import claim

    try:
        data, output = recipes.paths_named(target, pairs)
        for one in data:
            check_there(one)
        if overwrite is not None and output is not None and output.is_dir():
            claim(output, resume=False, overwrite=overwrite)
        if recipes.load_stages(target, pairs) is None:
            recipes.load(target, pairs)
    except UserError as error:
        raise recipes.located(error, target, pairs) from error


def recipe_and_pairs(words: list[str]) -> tuple[str | None, list[str]]:
    """The file, if the first word is one, and the rest."""
    named = bool(words) and ("=" not in words[0] or Path(words[0]).is_file())
    return (words[0], words[1:]) if named else (None, words)
