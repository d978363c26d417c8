"""`--offline` opens no connection: Python's audit events for sockets are recorded while the commands run."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from loopback import StubHub, StubIndex

QUICK = ("train.max_steps=2", "train.batch_size=8", "train.precision=fp32", "train.device=cpu")
seen: deque[str] = deque(maxlen=100)


def _record(event: str, args: tuple[Any, ...]) -> None:
    """Record sockets, name lookups and subprocesses, except Python's queries about this machine."""
    local = event == "socket.gethostname" or (event == "socket.__new__" and args[1] == socket.AF_UNIX)
    program = event == "subprocess.Popen" and args[1][0] != "uname"
    if program or (event.startswith("socket.") and not local):
        seen.append(event)


@pytest.fixture(scope="module", autouse=True)
def recording() -> None:
    """Install the audit hook, which cannot be removed."""
    sys.addaudithook(_record)


@pytest.fixture(autouse=True)
def only_the_option(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove the offline variables that the other tests set for the libraries."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert not huggingface_hub.is_offline_mode()
    yield
    os.environ.pop("HF_HUB_OFFLINE", None)  # the command line sets it


Prepare = Callable[[], str]


@pytest.fixture
def from_index(stub_index: StubIndex, model_wheel: bytes, command: Any) -> Prepare:
    def fetch() -> str:
        stub_index.add("tiny-bert", "tiny_bert-1.0-py3-none-any.whl", model_wheel)
        assert command("models", "path", "pypi:tiny-bert==1.0")[0] == 0
        return "pypi:tiny-bert==1.0"

    return fetch


@pytest.fixture
def from_hub(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """A Hub model in huggingface_hub's cache layout."""

    def fetch() -> str:
        kept = tmp_path / "hub" / "models--org--tiny"
        (kept / "snapshots").mkdir(parents=True)
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text(StubHub.SHA)
        (kept / "snapshots" / StubHub.SHA).symlink_to(tiny_bert)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return "org/tiny"

    return fetch


def test_the_record_sees_a_connection(from_index: Prepare) -> None:
    seen.clear()
    from_index()
    assert {"socket.connect", "socket.getaddrinfo"} <= set(seen)


@pytest.mark.parametrize("kind", ("from_index", "from_hub"))
def test_train_evaluate_and_predict_open_no_socket(
    kind: str, request: pytest.FixtureRequest, command: Any, reviews_csv: Path, tmp_path: Path
) -> None:
    model = request.getfixturevalue(kind)()
    seen.clear()
    run = str(tmp_path / "run")
    given = ("task=text-classification", f"model={model}", f"data.train={reviews_csv}", "data.test=0.2", *QUICK)
    for words in (
        ("train", *given, f"output={run}", "technique=lora", "--json"),
        ("train", "--resume", run, "--json"),
        ("evaluate", run, "--json"),
        ("evaluate", run, "--base", "--json"),
        ("predict", run, "the film was great", "--json"),
        ("models", "path", model, "--json"),
    ):
        code, out, err = command(*words, "--offline")
        assert code == 0 and json.loads(out), err
        assert not seen, f"{words[0]} --offline: {seen}"


@pytest.mark.parametrize("model", ("org/none", "pypi:none==1.0"))
def test_what_would_have_to_be_fetched_is_refused(
    model: str, command: Any, reviews_csv: Path, tmp_path: Path, stub_index: StubIndex
) -> None:
    seen.clear()
    given = ("task=text-classification", f"model={model}", f"data.train={reviews_csv}", f"output={tmp_path / 'run'}")
    code, out, err = command("train", *given, *QUICK, "--offline")
    assert code == 4 and out == "" and "run once without --offline" in err
    assert not seen and stub_index.asked == []
