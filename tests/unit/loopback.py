"""Servers on the loopback that replace a package index and the Hub, so that no test needs a network."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import tarfile
import threading
import zipfile
from dataclasses import dataclass
from typing import Any


class LoopbackServer:
    """Server that records requests and answers with `answer(method, path, headers) -> (status, headers, body)`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.failing: list[int | None] = []
        """Statuses to answer first; None hangs up in the middle of the body."""
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.asked.append((self.path, headers))
                failure: int | None = server.failing.pop(0) if server.failing else 200
                status, given, body = server.answer(self.command, self.path, headers)
                if failure not in (200, None):
                    status, given, body = int(failure or 0), {}, b"try again"
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body)), "Connection": "close"} | given).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body if failure is not None else body[: len(body) // 2])
                self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None: ...

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        raise NotImplementedError

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@dataclass
class Archive:
    """File of a project: its bytes, its metadata in the index, and its URL."""

    name: str
    content: bytes
    sha256: str | None = ""
    host: str = ""
    metadata: str | None = None


@dataclass
class Login:
    user: str
    password: str

    @property
    def header(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class StubIndex(LoopbackServer):
    """Simple index of the given archives, as HTML or JSON."""

    def __init__(self) -> None:
        self.projects: dict[str, list[Archive]] = {}
        self.as_json = False
        self.login: Login | None = None
        super().__init__()

    @property
    def url(self) -> str:
        return f"{self.address}/simple/"

    def url_with(self, credentials: str) -> str:
        return self.url.replace("://", f"://{credentials}@")

    def add(self, project: str, name: str, content: bytes, **about: Any) -> Archive:
        archive = Archive(name, content, **about)
        self.projects.setdefault(project, []).append(archive)
        return archive

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        if self.login and headers.get("authorization") != self.login.header:
            return 401, {"WWW-Authenticate": "Basic"}, b"who is there?"
        for project, archives in self.projects.items():
            if path == f"/simple/{project}/":
                return self._page(project, archives)
            for archive in archives:
                if path == f"/files/{archive.name}":
                    return 200, {}, archive.content
                if path == f"/files/{archive.name}.metadata":
                    return 200, {}, (archive.metadata or "").encode()
        return 404, {}, b"nothing here"

    def _page(self, project: str, archives: list[Archive]) -> tuple[int, dict[str, str], bytes]:
        files = []
        for archive in archives:
            digest = hashlib.sha256(archive.content).hexdigest() if archive.sha256 == "" else archive.sha256
            metadata = {"sha256": hashlib.sha256(archive.metadata.encode()).hexdigest()} if archive.metadata else False
            files.append(
                {
                    "filename": archive.name,
                    "url": f"{archive.host or self.address}/files/{archive.name}",
                    "hashes": {"sha256": digest} if digest else {},
                    "size": len(archive.content),
                    "core-metadata": metadata,
                }
            )
        if self.as_json:
            body = json.dumps({"meta": {"api-version": "1.0"}, "name": project, "files": files})
            return 200, {"Content-Type": "application/vnd.pypi.simple.v1+json"}, body.encode()
        links = []
        for one in files:
            digest = f"#sha256={one['hashes']['sha256']}" if one["hashes"] else ""
            metadata = f' data-core-metadata="sha256={one["core-metadata"]["sha256"]}"' if one["core-metadata"] else ""
            links.append(f'<a href="{one["url"]}{digest}"{metadata}>{one["filename"]}</a><br>')
        return 200, {"Content-Type": "text/html"}, f"<!DOCTYPE html><body>{''.join(links)}</body>".encode()


def wheel(members: dict[str, bytes]) -> bytes:
    """Return a wheel with these members."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, member in members.items():
            opened.writestr(name, member)
    return content.getvalue()


def sdist(members: dict[str, bytes]) -> bytes:
    """Return a source archive with these members."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as opened:
        for name, member in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(member)
            opened.addfile(info, io.BytesIO(member))
    return content.getvalue()


class StubHub(LoopbackServer):
    """The Hub's endpoints for downloading a model, for the given repositories."""

    SHA = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        super().__init__()

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0]
        for name, files in self.repositories.items():
            if path.startswith((f"/api/models/{name}/", f"/{name}/resolve/")):
                if name in self.gated:
                    return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"}, b""
                return self._of_repository(path, name, files)
        return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""

    def _of_repository(self, path: str, name: str, files: dict[str, bytes]) -> tuple[int, dict[str, str], bytes]:
        _, _, rest = path.partition(f"{name}/")
        call, _, rest = rest.partition("/")
        revision, _, file = rest.partition("/")
        if revision not in ("main", "v1", self.SHA):
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"}, b""
        as_json = {"Content-Type": "application/json"}
        if call == "revision":
            about = {"id": name, "sha": self.SHA, "siblings": [{"rfilename": file} for file in files]}
            return 200, as_json, json.dumps(about).encode()
        if call == "tree":
            tree = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in files.items()
            ]
            return 200, as_json, json.dumps(tree).encode()
        if call == "resolve" and file in files:
            etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
            return 200, {"ETag": etag, "X-Repo-Commit": self.SHA}, files[file]
        return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"}, b""
