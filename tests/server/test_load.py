"""A server whose clients come in crowds, hang up or wait too long, over real sockets."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from loopback import LIMIT, Loopback, held, http, left, until
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

import lorax_core
from lorax_core.server.app import build_app
from lorax_core.server.errors import failure
from lorax_core.server.logs import log
from lorax_core.server.sse import EventStream, data

LONG = {"prompt": "once", "max_tokens": 400, "ignore_eos": True}

# More than is tokenized in the event loop.
MUCH = {"options": {**LONG, "prompt": "word " * 60, "max_tokens": 100}, "count": 8}


@pytest.fixture(scope="module")
def engine(repository):
    with lorax_core.load(
        repository / "examples/tiny_qwen2/model",
        adapters={"topic": str(repository / "examples/tiny_qwen2/adapters/topic")},
        kv_cache_tokens=4_096,
        max_batch_rows=2,
    ) as engine:
        yield engine


@pytest.fixture
def server(engine):
    with Loopback(engine, max_queue=2) as server:
        yield server


def test_a_full_queue_refuses_with_the_seconds_to_wait(engine, server):
    with ThreadPoolExecutor(4) as pool:
        with held(engine):
            admitted = [pool.submit(server.ask, {"prompt": "a", "max_tokens": 2}) for _ in range(4)]
            until(lambda: server.gateway._in_flight == 4)
            refused = server.ask({"prompt": "a", "max_tokens": 2})
        answers = [one.result(LIMIT) for one in admitted]

    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error_type"] == "overloaded"
    assert [one.status_code for one in answers] == [200] * 4
    assert left(engine) == (0, 0)


@pytest.mark.parametrize("paused", [False, True])
def test_the_seconds_to_wait_are_those_in_which_half_was_answered_since_the_last_pause(engine, server, paused):
    ended = [(0.0, 1), (20.0, 1)]  # when an answer ended, and its sequences
    server.gateway._ended.extend(ended)

    with ThreadPoolExecutor(1) as pool, held(engine):
        admitted = pool.submit(server.ask, {"prompt": "a", "max_tokens": 2, "n": 4})
        until(lambda: server.gateway._in_flight == 4)
        server.gateway._ended.extend([] if paused else ended)
        refused = server.ask({"prompt": "a", "max_tokens": 2})

    assert admitted.result(LIMIT).status_code == 200
    assert refused.headers["retry-after"] == ("1" if paused else "20")


@pytest.mark.parametrize(
    ("path", "parameters"), [("/generate", {"parameters": {"max_new_tokens": 2}}), ("/embed", {}), ("/tei/embed", {})]
)
def test_what_a_request_waited_is_told_apart_from_what_it_was_computed(engine, server, path, parameters):
    with ThreadPoolExecutor(1) as pool:
        with held(engine):
            asked = pool.submit(httpx.post, f"{server.url}{path}", json={"inputs": "a", **parameters}, timeout=LIMIT)
            until(lambda: server.gateway._in_flight == 1)
            begun = time.monotonic()
            until(lambda: time.monotonic() > begun + 0.02)
        headers = asked.result(LIMIT).headers

    times = {name: int(headers.get(f"x-{name}-time", "0")) for name in ("total", "validation", "queue", "inference")}
    assert times["queue"] >= 20
    assert abs(times["total"] - times["validation"] - times["queue"] - times["inference"]) <= 3


def test_a_request_larger_than_the_queue_is_let_in_alone(engine, server):
    alone = server.ask({"prompt": "a", "max_tokens": 2}, count=9)

    assert len(alone.json()["tokens"]) == 9


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_while_it_waits_is_taken_out(engine, server, stream):
    with held(engine):
        sock = server.connect(http("/ask", {"options": LONG, "stream": stream}))
        until(lambda: server.gateway._in_flight == 1)
        sock.close()
        until(lambda: server.gateway._in_flight == 0)
        before = engine.info().totals

    assert left(engine) == (0, 0)
    assert engine.info().totals.decode_tokens == before.decode_tokens
    until(lambda: server.metric("lorax_client_disconnects_total") == 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_while_its_prompt_is_read_is_forgotten(engine, server, stream):
    gateway, release = server.gateway, threading.Event()
    workers = [gateway._pool.submit(release.wait, LIMIT) for _ in range(gateway._pool._max_workers)]
    before = engine.info().totals.prompt_tokens

    with server.connect(http("/ask", {**MUCH, "stream": stream})):
        until(lambda: gateway._in_flight == 8)
    until(lambda: gateway._in_flight == 0)
    release.set()

    assert all(one.result(LIMIT) for one in workers)
    gateway._pool.submit(int).result(LIMIT)
    assert left(engine) == (0, 0)
    assert engine.info().totals.prompt_tokens == before


class SlowToSubmit:
    """An engine that takes requests only once `released` is set."""

    def __init__(self, engine):
        self._engine = engine
        self.entered, self.released = threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def submit(self, requests):
        self.entered.set()
        self.released.wait(LIMIT)
        return self._engine.submit(requests)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_while_its_request_is_submitted_is_forgotten(engine, stream):
    slow = SlowToSubmit(engine)
    before = engine.info().totals.prompt_tokens
    with Loopback(slow) as server, held(engine):
        pool = server.gateway._pool
        with server.connect(http("/ask", {**MUCH, "stream": stream})):
            assert slow.entered.wait(LIMIT)
        until(lambda: server.gateway._in_flight == 0)
        slow.released.set()
        together = threading.Barrier(pool._max_workers)  # all of its threads have ended what they did
        for one in [pool.submit(together.wait, LIMIT) for _ in range(pool._max_workers)]:
            one.result(LIMIT)

    assert left(engine) == (0, 0)
    assert engine.info().totals.prompt_tokens == before


def test_a_client_that_hangs_up_in_its_stream_frees_its_pages_within_a_step(engine, server):
    sock = server.connect(http("/ask", {"options": LONG, "stream": True}))
    found = b""
    while b"data:" not in found:
        found += sock.recv(65_536)

    with held(engine):
        at = engine.info().totals.steps
        sock.close()
        until(lambda: server.gateway._in_flight == 0)

    assert left(engine) == (0, 0)
    assert engine.info().totals.steps <= at + 1


def test_a_client_that_hangs_up_within_its_body_is_no_error(engine, server):
    whole = http("/ask", {"options": LONG})

    server.connect(whole[:-5]).close()

    until(lambda: server.metric("lorax_http_requests_total") == 1)
    assert 'status="499"' in server.gateway.metrics.render().decode()
    assert server.metric("lorax_refusals_total") == 0


@pytest.mark.parametrize("by", ["option", "header"])
@pytest.mark.parametrize("prompt", ["a", "a " * 2_000])
def test_an_answer_that_takes_too_long_is_given_up(engine, by, prompt):
    options, headers = ({"request_timeout": 0.05}, {}) if by == "option" else ({}, {"X-Request-Timeout": "0.05"})
    with Loopback(engine, **options) as server:
        release = threading.Event()
        for _ in range(server.gateway._pool._max_workers):
            server.gateway._pool.submit(release.wait, LIMIT)
        with held(engine):
            answer = server.ask({**LONG, "prompt": prompt}, headers=headers)
        release.set()

    assert answer.status_code == 504
    assert answer.json()["error_type"] == "incomplete_generation"
    assert left(engine) == (0, 0)


def test_a_stream_that_takes_too_long_ends_with_an_error(engine, server):
    with held(engine):
        answer = server.ask(LONG, stream=True, headers={"X-Request-Timeout": "0.05"})

    assert answer.status_code == 200
    assert json.loads(answer.text.removeprefix("data: ")) == {"error": "deadline"}
    assert left(engine) == (0, 0)
    assert server.metric("lorax_refusals_total") == 1


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", "inf", "1e9", "1_0", "+1", ""])
def test_a_deadline_that_is_no_number_of_seconds_is_refused(engine, server, given):
    answer = server.ask({"prompt": "a"}, headers={"X-Request-Timeout": given})

    assert answer.status_code == 422
    assert "x-request-timeout" in answer.json()["error"]


def test_a_server_that_drains_says_so_and_takes_nothing_new(engine, server):
    ready = httpx.get(f"{server.url}/ready")
    server.gateway.draining = True

    after, refused = httpx.get(f"{server.url}/ready"), server.ask({"prompt": "a"})

    assert (ready.status_code, after.status_code) == (200, 503)
    assert after.json() == {"status": "draining"}
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_runs_when_there_is_no_more_time_to_drain_ends_with_an_error(engine, stream):
    with Loopback(engine, drain_timeout=0.05) as server, ThreadPoolExecutor(1) as pool:

        async def drain():
            server.gateway.drain()

        server.app.post("/drain")(drain)
        with held(engine):
            asked = pool.submit(server.ask, LONG, stream=stream)
            until(lambda: server.gateway._in_flight == 1)
            httpx.post(f"{server.url}/drain")
            answer = asked.result(LIMIT)

    assert answer.status_code == (200 if stream else 503)
    assert answer.text.strip().endswith('{"error":"unavailable"}') if stream else "shut down" in answer.text
    assert left(engine) == (0, 0)


def test_sequences_and_not_requests_fill_the_queue(engine, server):
    with ThreadPoolExecutor(1) as pool, held(engine):
        admitted = pool.submit(server.ask, {"prompt": "a", "max_tokens": 2, "n": 3})
        until(lambda: server.gateway._in_flight == 3)
        refused = server.ask({"prompt": "a", "max_tokens": 2, "n": 2})

    assert refused.status_code == 429
    assert admitted.result(LIMIT).status_code == 200


def test_a_client_cannot_ask_for_more_time_than_the_server_gives(engine):
    with Loopback(engine, request_timeout=0.05) as server, held(engine):
        answer = server.ask({"prompt": "a"}, headers={"X-Request-Timeout": "3600"})

    assert answer.status_code == 504


def test_a_closed_engine_is_no_fault_of_the_request(repository):
    engine = lorax_core.load(repository / "examples/tiny_qwen2/model", kv_cache_tokens=1_024)
    with engine, Loopback(engine) as server, ThreadPoolExecutor(1) as pool:
        with held(engine):
            running = pool.submit(server.ask, LONG)
            until(lambda: server.gateway._in_flight == 1)
            engine._worker._stepper.stop()
        broken, after = running.result(LIMIT), server.ask({"prompt": "a"})
        health, ready = httpx.get(f"{server.url}/health"), httpx.get(f"{server.url}/ready")

    assert [one.status_code for one in (broken, after, health, ready)] == [503] * 4
    assert ready.json() == {"status": "closed"}


def test_no_answer_names_a_folder_and_none_is_shown_to_other_pages(engine, server, tmp_path):
    adapter = server.ask({"prompt": "a", "adapter": f"{tmp_path}/nothing"})
    surrogate = httpx.post(f"{server.url}/ask", content=json.dumps({"options": {"prompt": "a", "adapter": "\ud800"}}))
    crossing = httpx.get(f"{server.url}/health", headers={"Origin": "http://evil.example"})

    assert adapter.status_code == surrogate.status_code == 422
    assert str(tmp_path) not in adapter.text
    assert not [name for name in crossing.headers if name.startswith("access-control")]


def test_what_fails_unforeseen_is_logged_and_not_told(engine, server, caplog, tmp_path):
    def broken():
        raise OSError(f"no such file: {tmp_path}")

    server.app.get("/v1/broken")(broken)
    # By itself: a test that sets logs up as a server does ends their way to the root.
    log.addHandler(caplog.handler)

    answer = httpx.get(f"{server.url}/v1/broken", headers={"X-Request-Id": "find-me"})
    log.removeHandler(caplog.handler)

    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "find-me"
    assert str(tmp_path) not in answer.text
    assert "Traceback" not in answer.text
    assert str(tmp_path) in caplog.text


def test_what_fails_unforeseen_in_a_stream_is_logged_and_not_told(engine, server, caplog, tmp_path):
    async def lines(events):
        async for _ in events:
            raise OSError(f"no such file: {tmp_path}")
        yield b""

    async def broken(http: Request):
        events = await server.gateway.events(http, [lorax_core.GenerateRequest(**LONG)])
        return EventStream(events, lines(events), lambda error: data({"error": failure(error).message}))

    server.app.post("/broken")(broken)
    log.addHandler(caplog.handler)

    answer = httpx.post(f"{server.url}/broken", json={})
    log.removeHandler(caplog.handler)

    assert json.loads(answer.text.removeprefix("data: ")) == {"error": "the server failed to answer this request"}
    assert str(tmp_path) in caplog.text
    assert server.metric("lorax_refusals_total") == 1
    assert left(engine) == (0, 0)


def test_metrics_are_those_of_prometheus_and_add_up(engine, server):
    asked = [
        server.ask({"prompt": "one two", "max_tokens": 3, "ignore_eos": True}, count=2),
        server.ask({"input": "one"}, task="embed"),
        server.ask({"input": "one", "adapter": "topic"}, task="classify"),
        server.ask({"prompt": "one two", "max_tokens": 4, "ignore_eos": True}, stream=True),
        server.ask({"prompt": 5}),
    ]
    total = sum(sum(one.json()["tokens"]) for one in asked[:3]) + asked[0].json()["tokens"][0] + 1

    answer = httpx.get(f"{server.url}/metrics")
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]

    def of(name, **labels):
        return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())

    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert of("lorax_tokens_total") - of("lorax_tokens_total", kind="cached") == total
    assert of("lorax_tokens_total", kind="completion") == 3 + 3 + 4
    assert of("lorax_answers_total", task="generate", adapter="(base)") == 3
    assert of("lorax_answers_total", task="classify", adapter="topic") == 1
    assert of("lorax_http_requests_total", route="/ask", status="200") == 4
    assert of("lorax_http_requests_total", route="/ask", status="422") == 1
    assert of("lorax_http_request_seconds_count", route="/ask") == 5
    assert of("lorax_time_to_first_token_seconds_count") == 3
    assert of("lorax_queue_seconds_count") == 4
    assert of("lorax_refusals_total", kind="invalid") == 1
    assert of("lorax_in_flight") == of("lorax_running") == of("lorax_kv_cache_pages_used") == 0


def test_a_stream_that_nobody_sends_is_cancelled(engine):
    async def inside():
        gateway = build_app(engine).state.gateway
        request = Request({"type": "http", "headers": []})
        with held(engine):
            events = await gateway.events(request, [lorax_core.GenerateRequest(**LONG)])
            admitted = gateway._in_flight
            del events
        return admitted, gateway._in_flight

    assert asyncio.run(inside()) == (1, 0)
    assert left(engine) == (0, 0)
