"""Run folders: how they are recognized, and protection against overwriting one by accident."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import RecipeError

RECIPES = ("recipe.yaml", "stages.yaml")
"""Files that mark a folder as the output of a run, or of a recipe with stages."""

REPLACED = ".replaced"
"""Subfolder that holds the earlier run until the new one has started."""

RUN_FILES = re.compile(
    r"recipe\.yaml|stages\.(yaml|json)|run\.json|metrics\.jsonl|predictions-test\.jsonl|report\.html|README\.md"
    r"|checkpoints|adapter|base|model|\d+-[a-z-]+(-seed-\d+)?|without-seed-\d+|\.(lock|replaced|tmp-.*)"
)
"""Names of everything that a run, or a recipe with stages, writes into its folder."""


def runs_in(folder: Path) -> str:
    """Return the hint `use one of the runs in it: ...` if the folder contains runs; else an empty string."""
    runs = [str(path.parent) for path in sorted(folder.glob("*/recipe.yaml"))] if folder.is_dir() else []
    more = f" and {len(runs) - 5} more" if len(runs) > 5 else ""
    return f"use one of the runs in it: {', '.join(runs[:5])}{more}" if runs else ""


def samples_in(about: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the samples in the content of a `run.json`; early versions named prompt and reference differently."""
    names = {"asked": "prompt", "meant": "reference"}
    return [{names.get(key, key): text for key, text in sample.items()} for sample in about.get("samples") or []]


def check_run(folder: Path) -> None:
    """Check that a folder is a run folder.

    Raises:
        RecipeError: it is not.
    """
    if not (folder / "recipe.yaml").exists():
        hint = runs_in(folder) or "`tunesmith train` creates one"
        raise RecipeError("not a run folder", where=str(folder), hint=hint)


def claim(folder: Path, *, resume: bool, overwrite: bool, needed: Iterable[str | Path | None] = ()) -> None:
    """Check that a run may write into a folder.

    A new run needs an empty folder. With `overwrite` it may also replace an earlier run, unless the folder contains
    other files or one of the files in `needed` (recipe, data, model).

    Raises:
        RecipeError: it may not, or both `resume` and `overwrite` are given.
    """
    if resume and overwrite:
        raise RecipeError("--overwrite: cannot be combined with --resume", hint="use one of them")
    existing = [path for path in folder.iterdir() if path.name != ".lock"]
    if resume:
        return
    if existing and not overwrite:
        hint = f"use --resume {shlex.quote(str(folder))}, --overwrite, or another output=DIR"
        raise RecipeError("output: the folder is not empty", where=str(folder), hint=hint)
    if existing and not any((folder / name).exists() for name in RECIPES):
        raise RecipeError(
            "output: not a run folder, so not overwritten", where=str(folder), hint="set another output=DIR"
        )
    foreign = next((path.name for path in sorted(existing) if not RUN_FILES.fullmatch(path.name)), None)
    if foreign is not None:
        what = f"output: {foreign} is not part of a run, so the folder is not overwritten"
        raise RecipeError(what, where=str(folder), hint="move it, or set another output=DIR")
    home = folder.resolve()
    paths = [Path(path).expanduser() for path in needed if path is not None] if existing else []
    inside = next((path for path in paths if path.exists() and path.resolve().is_relative_to(home)), None)
    if inside is not None:
        what = f"output: the new run needs {inside} in it, so the folder is not overwritten"
        raise RecipeError(what, where=str(folder), hint="set another output=DIR")


def put_aside(folder: Path) -> None:
    """Move an earlier run into a subfolder, from which `put_back` restores it."""
    for path in [path for path in folder.iterdir() if path.name not in (".lock", REPLACED)]:
        (folder / REPLACED).mkdir(exist_ok=True)
        path.replace(folder / REPLACED / path.name)


def put_back(folder: Path) -> None:
    """Restore the earlier run that `put_aside` has moved."""
    if (folder / REPLACED).exists():
        for path in (folder / REPLACED).iterdir():
            path.replace(folder / path.name)
        (folder / REPLACED).rmdir()


def clear(folder: Path) -> None:
    """Remove an earlier run from a claimed folder, once the new one is known to be valid."""
    existing = [path for path in folder.iterdir() if path.name != ".lock"]
    for path in sorted(existing, key=lambda path: path.name in RECIPES):  # after a kill it is still a run folder
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
