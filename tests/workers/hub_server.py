"""A server on loopback that speaks as much of the Hugging Face Hub's protocol as downloading a model takes."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME, GATED = "moon/light", "moon/gated"
REVISIONS = ("main", "v1.0", COMMIT)


@dataclass
class Hub:
    """Serves `files` as NAME; `requested` holds each path that was asked for, in order."""

    files: Path
    url: str = ""
    requested: list[str] = field(default_factory=list)

    def downloaded(self) -> set[str]:
        """The names of the files that were asked for."""
        start = f"/{NAME}/resolve/{COMMIT}/"
        return {path.removeprefix(start) for path in self.requested if path.startswith(start)}


@contextmanager
def running(files: Path) -> Iterator[Hub]:
    hub = Hub(files)

    class Handler(_Handler):
        served = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.requested.append(path)
        if path.startswith(f"/api/models/{GATED}"):
            return self._answer(403, b"Accept the terms first.", {"X-Error-Code": "GatedRepo"})
        if path.startswith(f"/api/models/{NAME}/revision/"):
            return self._revision(path.rpartition("/revision/")[2])
        if path == f"/api/models/{NAME}/tree/{COMMIT}":
            return self._json([_entry(self.served.files, file) for file in _files(self.served.files)])
        if path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            return self._file(self.served.files / path.rpartition(f"/{COMMIT}/")[2])
        return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _revision(self, revision: str) -> None:
        if revision not in REVISIONS:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return self._json({"id": NAME, "sha": COMMIT, "siblings": []})

    def _file(self, path: Path) -> None:
        content = path.read_bytes()
        self._answer(200, content, {"ETag": f'"{_sha1(content)}"', "X-Repo-Commit": COMMIT})

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the tests ask `requested`."""


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def _entry(root: Path, file: Path) -> dict[str, object]:
    content = file.read_bytes()
    return {"type": "file", "path": str(file.relative_to(root)), "size": len(content), "oid": _sha1(content)}


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
