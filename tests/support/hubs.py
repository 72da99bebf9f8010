"""A hub of this machine, and clients that know no other.

Decides nothing: the hub's HTTP interface as far as a download needs it, served from folders, for tests that fetch.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

HANG_UP = 0  # instead of a status


class Request(NamedTuple):
    """What a client asked of the hub, and the answer's status."""

    method: str
    path: str
    token: str | None
    status: int


class Hub:
    """The hub's HTTP interface as far as a download needs it, over folders, on a free port of this machine.

    A folder is a commit. A private repository answers 401 without a token and 403 with a wrong one.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Path]] = {}
        self.tokens: dict[str, str] = {}
        self.requests: list[Request] = []
        self.pages: dict[str, bytes] = {}  # said for a repository instead of an honest answer; empty hangs up
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def add(self, repo: str, folder: Path, revision: str = "main", token: str | None = None) -> str:
        """Publishes a folder; gives its commit."""
        commit = _commit(folder)
        self.repos.setdefault(repo, {}).update({revision: folder, commit: folder})
        if token:
            self.tokens[repo] = token
        return commit

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def downloaded(self) -> set[str]:
        """The files whose content was given out."""
        fetched = (r.path for r in self.requests if (r.method, r.status) == ("GET", 200) and "/resolve/" in r.path)
        return {path.split("/resolve/")[1].partition("/")[2] for path in fetched}

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path: /api/models/OWNER/NAME/... or /OWNER/NAME/resolve/..."""
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo, (verb, revision, *file) = "/".join(parts[:2]), [*parts[2:], "", ""]
        name = "/".join(part for part in file if part)
        if repo in self.pages:
            return 200 if self.pages[repo] else HANG_UP, {}, self.pages[repo]
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        if token != self.tokens.get(repo, token):
            return (403 if token else 401), {"X-Error-Message": "Access to this repository is restricted"}, b""
        if revision not in self.repos[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}, b""
        folder = self.repos[repo][revision]
        commit = _commit(folder)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if path.startswith("/api/") and verb == "revision":
            siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
            return 200, {}, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
        if path.startswith("/api/") and verb == "tree":
            return 200, {}, json.dumps([_tree_entry(file, folder) for file in files]).encode()
        if verb == "resolve" and folder / name in files:
            body = (folder / name).read_bytes()
            return 200, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit}, body
        return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b""


def _handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
            status, headers, body = hub.answer(path, token)
            hub.requests.append(Request(self.command, path, token, status))
            if status == HANG_UP:
                return
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: tests read `requests`."""

    return Handler


def _tree_entry(file: Path, folder: Path) -> dict[str, Any]:
    body = file.read_bytes()
    name = file.relative_to(folder).as_posix()
    return {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}


def _commit(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


class Client(NamedTuple):
    """Runs code in new processes that know one hub and share one cache, as huggingface_hub reads both when imported."""

    hub: Hub
    home: Path
    find_code: str  # which finds one source

    def run(
        self, code: str, *asked: tuple[str, Mapping[str, Any]], environ: Mapping[str, str] | None = None
    ) -> list[Any]:
        """What the code answers to each pair of an id and options, all in one process."""
        outside = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        env = {
            **outside,
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **(environ or {}),
        }
        command = [sys.executable, "-c", code, json.dumps(asked)]
        done = subprocess.run(command, env=env, cwd=self.home, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def find(self, source: str, *, environ: Mapping[str, str] | None = None, **options: Any) -> dict[str, str]:
        """What the code for it finds, or the refusal."""
        return self.run(self.find_code, (source, options), environ=environ)[0]


def write(folder: Path, files: Mapping[str, str]) -> Path:
    """The files of a folder, by their paths in it; gives the folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def held(folder: str) -> dict[str, str]:
    """Every file below a folder, by its path in it, but for the hashes that a cache keeps beside them."""
    files = (file for file in Path(folder).rglob("*") if file.is_file() and file.name != ".sha256.json")
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}
