"""Connections of a server: what is sent in pieces, too late, too long or never, and what is not read."""

from __future__ import annotations

import json
import re
import socket
from types import SimpleNamespace

import httpx
import pytest
from loopback import LIMIT, Loopback, held, http, left, until

from lorax_core.errors import RequestError
from lorax_core.server.options import ServerOptions
from lorax_core.server.run import _FED, _HEADER_BYTES, _Impatient, address, listen, serving

LONG = {"prompt": "once", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture
def engine(qwen2):
    return qwen2


@pytest.fixture
def server(engine):
    with Loopback(engine) as server:
        yield server


def read_all(sock):
    found = b""
    while piece := sock.recv(65_536):
        found += piece
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_noticed_behind_a_second_request(engine, server, stream):
    with held(engine):
        sock = server.connect(http("/ask", {"options": LONG, "stream": stream}) + http("/health"))
        until(lambda: server.gateway._in_flight == 1)
        sock.close()
        until(lambda: server.gateway._in_flight == 0)

    assert left(engine) == (0, 0)


def test_requests_that_come_before_the_one_ahead_is_answered_are_answered_in_order(server):
    with server.connect(http("/health") + http("/nowhere") + http("/ready", None, "Connection: close")) as sock:
        answers = read_all(sock)

    assert re.findall(rb"HTTP/1.1 (\d{3})", answers) == [b"200", b"404", b"200"]


def test_a_client_that_asks_again_and_again_without_an_answer_loses_its_connection(server):
    with server.connect(http("/forever") + http("/health") * 16) as sock:
        assert read_all(sock) == b""


def test_a_port_is_free_again_as_soon_as_its_server_has_ended(engine):
    with Loopback(engine) as server, server.connect(http("/health", None, "Connection: close")) as sock:
        read_all(sock)  # the server closes first, and its system remembers the connection for a minute

    with listen(ServerOptions(port=server.port)) as bound:
        assert bound.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_connection_may_be_idle_longer_than_most_proxies_keep_it(server):
    assert server.server.config.timeout_keep_alive > 60


def test_the_threads_of_a_server_end_with_it(engine):
    with Loopback(engine) as server:
        pools = server.gateway._pool, server.gateway._jobs

    for pool in pools:
        with pytest.raises(RuntimeError, match="after shutdown"):
            pool.submit(int)


@pytest.mark.parametrize(
    ("bound", "found"),
    [
        (("127.0.0.1", 80), "http://127.0.0.1:80"),
        (("0.0.0.0", 80), "http://127.0.0.1:80"),
        (("::1", 80, 0, 0), "http://[::1]:80"),
        (("::", 80, 0, 0), "http://[::1]:80"),
    ],
)
def test_an_address_is_one_that_a_client_can_ask(bound, found):
    assert address(SimpleNamespace(getsockname=lambda: bound)) == found


def test_a_port_has_one_server(engine, server):
    with pytest.raises(RequestError, match="cannot listen"):
        listen(ServerOptions(port=server.port))
    first = listen(ServerOptions(port=0))
    with first, pytest.raises(RequestError, match="cannot listen"):
        listen(ServerOptions(port=first.getsockname()[1]))


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_may_ask_for_the_head_alone(server, path):
    answer = httpx.head(f"{server.url}{path}")

    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /health HT", b"POST /ask HTTP/1.1\r\nContent-Length: 50\r\nHost: x"],
    ids=["nothing", "half a line", "half the headers"],
)
def test_connections_that_say_nothing_more_are_closed_and_others_are_answered(engine, sent):
    with Loopback(engine, body_timeout=0.3) as server:
        quiet = [server.connect(sent) for _ in range(30)]
        meanwhile = server.ask({"prompt": "a", "max_tokens": 2})
        ends = [read_all(sock) for sock in quiet]
        for sock in quiet:
            sock.close()

    assert meanwhile.status_code == 200
    assert len(ends) == 30
    assert not any(ends)


def test_half_a_second_request_is_not_waited_for(engine):
    with Loopback(engine, body_timeout=0.3) as server, server.connect(http("/health")) as sock:
        first = sock.recv(65_536)
        sock.sendall(b"GET /health HT")
        rest = read_all(sock)

    assert first.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1" not in rest


