"""`lorax adapters list`: a running server, asked; and servers that are none."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

UPPER = {"name": "upper", "source": "org/upper", "kind": "lora", "task": None, "ranks": [8, 16], "nbytes": 12_345}
LOADED = {"adapters": [{**UPPER, "where": "device"}]}
KEY = "admin-key-3"


class Handler(BaseHTTPRequestHandler):
    """Answers as `lorax serve` does, and at some paths as others do."""

    def do_GET(self):
        if self.path.startswith("/elsewhere"):
            self.send_response(302)
            self.send_header("Location", "/v1/adapters")
            self.end_headers()
        elif self.path.startswith("/page"):
            self.answer(200, b"<html>")
        elif self.path.startswith("/list"):
            self.answer(200, b"[1]")
        elif self.headers.get("Authorization") != f"Bearer {KEY}":
            said = {"error": {"message": "this route needs the admin key", "hint": "Authorization: Bearer KEY"}}
            self.answer(401, json.dumps(said).encode())
        else:
            self.answer(200, json.dumps(LOADED).encode())

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_adapters_of_a_server_are_listed(main, url, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAX_ADMIN_KEY", KEY)
    (tmp_path / "key").write_text(f"# mine\n{KEY}\n")

    code, out, _ = main("adapters", "list", "--url", url)
    monkeypatch.delenv("LORAX_ADMIN_KEY")
    _, data, _ = main("adapters", "list", "--url", url + "/", "--admin-key-file", str(tmp_path / "key"), "--json")

    assert code == 0
    assert out.splitlines()[1].split() == ["upper", "org/upper", "lora", "-", "8,", "16", "12,345", "device"]
    assert json.loads(data)["adapters"] == LOADED["adapters"]


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("", "refuses: this route needs the admin key"),
        ("", "set LORAX_ADMIN_KEY"),
        ("/elsewhere", "refuses: status 302"),
        ("/page", "gives no answer that can be read"),
        ("/list", "gives no JSON object"),
    ],
)
def test_what_is_no_answer_is_an_error_with_the_next_step(main, url, path, complaint):
    code, out, err = main("adapters", "list", "--url", url + path)

    assert (code, out) == (1, "")
    assert complaint in err
    assert "hint: " in err


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://127.0.0.1:1", "Connection refused"),
        ("file:///etc/passwd", "is no address of a server"),
        ("localhost:8000", "is no address of a server"),
        ("http://[", "gives no answer"),
        ("http://a b", "gives no answer"),
    ],
)
def test_a_server_that_is_not_there_is_an_error(main, url, complaint):
    code, out, err = main("adapters", "list", "--url", url)

    assert (code, out) == (1, "")
    assert complaint in err
