"""Which folders are runs, and that no run is written over unless somebody says so."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from tunesmith.errors import RecipeError

RECIPES = ("recipe.yaml", "stages.yaml")
"""What makes a folder that of a run, or of a recipe's stages."""


def runs_in(folder: Path) -> str:
    """`name one of the runs in it: ...` where a folder holds runs, as that of a recipe's stages does."""
    runs = [str(path.parent) for path in sorted(folder.glob("*/recipe.yaml"))] if folder.is_dir() else []
    more = f" and {len(runs) - 5} more" if len(runs) > 5 else ""
    return f"name one of the runs in it: {', '.join(runs[:5])}{more}" if runs else ""


def check_run(folder: Path) -> None:
    """See that a folder holds a run.

    Raises:
        RecipeError: it does not.
    """
    if not (folder / "recipe.yaml").exists():
        hint = runs_in(folder) or "`tunesmith train` makes one"
        raise RecipeError("no run in this folder", where=str(folder), hint=hint)


def claim(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """See that a folder may have this run: never write over what is there unless told to.

    Raises:
        RecipeError: there is something already, or both are asked for.
    """
    if resume and overwrite:
        raise RecipeError("--overwrite: starts afresh, --resume goes on with what is there", hint="keep one")
    taken = [path for path in folder.iterdir() if path.name != ".lock"]
    if resume:
        return
    if taken and not overwrite:
        again = f"--resume {shlex.quote(str(folder))} goes on with it"
        hint = f"{again}, --overwrite starts afresh, output=DIR puts the new run elsewhere"
        raise RecipeError("output: the folder is not empty", where=str(folder), hint=hint)
    if taken and not any((folder / name).exists() for name in RECIPES):
        raise RecipeError("output: not a run folder, so it is not overwritten", where=str(folder), hint="output=DIR")


def clear(folder: Path) -> None:
    """Remove an earlier run from a claimed folder, once the new one is known to be sound."""
    taken = [path for path in folder.iterdir() if path.name != ".lock"]
    for path in sorted(taken, key=lambda path: path.name in RECIPES):  # a kill leaves what may be overwritten
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