# Just above the limit: of what comes after the refusal, the system would make an end of the connection and drop the answer.
TOO_LONG = {
    "many": b"X-More: a\r\n" * (_HEADER_BYTES // 11 + 2) + b"\r\n",
    "one": b"X-More: " + b"a" * _HEADER_BYTES + b"\r\n\r\n",
    "a name without end": b"X-More: a\r\n" + b"a" * (_HEADER_BYTES + _FED),
}


CHUNKED = b"POST /ask HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"


OFFERED = ["h2c", "websocket", "TLS/1.0, HTTP/2.0"]


@pytest.mark.parametrize("later", [False, True], ids=["at once", "in two segments"])
@pytest.mark.parametrize("protocol", OFFERED)
def test_a_request_that_offers_another_protocol_is_answered_with_its_body(server, protocol, later):
    asked = http("/ask", {"options": {"prompt": "a", "max_tokens": 2}}, f"Connection: Upgrade\r\nUpgrade: {protocol}")
    last = http("/ready", None, "Connection: close, Upgrade\r\nUpgrade: h2c")
    first = asked.index(b"{") + 1 if later else len(asked)

    with server.connect(asked[:first]) as sock:
        until(lambda: server.bodies() == 1 or not later)
        sock.sendall(asked[first:] + asked + last)
        answers = read_all(sock)

    assert re.findall(rb"HTTP/1.1 (\d{3})", answers) == [b"200", b"200", b"200"]
    assert answers.count(b'"tokens"') == 2


def test_the_body_of_a_request_that_offers_another_protocol_is_no_request(server):
    inner = http("/health")
    head = b"POST /ask HTTP/1.1\r\nContent-Length: %d\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n" % len(inner)

    with server.connect(head + inner + http("/ready", None, "Connection: close")) as sock:
        answers = read_all(sock)

    assert re.findall(rb"HTTP/1.1 (\d{3})", answers) == [b"422", b"200"]


@pytest.mark.parametrize("line", [b"CONNECT a:80 HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
def test_what_is_for_a_proxy_or_http2_is_refused(server, line):
    with server.connect(line + http("/health")) as sock:
        answers = read_all(sock)

    assert re.findall(rb"HTTP/1.1 (\d{3})", answers) == [b"400"]


@pytest.mark.parametrize("headers", TOO_LONG.values(), ids=TOO_LONG)
@pytest.mark.parametrize("before", [b"GET /health HTTP/1.1\r\n", CHUNKED], ids=["headers", "trailers"])
def test_headers_that_are_too_long_are_refused(engine, server, before, headers):
    with server.connect(before + headers) as sock:
        answer = read_all(sock)

    assert answer.startswith(b"HTTP/1.1 431")


def test_headers_up_to_the_limit_are_read(engine, server):
    with server.connect(b"GET /health HTTP/1.1\r\nConnection: close\r\nX-More: " + b"a" * 60_000 + b"\r\n\r\n") as sock:
        answer = read_all(sock)

    assert answer.startswith(b"HTTP/1.1 200")


def test_headers_are_counted_for_each_request_of_a_connection(server):
    more = "X-More: " + "a" * 40_000
    with server.connect(http("/ready", None, more)) as sock:
        first = sock.recv(65_536)
        sock.sendall(http("/ready", None, more, "Connection: close"))
        second = read_all(sock)

    assert first.startswith(b"HTTP/1.1 200")
    assert re.findall(rb"HTTP/1.1 (\d{3})", second) == [b"200"]


def test_headers_without_end_are_not_read(engine, server):
    endless = b"GET /health HTTP/1.1\r\n" + b"X-More: a\r\n" * (100 * _HEADER_BYTES // 11)

    with server.connect() as sock, pytest.raises(ConnectionError):
        sock.sendall(endless)


def test_a_body_that_does_not_come_is_not_waited_for(engine):
    with Loopback(engine, body_timeout=0.2) as server, server.connect(http("/ask", {"options": LONG})[:-5]) as sock:
        answer = sock.recv(65_536)

    assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_answered_before_it_is_read(engine, chunked):
    piece = b" " * 65_536
    with Loopback(engine, max_body_bytes=100_000) as server:
        pieces = (piece for _ in range(160))
        content = pieces if chunked else piece * 160
        answer = httpx.post(f"{server.url}/ask", content=content, timeout=LIMIT)
        after = server.ask({"prompt": "a", "max_tokens": 2})

    assert answer.status_code == 413
    assert after.status_code == 200


def test_bodies_together_are_bounded(engine):
    unfinished = b"POST /ask HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b" " * 999
    with Loopback(engine, max_body_bytes=1_000) as server:
        opened = [server.connect(unfinished) for _ in range(32)]
        until(lambda: server.bodies() == 32 * 999)
        one_more = [server.connect(unfinished), server.connect(unfinished)]
        until(lambda: server.metric("lorax_refusals_total") > 0)
        refused = one_more[-1].recv(65_536)
        for sock in opened + one_more:
            sock.close()
        until(lambda: server.bodies() == 0)
        after = server.ask({"prompt": "a", "max_tokens": 2})

    assert refused.startswith(b"HTTP/1.1 429")
    assert after.status_code == 200


def test_a_client_that_reads_nothing_loses_its_connection(engine):
    with Loopback(engine, body_timeout=0.2) as server, server.connect(http("/big/50000000")) as sock:
        until(lambda: server.server.server_state.connections)
        until(lambda: not server.server.server_state.connections)
        sock.settimeout(LIMIT)
        assert len(read_all(sock)) < 50_000_000


class Timers:
    """A loop whose time stands still: what it was asked to call, the newest last."""

    def __init__(self):
        self.asked = []

    def call_later(self, seconds, job):
        self.asked.append(job)
        return self

    def cancel(self):
        pass


class Pipe:
    """A transport with so many bytes that its client has not read."""

    def __init__(self):
        self.unread, self.aborted = 0, False

    def get_write_buffer_size(self):
        return self.unread

    def abort(self):
        self.aborted = True


def slow_connection(repository, engine):
    with Loopback(engine) as server:
        config = server.server.config
        protocol = type("Protocol", (_Impatient,), {"patience": 1.0})(config, server.server.server_state, {}, Timers())
    protocol.transport, protocol._watch = Pipe(), None
    protocol.flow = type("Flow", (), {"pause_writing": lambda self: None, "resume_writing": lambda self: None})()
    return protocol


@pytest.mark.parametrize(("sizes", "lost"), [((90, 80, 70, 60), False), ((90, 80, 80), True), ((90, 0, 90), False)])
def test_a_client_that_reads_slowly_keeps_its_connection_while_it_reads(repository, engine, sizes, lost):
    protocol = slow_connection(repository, engine)

    protocol.transport.unread = sizes[0]
    protocol.pause_writing()
    for unread in sizes[1:]:
        protocol.transport.unread = unread
        protocol.loop.asked[-1]()

    assert protocol.transport.aborted is lost


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b'{"options":' * 100_000,
        b'{"options": {"prompt": "' + b"\xff" * 9 + b'"}}',
        json.dumps({"options": {"prompt": "\ud800"}}).encode(),
        b'{"options": {"prompt": "a", "max_tokens": ' + b"9" * 100_000 + b"}}",
        b'{"options": {"prompt": "a", "temperature": NaN}}',
        b'{"options": {"prompt": "a"}, "\\ud800": 1}',
        b'{"options": {"prompt": "a", "stop": ["\\ud800"], "max_tokens": 2}}',
        b"",
        b"null",
        b"\x00",
    ],
    ids=[
        "deep list",
        "deep object",
        "no UTF-8",
        "half a surrogate pair",
        "huge number",
        "NaN",
        "field",
        "stop",
        "empty",
        "null",
        "zero",
    ],
)
def test_bodies_that_are_no_request_are_refused_in_words(engine, server, body):
    answer = httpx.post(f"{server.url}/ask", content=body, headers={"Content-Type": "application/json"}, timeout=LIMIT)

    assert answer.status_code == 422
    assert answer.json()["error_type"] == "validation"
    assert server.ask({"prompt": "a", "max_tokens": 1}).status_code == 200


def test_an_engine_is_served_from_python_while_a_block_runs(qwen2):
    with serving(qwen2, model_name="mine") as address:
        found = httpx.get(f"{address}/v1/models").json()

    assert [one["id"] for one in found["data"]] == ["mine"]
    assert qwen2.generate("a", max_tokens=1).text is not None
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")
