"""Options that all verbs take, the words of a recipe, and JSON output."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.errors import RecipeError, UserError

if TYPE_CHECKING:
    from tunesmith.console import Console
    from tunesmith.recipe import RecipeSource

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, all other output to stderr.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print warnings only.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Print more detail.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print tracebacks.")]
Offline = Annotated[bool, typer.Option("--offline", help="Open no network connection.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Allow .bin weights (torch.load with weights_only=True).")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]


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
    "offline": Offline,
    "debug": Debug,
    "version": Version,
}
Pairs = Annotated[
    list[str] | None,
    typer.Argument(
        help="Recipe file, recipe keys, or both; keys take precedence over the file.",
        metavar="[RECIPE.yaml] [KEY=VALUE ...]",
    ),
]


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb all common options, after its own and in one order; `main` reads --debug and --offline."""
    own = inspect.signature(function, eval_str=True)
    specific = [parameter for name, parameter in own.parameters.items() if name not in COMMON]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=own.parameters[name].annotation if name in own.parameters else kind,
        )
        for name, kind in COMMON.items()
    ]

    @functools.wraps(function)
    def call(**given: Any) -> None:
        function(**{name: given[name] for name in own.parameters})

    call.__signature__ = own.replace(parameters=[*specific, *options])  # type: ignore[attr-defined]
    return call


def new_console(as_json: bool, quiet: bool, verbose: bool = False) -> Console:
    """Return the output of a verb."""
    from tunesmith.console import Console

    return Console(level=-1 if quiet else int(verbose), to_stderr=as_json)


def emit(result: Any) -> None:
    """Print the JSON object of `--json`; only the first process of a group prints it."""
    if os.environ.get("RANK", "") in ("", "0"):
        print(json.dumps(result, ensure_ascii=False))


def check_new(file: Path, option: str = "--output") -> None:
    """Refuse an output file that exists, or whose folder does not.

    Raises:
        RecipeError: either of these.
    """
    if file.exists():
        raise RecipeError("the file exists and is not overwritten", where=str(file), hint=f"use another {option}")
    if not file.absolute().parent.is_dir():
        raise RecipeError("there is no such folder", where=str(file.parent), hint="create it first")


@contextmanager
def located(source: RecipeSource) -> Iterator[None]:
    """Add to a user's error the place of the recipe key that it names."""
    try:
        yield
    except UserError as error:
        raise source.locate(error) from error


def refuse_early(source: RecipeSource, *, overwrite: bool | None = None) -> None:
    """Refuse missing data, an invalid recipe and, unless `overwrite` is None, a taken output before slow imports.

    Raises:
        UserError: any of these, with the place of its key.
    """
    from tunesmith import recipe as recipes
    from tunesmith.data.formats import check_exists
    from tunesmith.storage.run_folder import claim

    with located(source):
        data, output = source.paths()
        for path in data:
            check_exists(path)
        if overwrite is not None and output is not None and output.is_dir():
            claim(output, resume=False, overwrite=overwrite)
        if recipes.load_stages(source) is None:
            recipes.load(source)


def split_words(words: list[str]) -> tuple[str | None, list[str]]:
    """Split words into a path, if the first word is one, and `KEY=VALUE` pairs."""
    has_path = bool(words) and ("=" not in words[0] or Path(words[0]).is_file())
    return (words[0], words[1:]) if has_path else (None, words)
