from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from builders import make_qwen2

import lorax_core as lorax
from lorax_core.errors import CheckpointError
from lorax_core.weights.hub import find_checkpoint

FIND = """
import json, sys
from lorax_core.errors import CheckpointError
from lorax_core.weights.hub import find_checkpoint

answers = []
for source, options in json.loads(sys.argv[1]):
    try:
        answers.append({"folder": str(find_checkpoint(source, **options))})
    except CheckpointError as error:
        answers.append({"message": error.message, "hint": error.hint})
print(json.dumps(answers))
"""
LOAD = """
import json, sys
import lorax_core as lorax

answers = []
for source, options in json.loads(sys.argv[1]):
    with lorax.load(source, kv_cache_tokens=64, **options) as engine:
        answers.append(list(engine.generate("the", max_tokens=8).token_ids))
print(json.dumps(answers))
"""
HANG_UP = 0  # instead of a status
SMALL = {"config.json": "{}", "model.safetensors": "weights"}


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


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


class Client(NamedTuple):
    """Runs code in new processes that know one hub and share one cache, as huggingface_hub reads both when imported."""

    hub: Hub
    home: Path

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
        """The folder that the hub's files of an id are in, or the refusal."""
        return self.run(FIND, (source, options), environ=environ)[0]


@pytest.fixture
def client(hub, tmp_path) -> Client:
    (tmp_path / "home").mkdir()
    return Client(hub, tmp_path / "home")


def write(folder: Path, files: Mapping[str, str] = SMALL) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def held(folder: str) -> dict[str, str]:
    files = (file for file in Path(folder).rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}


def generated(folder: Path) -> list[int]:
    with lorax.load(folder, kv_cache_tokens=64) as engine:
        return list(engine.generate("the", max_tokens=8).token_ids)


def test_a_folder_is_itself(tmp_path):
    assert find_checkpoint(tmp_path) == tmp_path
    assert find_checkpoint(str(tmp_path)) == tmp_path


def test_a_file_is_refused_with_its_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()

    with pytest.raises(CheckpointError, match="is a file") as caught:
        find_checkpoint(file)

    assert str(tmp_path) in caught.value.hint


