"""Every request under "First requests" of docs/serving.md is answered as the page leads one to expect."""

from __future__ import annotations

import json
import re
import shlex

import httpx
import pytest
from loopback import Loopback

import lorax_core

LOADED = ("upper", "similar", "topic", "relevant")
EXPECTED = {
    "/v1/completions": lambda body: body["choices"][0]["text"] in (body["choices"][0]["text"].upper(), "yes", "no"),
    "/v1/embeddings": lambda body: len(body["data"]) == 2,
    "/tei/predict": lambda body: {one["label"] for one in body} == {"numbers", "files", "tests"},
    "/v1/rerank": lambda body: body["results"][0]["index"] == 0,
    "/generate": lambda body: body["generated_text"] == body["generated_text"].upper(),
    "/v1/adapters": lambda body: body["name"] == "bullets",
}


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs/serving.md").read_text("utf-8")


@pytest.fixture(scope="module")
def url(repository, page):
    [key] = re.findall(r"LORAX_ADMIN_KEY=(\S+) lorax serve", page)
    labels = {int(at): name for at, name in re.findall(r"--label topic:(\d)=(\w+)", page.partition("## Routes")[0])}
    adapters = {name: {"source": repository / "examples/tiny_qwen2/adapters" / name} for name in LOADED}
    adapters["topic"]["id2label"] = labels
    with (
        lorax_core.load(repository / "examples/tiny_qwen2/model", adapters=adapters, kv_cache_tokens=4_096) as engine,
        Loopback(engine, admin_key=key) as server,
    ):
        yield server.url


def test_the_server_has_the_adapters_of_the_page(page):
    section = page.partition("## First requests")[2].partition("\n## ")[0]

    assert tuple(re.findall(r"--adapter (\w+)=\$A/\1", section)) == LOADED


def test_each_request_of_the_page_is_answered(page, url, repository, monkeypatch):
    monkeypatch.chdir(repository)
    [block] = re.findall(r"<!-- requests -->\n```sh\n(.*?)```\n<!-- end -->", page, re.DOTALL)
    asked = set()

    for line in block.splitlines():
        command, flag, body, *headers, address = shlex.split(line)
        assert (command, flag, headers[::2]) == ("curl", "--json", ["-H"][: len(headers) // 2])
        route = address.removeprefix("localhost:8000")
        given = dict(one.split(": ", 1) for one in headers[1::2])

        answer = httpx.post(url + route, json=json.loads(body), headers=given, timeout=60)

        assert answer.status_code == 200, answer.text
        if json.loads(body).get("stream"):
            assert answer.text.endswith("data: [DONE]\n\n")
        else:
            assert EXPECTED[route](answer.json()), answer.text
        asked.add(route)

    assert asked == {*EXPECTED, "/v1/chat/completions"}
