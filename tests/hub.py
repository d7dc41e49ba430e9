"""A model and dataset hub on 127.0.0.1 that serves local folders over the hub's HTTP protocol.

The client side is the ordinary `huggingface_hub`, `transformers` or `datasets`, in a process whose
environment is `Hub.environment()`; the suite's own process stays offline.

    root/models/ORG/NAME/...         revision main of a model
    root/datasets/ORG/NAME/...       revision main of a dataset
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_API = re.compile(
    rf"/api/(?P<kind>models|datasets)/{_REPO}(/(?P<call>revision|tree|paths-info|refs)(/(?P<rest>.*))?)?"
)
_UPLOAD = re.compile(rf"/api/models/{_REPO}/(?P<call>preupload/main|commit/main|auth-check/write)")
_FILE = re.compile(rf"/((?P<kind>datasets)/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_DATE = "2026-01-01T00:00:00.000Z"


class Hub:
    """What the server serves and how it misbehaves; all of it may change while it runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fail_every = 0
        """Answer every n-th request with 503; 0 never does."""
        self.gone: set[str] = set()
        """Repositories that are not there any more."""
        self.token = "hf_fixture"
        self.requests: list[str] = []
        """Method and path of every request so far."""
        self.url = ""

    def environment(self, cache: Path, **changes: str) -> dict[str, str]:
        """Environment variables of a client process: this hub, and a cache of its own."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(cache),
            **changes,
        }

    def folder(self, kind: str, repo: str, revision: str) -> Path | None:
        """Folder of a repository at a branch, tag or commit; None if there is none."""
        folder = self.root / kind / repo
        return folder if revision in ("main", commit(folder)) else None


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """Serve `root` until the block ends."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def commit(folder: Path) -> str:
    """A hash of names and contents, as good as git's."""
    digest = hashlib.sha1(usedforsecurity=False)
    for file in _files(folder):
        digest.update(file.relative_to(folder).as_posix().encode() + _etag(file).encode())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    entry: dict[str, Any] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    if path.is_file():
        entry |= {"type": "file", "oid": _etag(path), "size": path.stat().st_size}
    return entry


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.fail_every and len(self.hub.requests) % self.hub.fail_every == 0:
            return self._send(503, b"try again")
        if path == "/api/validate-yaml":
            return self._json({"warnings": [], "errors": []})
        upload = _UPLOAD.fullmatch(path)
        if upload and self.hub.token not in self.headers.get("Authorization", ""):
            return self._fail(401, "Unauthorized", "no token")
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            (self.hub.root / "models" / repo).mkdir(parents=True, exist_ok=True)
            return self._json({"url": f"{self.hub.url}/{repo}"})
        if upload:
            return self._upload(upload["repo"], upload["call"], body)
        call = _API.fullmatch(path) or _FILE.fullmatch(path)
        if call is None:
            return self._send(404, b"no such route")
        kind, repo = call["kind"] or "models", call["repo"]
        if repo in self.hub.gone or not (self.hub.root / kind / repo).is_dir():
            return self._fail(404, "RepoNotFound", f"Repository {repo} not found")
        if call.re is _FILE:
            return self._resolve(kind, repo, call["revision"], call["path"])
        return self._api(kind, repo, call["call"], call["rest"] or "", body)

    def _api(self, kind: str, repo: str, call: str | None, rest: str, body: bytes) -> None:
        if call == "refs":
            target = {"name": "main", "ref": "refs/heads/main", "targetCommit": "0" * 40}
            return self._json({"branches": [target], "tags": [], "converts": []})
        revision, _, inner = rest.partition("/")
        folder = self.hub.folder(kind, repo, revision or "main")
        if folder is None:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if call == "tree":
            recursive = "recursive" in self.path and "recursive=false" not in self.path.lower()
            top = folder / inner
            if not top.is_dir():
                return self._fail(404, "EntryNotFound", f"{inner} does not exist")
            found = sorted(top.rglob("*") if recursive else top.iterdir())
            return self._json([_entry(path, folder) for path in found])
        if call == "paths-info":
            asked = self._paths(body)
            found = [folder / path for path in asked if (folder / path).exists()]
            return self._json([_entry(path, folder) for path in found])
        siblings = [{"rfilename": f.relative_to(folder).as_posix()} for f in _files(folder)]
        info = {"_id": repo, "id": repo, "modelId": repo, "sha": commit(folder), "tags": []}
        about = {"private": False, "disabled": False, "downloads": 0, "likes": 0, "gated": False}
        dates = {"lastModified": _DATE, "createdAt": _DATE}
        return self._json(info | about | dates | {"siblings": siblings})

    def _upload(self, repo: str, call: str, body: bytes) -> None:
        if call == "auth-check/write":
            return self._json({})
        if call == "preupload/main":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self._json({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                path = self.hub.root / "models" / repo / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        url = f"{self.hub.url}/{repo}/commit/main"
        return self._json({"commitUrl": url, "commitOid": "0" * 40, "pullRequestUrl": None})

    def _paths(self, body: bytes) -> list[str]:
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(body)["paths"]
            return paths if isinstance(paths, list) else [paths]
        return parse_qs(body.decode()).get("paths", [])

    def _resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        folder = self.hub.folder(kind, repo, revision)
        if folder is None:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        file = folder / path
        if not file.is_file():
            return self._fail(404, "EntryNotFound", f"{path} does not exist")
        data = file.read_bytes()
        headers = {
            "ETag": f'"{_etag(file)}"',
            "X-Repo-Commit": commit(folder),
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'inline; filename="{file.name}"',
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, data, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self._send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._send(206, data[first : last + 1], headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