@pytest.mark.parametrize(
    "source", ["./nowhere", "no-such-folder", "/no/such/folder", "a/b/c", "some where/else", "-x/y"]
)
def test_what_is_neither_a_folder_nor_an_id_is_refused_with_both_forms(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(source)

    assert repr(source) in caught.value.message
    assert "config.json" in caught.value.hint
    assert "Qwen/" in caught.value.hint


@pytest.mark.parametrize("source", ["acme/two--dashes", "acme/dots..dots", "acme/ends-", "acme/" + "x" * 100])
def test_an_id_that_the_hub_cannot_have_is_a_checkpoint_error_too(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(source)

    assert repr(source) in caught.value.message


def test_offline_an_id_that_was_never_downloaded_is_told_with_what_to_try_and_the_hub_is_not_asked(
    hub, client, tmp_path
):
    hub.add("acme/tiny", write(tmp_path / "repo"))

    plain, revised = client.run(
        FIND, ("acme/tiny", {}), ("acme/tiny", {"revision": "v2"}), environ={"HF_HUB_OFFLINE": "1"}
    )

    assert "there is no folder 'acme/tiny' here, and the hub did not give it: " in plain["message"]
    assert "the hub did not give it at revision 'v2': " in revised["message"]
    assert "offline, only what was downloaded before" in plain["hint"]
    assert hub.requests == []


def test_an_id_and_its_revisions_generate_what_their_folders_do(hub, client, qwen2, tmp_path):
    other = make_qwen2(tmp_path / "other", seed=5)
    hub.add("acme/tiny", qwen2)
    hub.add("acme/tiny", other, revision="v2")

    plain, revised = client.run(LOAD, ("acme/tiny", {}), ("acme/tiny", {"revision": "v2"}))

    assert plain == generated(qwen2)
    assert revised == generated(other) != plain


def test_offline_an_id_that_was_downloaded_is_answered_from_the_cache(hub, client, qwen2):
    hub.add("acme/tiny", qwen2)
    client.find("acme/tiny")
    hub.close()

    found = client.find("acme/tiny", environ={"HF_HUB_OFFLINE": "1"})

    assert generated(Path(found["folder"])) == generated(qwen2)


def test_a_hub_that_is_down_leaves_what_was_downloaded(hub, client, tmp_path):
    hub.add("acme/tiny", write(tmp_path / "repo"))
    first = client.find("acme/tiny")
    hub.close()

    again, never = client.run(FIND, ("acme/tiny", {}), ("acme/never-seen", {}))

    assert again == first
    assert "'acme/never-seen'" in never["message"]
    assert "only what was downloaded before" in never["hint"]


def test_a_second_look_downloads_no_file_again(hub, client, tmp_path):
    hub.add("acme/tiny", write(tmp_path / "repo"))
    first = client.find("acme/tiny")
    hub.requests.clear()

    again = client.find("acme/tiny")

    assert again == first
    assert hub.requests  # whether main moved is asked
    assert hub.downloaded() == set()


def test_main_that_moved_is_downloaded_and_its_commit_before_stays(hub, client, tmp_path):
    before = hub.add("acme/tiny", write(tmp_path / "before", {"config.json": "1"}))
    client.find("acme/tiny")
    hub.add("acme/tiny", write(tmp_path / "after", {"config.json": "2"}))

    moved, pinned = client.run(FIND, ("acme/tiny", {}), ("acme/tiny", {"revision": before}))

    assert held(moved["folder"]) == {"config.json": "2"}
    assert held(pinned["folder"]) == {"config.json": "1"}


def test_a_token_opens_a_private_model_and_goes_with_every_request_for_it(hub, client, tmp_path):
    hub.add("acme/private", write(tmp_path / "repo"), token="hf_right")

    found = client.find("acme/private", token="hf_right")

    assert held(found["folder"]) == SMALL
    assert {r.token for r in hub.requests if "acme/private" in r.path} == {"hf_right"}


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_wrong", 403)])
def test_a_private_model_without_the_right_token_is_refused_with_its_id_and_the_option(
    hub, client, tmp_path, token, status
):
    hub.add("acme/private", write(tmp_path / "repo"), token="hf_right")

    refused = client.find("acme/private", token=token)

    assert "'acme/private'" in refused["message"]
    assert "token=" in refused["hint"]
    assert {r.status for r in hub.requests if "acme/private" in r.path} == {status}
    assert token is None or token not in refused["message"]


def test_an_unknown_id_is_refused_by_its_name(hub, client):
    refused = client.find("acme/no-such-model")

    assert "'acme/no-such-model'" in refused["message"]
    assert "spelling" in refused["hint"]
    assert {r.status for r in hub.requests if "acme/" in r.path} == {404}


def test_an_unknown_revision_is_refused_with_id_and_revision(hub, client, tmp_path):
    hub.add("acme/tiny", write(tmp_path / "repo"))

    refused = client.find("acme/tiny", revision="v9")

    assert "'acme/tiny'" in refused["message"]
    assert "at revision 'v9'" in refused["message"]


def test_a_hub_that_answers_nonsense_is_a_checkpoint_error_too(hub, client):
    hub.pages = {"acme/hangs-up": b"", "acme/portal": b"<html>Log in to the network</html>"}

    hung_up, portal = client.run(FIND, ("acme/hangs-up", {}), ("acme/portal", {}))

    assert "'acme/hangs-up' here, and the hub did not give it" in hung_up["message"]
    assert "'acme/portal' here, and the hub did not give it" in portal["message"]
    assert {r.status for r in hub.requests if "/acme/" in r.path} == {HANG_UP, 200}


def test_an_endpoint_that_is_no_address_is_a_checkpoint_error_too(client):
    refused = client.find("acme/tiny", environ={"HF_ENDPOINT": "hub.example"})

    assert "the hub did not give it" in refused["message"]


def test_only_files_that_loading_reads_are_downloaded(hub, client, tmp_path):
    wanted = {
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "2_Dense_1024/model.safetensors",
    }
    unwanted = {
        "README.md",
        ".gitattributes",
        "pytorch_model.bin",
        "2_Dense/pytorch_model.bin",
        "onnx/config.json",
        "onnx/model.onnx",
        "checkpoint-500/model.safetensors",
        "original/tokenizer.model",
    }
    hub.add("acme/full", write(tmp_path / "repo", {name: f"this is {name}" for name in wanted | unwanted}))

    found = client.find("acme/full")

    assert held(found["folder"]).keys() == wanted
    assert hub.downloaded() == wanted


def test_a_folder_has_no_revisions(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder, which has no revision 'v2'"):
        find_checkpoint(tmp_path, revision="v2")
