"""Movie reviews and editorials from a small package (vaderSentiment 3.3.2, MIT; Hutto & Gilbert, ICWSM 2014)."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Literal

from tunesmith.errors import ResourceError
from tunesmith.models import archives, package_index
from tunesmith.models.sources import cache_home, is_offline

NUM_REVIEWS, NUM_EDITORIALS = 100, 20
"""Size of the general text: about 8,000 tokens."""

Kind = Literal["movieReviewSnippets", "nytEditorialSnippets"]


def snippets(kind: Kind, *, offline: bool, say: Callable[[str], None]) -> list[tuple[str, float, str]]:
    """Return (id, mean rating from -4 to 4, text) of all snippets of a kind.

    Raises:
        ResourceError: the package cannot be downloaded.
    """
    folder = cache_home() / "pypi" / "vadersentiment-3.3.2-sdist"
    fetched = package_index.fetch(
        "vaderSentiment", "3.3.2", "sdist", lambda name: name.endswith("hutto_ICWSM_2014.tar.gz"), folder,
        offline=offline or is_offline(), say=say,
    )  # fmt: skip
    inner = next(fetched.folder.rglob("hutto_ICWSM_2014.tar.gz"))
    archives.extract(inner, lambda name: name.endswith(f"/{kind}_GroundTruth.txt"), folder)
    rated = (folder / "hutto_ICWSM_2014" / f"{kind}_GroundTruth.txt").read_text(encoding="utf-8", errors="replace")
    rows = (line.split("\t", 2) for line in rated.splitlines())
    return [(number, float(rating), text.strip()) for number, rating, text in rows]


def general_path() -> Path:
    """Return the path of the general text, which may not exist yet."""
    return cache_home() / "general.txt"


def general_text(*, offline: bool, say: Callable[[str], None]) -> Path:
    """Return the file of general English text (movie reviews and editorials), one document per paragraph.

    Raises:
        ResourceError: it cannot be downloaded.
    """
    path = general_path()
    if not path.exists():
        reviews = [text for _, _, text in snippets("movieReviewSnippets", offline=offline, say=say)]
        parts = groupby(
            snippets("nytEditorialSnippets", offline=offline, say=say), key=lambda row: row[0].partition("_")[0]
        )
        editorials = [" ".join(text for _, _, text in part) for _, part in parts]
        chosen = [*_every_nth(reviews, NUM_REVIEWS), *_every_nth(editorials, NUM_EDITORIALS)]
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        temporary.write_text("\n\n".join(chosen) + "\n", encoding="utf-8")
        temporary.replace(path)
    return path


def fetch_general(spec: str, say: Callable[[str], None], *, offline: bool) -> list[str]:
    """Download the general text if `task.general` is `default`; return a note if that fails."""
    if spec != "default":
        return []
    try:
        general_text(offline=offline, say=say)
    except ResourceError as error:
        return [f"forgetting is not measured: no general text ({error})"]
    return []


def general_files(spec: str) -> dict[str, str]:
    """Return the evaluation split for `task.general`; empty if it is `none` or not available."""
    if spec == "default":
        return {"general": str(general_path())} if general_path().exists() else {}
    return {} if spec == "none" else {"general": spec}


def _every_nth(texts: list[str], count: int) -> list[str]:
    """Return evenly spaced texts."""
    return texts[:: max(1, len(texts) // count)][:count]
