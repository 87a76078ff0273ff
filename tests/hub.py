"""A stand-in for a Hugging Face hub on loopback: the endpoints that the library calls to make and fill a repository.

Files are taken as regular ones, whatever their size: where they lie on a real hub (LFS, Xet) is its own matter.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

FIRST = "0" * 39 + "1"
ATTRIBUTES = b"*.safetensors filter=lfs\n"


class Hub:
    """Repositories by name, branches by name, files by path."""

    def __init__(self, token: str):
        self.token, self.repos = token, {}  # {repo: {branch: {path: bytes}}}
        self.commits: list[tuple[str, str, list[str]]] = []  # branch, message, paths
        self.fail_at: int | None = None  # commits after which every further one is refused
        self.spoil: str | None = None  # a path that arrives as something else
        self.requests: list[str] = []

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match method, parts:
            case "POST", ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}
            case "GET", ["api", "models", owner, name, "commits", branch]:
                return 200, self._log(f"{owner}/{name}", branch)
            case "GET", ["api", "models", owner, name, "tree", branch]:
                return 200, self._tree(self.repos[f"{owner}/{name}"][branch])
            case "GET", ["api", "models", owner, name, *_]:
                return 200, {"id": f"{owner}/{name}", "sha": FIRST, "siblings": []}
            case "POST", ["api", "models", owner, name, "branch", branch]:
                return self._branch(f"{owner}/{name}", branch, json.loads(body))
            case "POST", ["api", "models", owner, name, "preupload", branch]:
                return 200, self._modes(self.repos[f"{owner}/{name}"][branch], json.loads(body))
            case "POST", ["api", "models", owner, name, "commit", branch]:
                return self._commit(f"{owner}/{name}", branch, body)
        return 404, {"error": f"no such endpoint: {method} {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"/{repo}"}
        self.repos[repo] = {"main": {".gitattributes": ATTRIBUTES}}
        return 200, {"url": f"/{repo}", "id": repo, "name": repo}

    def _log(self, repo: str, branch: str) -> list[dict[str, Any]]:
        titles = [title for of, title, _ in reversed(self.commits) if of == branch]
        entry = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "message": ""}
        found = [{**entry, "id": f"{i:040x}", "title": title} for i, title in enumerate(titles, 2)]
        return [*found, {**entry, "id": FIRST, "title": "initial commit"}]

    def _tree(self, held: dict[str, bytes]) -> list[dict[str, Any]]:
        return [{"type": "file", "path": p, "size": len(data), "oid": blob(data)} for p, data in sorted(held.items())]

    def _branch(self, repo: str, branch: str, asked: dict[str, Any]) -> tuple[int, Any]:
        if branch in self.repos[repo]:
            return 409, {"error": "Reference already exists"}
        assert asked["startingPoint"] == FIRST, "a branch holds an export and nothing else"
        self.repos[repo][branch] = {".gitattributes": ATTRIBUTES}
        return 200, {}

    def _modes(self, held: dict[str, bytes], asked: dict[str, Any]) -> dict[str, Any]:
        entry = {"uploadMode": "regular", "shouldIgnore": False}
        names = [file["path"] for file in asked["files"]]
        return {"files": [{**entry, "path": p, **({"oid": blob(held[p])} if p in held else {})} for p in names]}

    def _commit(self, repo: str, branch: str, body: bytes) -> tuple[int, Any]:
        if self.fail_at is not None and len(self.commits) >= self.fail_at:
            return 403, {"error": "no more"}
        lines = [json.loads(line) for line in body.splitlines()]
        title, taken = lines[0]["value"]["summary"], []
        for line in lines[1:]:
            assert line["key"] == "file", line["key"]
            path, data = line["value"]["path"], base64.b64decode(line["value"]["content"])
            self.repos[repo][branch][path] = b"spoilt" if path == self.spoil else data
            taken.append(path)
        self.commits.append((branch, title, taken))
        return 200, {"commitUrl": f"/{repo}/commit/{FIRST}", "commitOid": FIRST, "success": True}


def blob(data: bytes) -> str:
    """As git names it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving(token: str) -> Iterator[tuple[Hub, str]]:
    """The hub, and its address."""
    hub = Hub(token)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                status, value = 401, {"error": f"Invalid credentials: {self.headers.get('Authorization')}"}
            else:
                status, value = hub.answer(self.command, path, body)
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _do  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
