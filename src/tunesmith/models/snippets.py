"""Film reviews and editorials out of a small package (vaderSentiment 3.3.2, MIT; Hutto & Gilbert, ICWSM 2014)."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Literal

from tunesmith.errors import ResourceError
from tunesmith.models import archives, package_index
from tunesmith.models.sources import cache_home, told_offline

REVIEWS, EDITORIALS = 100, 20
"""How many of each make the general text: some 8,000 tokens."""

Kind = Literal["movieReviewSnippets", "nytEditorialSnippets"]


def snippets(kind: Kind, *, offline: bool, say: Callable[[str], None]) -> list[tuple[str, float, str]]:
    """(number, mean rating from -4 to 4, text) of all snippets of a kind.

    Raises:
        ResourceError: the package is not here, and cannot be fetched.
    """
    folder = cache_home() / "pypi" / "vadersentiment-3.3.2-sdist"
    fetched = package_index.fetch(
        "vaderSentiment", "3.3.2", "sdist", lambda name: name.endswith("hutto_ICWSM_2014.tar.gz"), folder,
        offline=offline or told_offline(), say=say,
    )  # fmt: skip
    inner = next(fetched.folder.rglob("hutto_ICWSM_2014.tar.gz"))
    archives.extract(inner, lambda name: name.endswith(f"/{kind}_GroundTruth.txt"), folder)
    rated = (folder / "hutto_ICWSM_2014" / f"{kind}_GroundTruth.txt").read_text(encoding="utf-8", errors="replace")
    rows = (line.split("\t", 2) for line in rated.splitlines())
    return [(number, float(rating), text.strip()) for number, rating, text in rows]


def general_path() -> Path:
    """Where the general text lies, if it is on this machine."""
    return cache_home() / "general.txt"


def general_text(*, offline: bool, say: Callable[[str], None]) -> Path:
    """English that is of no field: film reviews and editorials, a document a paragraph.

    Raises:
        ResourceError: it is not here, and cannot be fetched.
    """
    path = general_path()
    if not path.exists():
        reviews = [text for _, _, text in snippets("movieReviewSnippets", offline=offline, say=say)]
        parts = groupby(
            snippets("nytEditorialSnippets", offline=offline, say=say), key=lambda one: one[0].partition("_")[0]
        )
        editorials = [" ".join(text for _, _, text in part) for _, part in parts]
        chosen = [*_some(reviews, REVIEWS), *_some(editorials, EDITORIALS)]
        writing = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        writing.write_text("\n\n".join(chosen) + "\n", encoding="utf-8")
        writing.replace(path)
    return path


def fetch_general(spec: str, say: Callable[[str], None], *, offline: bool) -> list[str]:
    """Fetch the general text if `task.general` asks for it; a note where that cannot be."""
    if spec != "default":
        return []
    try:
        general_text(offline=offline, say=say)
    except ResourceError as error:
        return [f"what was forgotten is not scored, for want of the general text ({error})"]
    return []


def general_files(spec: str) -> dict[str, str]:
    """What `task.general` names, as a split to be scored; nothing where it names none or that is not here."""
    if spec == "default":
        return {"general": str(general_path())} if general_path().exists() else {}
    return {} if spec == "none" else {"general": spec}


def _some(texts: list[str], count: int) -> list[str]:
    """Evenly from all of them."""
    return texts[:: max(1, len(texts) // count)][:count]
