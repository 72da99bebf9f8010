"""`lorax adapters list`: a running server, asked; and servers that are none."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lorax_core.cli.remote import ask, events
from lorax_core.errors import RequestError

UPPER = {"name": "upper", "source": "org/upper", "kind": "lora", "task": None, "ranks": [8, 16], "nbytes": 12_345}
LOADED = {"adapters": [{**UPPER, "where": "device"}]}
STATS = {"model": "m", "adapters": [{"name": "lower", "kind": "lora", "task": None, "nbytes": 7, "where": "disk"}]}
KEY = "admin-key-3"
API_KEY = "api-key-3"
# Status, body and headers of answers that are wrong.
CHUNKED = {"Transfer-Encoding": "chunked"}
WRONG = {
    "page": (200, b"<html>", {}),
    "list": (200, b"[1]", {}),
    "deep": (200, b"[" * 200_000, {}),
    "nested": (200, b'{"adapters": ' + b"[" * 200 + b"]" * 200 + b"}", {}),
    "number": (200, b'{"adapters": 5}', {}),
    "rows": (200, b'{"adapters": [1]}', {}),
    "infinite": (200, b'{"adapters": [{"name": 1e999}]}', {}),
    "surrogate": (200, b'{"adapters": [{"name": "\\ud800"}]}', {}),
    "chunk": (200, b"zz\r\n{", CHUNKED),
    "large": (200, b" " * (16 * 2**20 + 1), {}),
    "deep-error": (500, b'{"error":' * 200_000, {}),
    "forbidden": (403, b'{"error": "not yours"}', {}),
    "hint": (400, b'{"error": {"message": "no", "hint": {"a": 1}}}', {}),
    "long": (400, json.dumps({"error": {"message": "A" * 10_000, "hint": "B" * 10_000}}).encode(), {}),
    "chunk-error": (500, b"zz\r\n{", CHUNKED),
    "short-error": (500, b'{"er', {"Content-Length": "1000"}),
}
GOOD = b': a comment\n\nevent: message\ndata: {"n": 1}\n\ndata:{"n": 2}\r\n\r\n'
STREAMS = {
    "whole": GOOD + b'data: [DONE]\n\ndata: {"n": 3}\n\n',
    "null": b'data:\n\ndata: {"n": 1, "error": null}\n\ndata: {"n": 2, "error": null}\n\ndata: [DONE]\n\n',
    "cut": GOOD,
    "half": GOOD + b'data: {"n": 3',
    "silent": GOOD,
    "failed": GOOD + b'data: {"error": {"message": "out of memory", "hint": "ask for less"}}\n\ndata: [DONE]\n\n',
    "text": GOOD + b'data: {"error": "overloaded"}\n\n',
    "garbage": GOOD + b"data: <html>\n\n",
    "numbers": GOOD + b"data: 3\n\n",
    "large-event": GOOD + b"data: " + b" " * 2**20 + b"\n\n",
    "chunk-cut": b"%x\r\n%s\r\n40\r\ndata:" % (len(GOOD), GOOD),
}


class Handler(BaseHTTPRequestHandler):
    """Answers as `lorax serve` does, and at some paths as others do."""

    def do_POST(self):
        self.server.posted = self.rfile.read(int(self.headers["Content-Length"]))
        if (stream := self.path.split("/")[1]) not in STREAMS:
            self.do_GET()
        else:
            self.answer(200, STREAMS[stream], CHUNKED if stream == "chunk-cut" else {})
            if stream == "silent":
                self.server.over.wait()

    def do_GET(self):
        if self.path.startswith("/elsewhere"):
            self.send_response(302)
            self.send_header("Location", "/v1/adapters")
            self.end_headers()
        elif self.path.startswith("/slow"):
            self.answer(200, b"{", {"Content-Length": "2"})
            self.server.over.wait()
        elif (wrong := self.path.split("/")[1]) in WRONG:
            self.answer(*WRONG[wrong])
        elif self.path == "/stats" and self.headers.get("Authorization") == f"Bearer {API_KEY}":
            self.answer(200, json.dumps(STATS).encode(), {})
        elif self.headers.get("Authorization") != f"Bearer {KEY}":
            said = {"error": {"message": "this route needs a key", "hint": "Authorization: Bearer KEY"}}
            self.answer(401, json.dumps(said).encode(), {})
        else:
            self.answer(200, json.dumps(LOADED).encode(), {})

    def answer(self, status, body, headers):
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.over = threading.Event()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.over.set()
        server.shutdown()
        thread.join()


def test_the_adapters_of_a_server_are_listed(main, url, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAX_ADMIN_KEY", KEY)
    (tmp_path / "key").write_text(f"# mine\n{KEY}\n")

    code, out, _ = main("adapters", "list", "--url", url)
    monkeypatch.delenv("LORAX_ADMIN_KEY")
    _, data, _ = main("adapters", "list", "--url", url + "/", "--admin-key-file", str(tmp_path / "key"), "--json")
    monkeypatch.setenv("LORAX_ADMIN_KEY", "another-key-3")
    named, _, _ = main("adapters", "list", "--url", url, "--admin-key-file", str(tmp_path / "key"))

    assert (code, named) == (0, 0)
    assert out.splitlines()[1].split() == ["upper", "org/upper", "lora", "-", "8,", "16", "12,345", "device"]
    assert json.loads(data)["adapters"] == LOADED["adapters"]


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("", "refuses: this route needs a key"),
        ("", "set LORAX_ADMIN_KEY"),
        ("/v1/", "set LORAX_ADMIN_KEY"),
        ("/elsewhere", "refuses: status 302, which sends elsewhere"),
        ("/page", "gives no answer that can be read"),
        ("/list", "gives no JSON object"),
        ("/deep", "nested too deeply"),
        ("/nested", "is nested more than 100 levels deep"),
        ("/number", "gives no list of adapters"),
        ("/rows", "gives no list of adapters"),
        ("/infinite", "1e999 is not a JSON number"),
        ("/surrogate", "not valid Unicode"),
        ("/chunk", "gives no answer that can be read"),
        ("/large", "more than 16,777,216 bytes"),
        ("/deep-error", "refuses: status 500"),
        ("/forbidden", "refuses: not yours\n  hint: set LORAX_ADMIN_KEY"),
        ("/hint", "refuses: no\n  hint: is it a server"),
        ("/long", "A" * 500 + "\n  hint: " + "B" * 500 + "\n"),
        ("/chunk-error", "gives no answer that can be read"),
        ("/short-error", "refuses: status 500"),
    ],
)
def test_what_is_no_answer_is_an_error_with_the_next_step(main, url, path, complaint):
    code, out, err = main("adapters", "list", "--url", url + path)

    assert (code, out) == (1, "")
    assert complaint in err
    assert "secret" not in err
    assert "hint: " in err


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://127.0.0.1:1", "Connection refused"),
        ("file:///etc/passwd", "is not the address of a server"),
        ("localhost:8000", "is not the address of a server"),
        ("http://[", "gives no answer"),
        ("http://a b", "gives no answer"),
        ("http://me:secret@127.0.0.1:1", "has a user or a password"),
        ("me:secret@127.0.0.1", "has a user or a password"),
    ],
)
def test_a_server_that_is_not_there_is_an_error(main, url, complaint):
    code, out, err = main("adapters", "list", "--url", url)

    assert (code, out) == (1, "")
    assert complaint in err
    assert "secret" not in err


def test_a_file_of_the_admin_key_has_one(main, url, tmp_path):
    (tmp_path / "keys").write_text("admin-key-1\nadmin-key-2\n")

    code, out, err = main("adapters", "list", "--url", url, "--admin-key-file", str(tmp_path / "keys"))

    assert (code, out) == (1, "")
    assert "has 2 keys, and the admin key is one" in err
    assert "admin-key-1" not in err


def test_without_an_admin_key_an_api_key_lists_them(main, url, monkeypatch):
    monkeypatch.setenv("LORAX_API_KEYS", f"{API_KEY},other-key-3")

    code, out, _ = main("adapters", "list", "--url", url)

    assert code == 0
    assert out.splitlines()[1].split() == ["lower", "-", "lora", "-", "-", "7", "disk"]


def test_a_key_that_no_header_takes_is_not_shown(main, url, monkeypatch):
    monkeypatch.setenv("LORAX_ADMIN_KEY", "secret\nkey: 1")

    code, _, err = main("adapters", "list", "--url", url)

    assert code == 1
    assert "characters that no header takes" in err
    assert "secret" not in err


def test_an_answer_that_takes_too_long_is_given_up(url):
    with pytest.raises(RequestError, match=r"not complete after 0\.2 seconds"):
        ask(f"{url}/slow", "/stats", None, seconds=0.2)


def test_the_events_of_a_stream_come_until_it_says_that_it_is_done(url):
    found = list(events(url + "/whole", "/v1/completions", None, {"prompt": "a"}))

    assert found == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_error_is_none_and_no_proxy_stands_before_this_machine(url, monkeypatch, host):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # which would refuse
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)

    found = list(events(url.replace("127.0.0.1", host) + "/null", "/v1/completions", None, {"prompt": "a"}))

    assert [event["n"] for event in found] == [1, 2]


@pytest.mark.parametrize(
    ("stream", "complaint"),
    [
        ("cut", "the answer broke off"),
        ("half", "the answer broke off"),
        ("chunk-cut", "the answer broke off"),
        ("silent", "timed out"),
        ("failed", "refuses: out of memory"),
        ("text", "refuses: overloaded"),
        ("garbage", "gives no answer that can be read"),
        ("numbers", "an event is not a JSON object"),
        ("large-event", "an event has more than 1,048,576 bytes"),
    ],
)
def test_what_came_before_a_stream_fails_is_not_lost(url, stream, complaint):
    found = []

    with pytest.raises(RequestError, match=complaint) as raised:
        found.extend(events(f"{url}/{stream}", "", None, {}, silence=0.3))

    assert found == [{"n": 1}, {"n": 2}]
    assert raised.value.hint


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("/elsewhere", "refuses: status 302"),
        ("/", "refuses: this route needs a key"),
        ("/page", "the answer broke off"),
    ],
)
def test_what_is_no_stream_is_an_error(url, path, complaint):
    with pytest.raises(RequestError, match=complaint):
        next(events(url + path, "", None, {}))
