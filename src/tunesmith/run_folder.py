"""Which folders are runs, and that no run is written over unless somebody says so."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from tunesmith.errors import RecipeError

RECIPES = ("recipe.yaml", "stages.yaml")
"""What makes a folder that of a run, or of a recipe's stages."""

REPLACED = ".replaced"
"""Where what is overwritten lies until what replaces it has begun."""

WRITTEN = re.compile(
    r"recipe\.yaml|stages\.(yaml|json)|run\.json|metrics\.jsonl|predictions-test\.jsonl|report\.html|README\.md"
    r"|checkpoints|adapter|base|model|\d+-[a-z-]+(-seed-\d+)?|without-seed-\d+|\.(lock|replaced|tmp-.*)"
)
"""All that a run, or a recipe's stages, put into their folder."""


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


def claim(folder: Path, *, resume: bool, overwrite: bool, needed: Iterable[str | Path | None] = ()) -> None:
    """See that a folder may have this run: never write over what is there unless told to, and then over runs alone that
    hold nothing that this one has `needed`: its recipe, its data, its model.

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
    other = next((path.name for path in sorted(taken) if not WRITTEN.fullmatch(path.name)), None)
    if other is not None:
        what = f"output: no run has written {other} there, so the folder is not overwritten"
        raise RecipeError(what, where=str(folder), hint="move it away, or output=DIR")
    home = folder.resolve()
    paths = [Path(one).expanduser() for one in needed if one is not None] if taken else []
    inside = next((path for path in paths if path.exists() and path.resolve().is_relative_to(home)), None)
    if inside is not None:
        what = f"output: {inside} lies in it and is needed, so the folder is not overwritten"
        raise RecipeError(what, where=str(folder), hint="output=DIR")


def put_aside(folder: Path) -> None:
    """Move what is overwritten into a folder of its own, from which `put_back` takes it."""
    for path in [path for path in folder.iterdir() if path.name not in (".lock", REPLACED)]:
        (folder / REPLACED).mkdir(exist_ok=True)
        path.replace(folder / REPLACED / path.name)


def put_back(folder: Path) -> None:
    """The inverse of `put_aside`, where nothing has taken its place."""
    if (folder / REPLACED).exists():
        for path in (folder / REPLACED).iterdir():
            path.replace(folder / path.name)
        (folder / REPLACED).rmdir()


def clear(folder: Path) -> None:
    """Remove an earlier run from a claimed folder, once the new one is known to be sound."""
    taken = [path for path in folder.iterdir() if path.name != ".lock"]
    for path in sorted(taken, key=lambda path: path.name in RECIPES):  # a kill leaves what may be overwritten
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
