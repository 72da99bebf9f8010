"""The page at `GET /` without a browser: what it may do, who gets it, and what it is told."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from asking import ask

from lorax_core.engine.stats import StepStats, Totals
from lorax_core.server.page.routes import whole_page
from lorax_core.server.page.stats import ServerState, adapter_can, base_can

KEY = "the-secret-key"


@pytest.fixture(scope="module")
def page(qwen2, client):
    return ask(client(qwen2), "GET", "/")


def test_a_browser_may_run_only_what_is_in_the_page(page):
    rules = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))

    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["cache-control"] == "no-store"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for tag in ("script", "style"):
        [inlined] = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        assert len(inlined) > 1_000
        digest = base64.b64encode(hashlib.sha256(inlined.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"


def test_the_page_names_nothing_outside_and_writes_no_markup():
    text, _ = whole_page()

    assert set(re.findall(r"\b[a-z]+://[\w.]+", text)) == {
        "http://www.w3.org"
    }  # the name of SVG, which is not asked for
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son\w+=|\sstyle=", text)


def test_without_the_page_get_is_refused_and_the_numbers_stay(qwen2, client):
    assert ask(client(qwen2, page=False), "GET", "/").status_code == 405
    assert ask(client(qwen2, page=False), "GET", "/stats").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/", 200), ("HEAD", "/", 200), ("POST", "/", 401), ("GET", "/stats", 401)]
)
def test_the_page_needs_no_key_and_all_that_it_asks_for_does(qwen2, client, method, path, status):
    assert ask(client(qwen2, api_keys=[KEY]), method, path).status_code == status


def test_the_numbers_are_those_of_the_engine(qwen2, client):
    qwen2.generate("The", max_tokens=3)

    found = ask(client(qwen2), "GET", "/stats").json()

    ServerState.model_validate(found)
    totals = qwen2.info().totals
    assert (found["prompt_tokens"], found["decode_tokens"]) == (totals.prompt_tokens, totals.decode_tokens)
    assert (found["running"], found["waiting"], found["pages_used"]) == (0, 0, 0)
    assert found["chat"] is True
    assert found["can"] == ["generate", "embed"]


class Busy:
    """An engine that is in the middle of something."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def info(self):
        step = StepStats(7, 6, 0, 2, running=2, waiting=3, pages_used=5, pages=9, seconds=0.25)
        totals = Totals(steps=11, prompt_tokens=12, decode_tokens=13, failed=14, seconds=1.5)
        return replace(self._engine.info(), last_step=step, totals=totals)


def test_what_runs_and_what_waits_are_told_apart(qwen2, client):
    server = Busy(qwen2)

    found, text = ask(client(server), "GET", "/stats").json(), ask(client(server), "GET", "/metrics").text

    assert [found[name] for name in ("running", "waiting", "pages_used", "pages")] == [2, 3, 5, 9]
    assert (found["prompt_tokens"], found["decode_tokens"], found["step_seconds"]) == (12, 13, 1.5)
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    told = {
        "running": 2, "waiting": 3, "kv_cache_pages_used": 5, "kv_cache_pages": 9, "last_step_seconds": 0.25,
        "steps_total": 11, "engine_prompt_tokens_total": 12, "engine_decode_tokens_total": 13, "engine_failed_total": 14,
        "step_seconds_total": 1.5,
    }  # fmt: skip
    assert {name: float(lines[f"lorax_{name}"]) for name in told} == told


@pytest.mark.parametrize(
    ("tasks", "labels", "task", "own", "base", "adapter"),
    [
        (["generate", "embed"], [], "generate", [], ["generate", "embed"], ["generate", "embed"]),
        (["generate", "embed"], [], "embed", [], ["generate", "embed"], ["embed"]),
        (["generate", "embed"], [], None, [], ["generate", "embed"], ["generate", "embed"]),
        (["generate", "embed"], [], "sequence-classification", ["a", "b"], ["generate", "embed"], ["labels"]),
        (["generate", "embed"], [], "sequence-classification", ["a"], ["generate", "embed"], ["labels", "rerank"]),
        (["embed", "token-classification"], ["O"], "token-classification", [], ["embed", "entities"], ["entities"]),
        (["embed", "sequence-classification"], ["a"], None, [], ["embed", "labels", "rerank"], ["embed", "labels", "rerank"]),
    ],
)  # fmt: skip
def test_an_adapter_is_offered_for_what_it_was_trained_for(tasks, labels, task, own, base, adapter):
    info = SimpleNamespace(tasks=tuple(tasks), labels=tuple(labels))

    assert base_can(info) == base
    assert adapter_can(info, SimpleNamespace(task=task, labels=tuple(own))) == adapter
