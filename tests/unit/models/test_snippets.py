"""The general text: deterministic, from a package that is downloaded once."""

from __future__ import annotations

from pathlib import Path

import pytest
from loopback import StubIndex, sdist

from tunesmith.errors import ResourceError
from tunesmith.models import snippets

VADER = "vaderSentiment-3.3.2"


@pytest.fixture
def index(stub_index: StubIndex) -> StubIndex:
    films = "".join(f"{n}\t1.5\tfilm {n}\n" for n in range(250))
    editorials = "".join(f"{n}_{k}\t0.1\tsentence {k} of {n}.\n" for n in range(1, 31) for k in range(1, 4))
    inner = {
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": films.encode(),
        "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt": editorials.encode(),
    }
    source = {f"{VADER}/additional_resources/hutto_ICWSM_2014.tar.gz": sdist(inner)}
    stub_index.add("vadersentiment", f"{VADER}.tar.gz", sdist(source))
    return stub_index


def test_reviews_and_whole_editorials_evenly_from_all(index: StubIndex, home: Path) -> None:
    path = snippets.general_text(offline=False, say=lambda text: None)
    assert path == snippets.general_path() == home / "general.txt"
    documents = path.read_text(encoding="utf-8").strip().split("\n\n")
    assert len(documents) == snippets.NUM_REVIEWS + snippets.NUM_EDITORIALS
    assert documents[:2] == ["film 0", "film 2"] and documents[99] == "film 198"
    assert documents[100] == "sentence 1 of 1. sentence 2 of 1. sentence 3 of 1."
    asked = len(index.asked)
    assert snippets.general_text(offline=True, say=print) == path and len(index.asked) == asked


def test_without_a_connection_nothing_is_asked_and_nothing_left(
    index: StubIndex, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResourceError, match="--offline"):
        snippets.general_text(offline=True, say=print)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ResourceError, match="--offline"):
        snippets.general_text(offline=False, say=print)
    assert index.asked == [] and not snippets.general_path().exists()
