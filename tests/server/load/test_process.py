"""A server in a process of its own: how it ends, and how much memory it takes when clients behave badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from loopback import LIMIT, Child, http, until

MIB = 2**20
STREAM = {"options": {"prompt": "once", "max_tokens": 300, "ignore_eos": True}, "stream": True}


@pytest.fixture(scope="module")
def checkpoint(repository):
    return repository / "examples/tiny_qwen2/model"


@pytest.fixture(scope="module")
def child(checkpoint):
    with Child(checkpoint, max_queue=20_000, log_format="json", body_timeout=5) as child:
        ask(child)
        yield child


def test_clients_that_say_nothing_do_not_use_up_what_a_process_may_open(checkpoint):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # what the child begins with
    try:
        child = Child(checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with child, contextlib.ExitStack() as silent:
        for _ in range(400):
            silent.enter_context(child.connect())
        answer = ask(child)

    assert answer.status_code == 200


def ask(child, prompt="a", **more):
    body = {"options": {"prompt": prompt, "max_tokens": 2}, **more}
    return httpx.post(f"{child.url}/ask", json=body, timeout=LIMIT)


def refused(child):
    try:
        child.connect().close()
    except ConnectionError:
        return True
    return False


def events(response):
    return [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]


def test_what_runs_is_finished_after_sigterm_and_the_process_ends_well(checkpoint):
    with Child(checkpoint) as child:
        with httpx.stream("POST", f"{child.url}/ask", json=STREAM, timeout=LIMIT) as response:
            lines = response.iter_lines()
            first = next(lines)
            child.process.send_signal(signal.SIGTERM)
            rest = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        status = child.ended()

    assert "error" not in first
    assert rest[-1]["end"] is True
    assert status == 0


def test_what_does_not_finish_in_time_is_ended(checkpoint):
    with Child(checkpoint, drain_timeout=0.3) as child, child.connect(http("/forever")):
        until(lambda: httpx.get(f"{child.url}/ready").status_code == 200)
        child.process.send_signal(signal.SIGTERM)
        status = child.ended()

    assert status == 0


def test_a_second_signal_ends_a_server_that_drains(checkpoint):
    with Child(checkpoint, drain_timeout=3_600) as child, child.connect(http("/forever")):
        until(lambda: httpx.get(f"{child.url}/ready").status_code == 200)
        child.process.send_signal(signal.SIGTERM)
        until(lambda: refused(child))
        child.process.send_signal(signal.SIGTERM)
        status = child.ended()

    assert status == -signal.SIGTERM


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_of_100_megabytes_leave_no_trace(child, chunked):
    piece = b" " * MIB

    def send(_):
        content = (piece for _ in range(100)) if chunked else piece * 100
        return httpx.post(f"{child.url}/ask", content=content, timeout=LIMIT).status_code

    before = child.resident()
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(send, range(12)))

    assert statuses == [413] * 12
    # Four at once, of 16 MiB when they are given up, in pieces and joined. Nothing is added by those that follow.
    assert child.resident() - before < 256 * MIB
    assert ask(child).status_code == 200


def test_ten_thousand_tiny_requests_are_answered_in_bounded_memory(child):
    sent = http("/ask", {"options": {"prompt": "a", "max_tokens": 1}})

    async def several(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", child.port)
        good = 0
        for _ in range(count):
            writer.write(sent)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
            good += head.startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()
        return good

    async def all_of_them():
        first = await asyncio.gather(*[several(50) for _ in range(80)])
        between = child.resident()
        rest = await asyncio.gather(*[several(75) for _ in range(80)])
        return sum(first) + sum(rest), between

    answered, between = asyncio.run(all_of_them())

    assert answered == 10_000
    assert child.resident() - between < 32 * MIB


def test_thousands_that_hang_up_leave_nothing_and_others_are_answered(child):
    before = child.resident()

    def hang_up(at):
        sent = http("/ask", STREAM) if at % 3 else http("/ask", STREAM)[: -(at % 50) - 1]
        with child.connect(sent) as sock:
            if at % 5 == 0:
                sock.recv(1_000 if at % 3 else 0)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(hang_up, range(2_000)))

    def nothing_is_left():
        metrics = httpx.get(f"{child.url}/metrics").text
        return "\nlorax_in_flight 0.0" in metrics and "\nlorax_kv_cache_pages_used 0.0" in metrics

    until(nothing_is_left)
    assert child.resident() - before < 64 * MIB
    assert ask(child).status_code == 200


def test_logs_are_json_lines_with_the_ids_of_requests(child):
    for _ in range(2):
        httpx.post(f"{child.url}/ask", json={}, headers={"X-Request-Id": "find-me"})

    until(lambda: sum("find-me" in line for line in child.log) >= 2)

    entries = [json.loads(line) for line in child.log]
    mine = [entry for entry in entries if entry.get("request_id") == "find-me"]
    assert {entry["status"] for entry in mine} == {422}
    assert {entry["route"] for entry in mine} == {"/ask"}
    assert not [entry for entry in entries if "traceback" in entry]
