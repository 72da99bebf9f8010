"""Hints of the engine as clients of a server read them: a route, a field or a flag, and no function of Python."""

from __future__ import annotations

import ast
import re

import pytest
from asking import ask

import lorax_core
from lorax_core.errors import RequestError

QUERY = {"query": "a", "texts": ["b"]}
PYTHON = re.compile(r"engine\.|\bload\(|help\(|adapters\.\w+\(|(?<!\.\.\., )\b[a-z_]+=[^\s,]")
"""What a hint has that only Python's users can follow; `save_pretrained(..., a=b)` is for the author of an adapter."""
# Reached while an engine is loaded, or by calls that no route makes.
APART = {
    "engine",
    "loading",
    "machine",
    "model",
    "requests",
    "stream",
    "tokenizer",
    "merge",
    "merged",
    "plan",
    "combining",
}


@pytest.fixture(scope="module")
def engine(repository):
    folder = repository / "examples/tiny_qwen2"
    adapters = {name: folder / "adapters" / name for name in ("topic", "relevant", "upper")}
    with lorax_core.load(folder / "model", adapters=adapters, adapter_sources=[], kv_cache_tokens=64) as engine:
        yield engine


@pytest.fixture
def refused(engine, client):
    def refused(path, **body):
        answer = ask(client(engine), "POST", path, json=body)
        assert answer.status_code in (400, 404, 413, 422), answer.text
        found = answer.json()
        error = found["error"] if isinstance(found["error"], dict) else found
        return error.get("message") or found["error"], error["hint"]

    return refused


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "model": "topic"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "model": "base:relevant"}),
        ("/generate", {"inputs": "a", "parameters": {"adapter_id": "topic"}}),
    ],
)
def test_an_adapter_of_labels_makes_no_text(engine, refused, path, body):
    message, hint = refused(path, **body)

    assert "'sequence-classification'" in message
    assert "/tei/predict" in hint
    assert "/v1/rerank" in hint
    with pytest.raises(RequestError, match=r"(?s)'sequence-classification'.*engine\.classify"):
        engine.generate("a", adapter="topic")


def test_where_the_base_has_no_head_the_adapters_that_have_one_are_named(refused):
    assert refused("/tei/predict", inputs="a")[1] == "name an adapter that has one: 'relevant', 'topic'"
    assert refused("/v1/rerank", query="a", documents=["b"])[1] == "name an adapter that has one: 'relevant'"
    assert refused("/tei/rerank", **QUERY, model="topic")[1] == "name an adapter that has one: 'relevant'"


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/completions", {"prompt": "word " * 20, "max_tokens": 100}, "--kv-cache-tokens"),
        ("/tei/embed", {"inputs": "word " * 100}, "truncate"),
        ("/tei/embed", {"inputs": "a", "prompt_name": "query"}, "before the text"),
        ("/v1/completions", {"prompt": "a", "min_tokens": 5, "max_tokens": 2}, "/openapi.json"),
        ("/v1/completions", {"prompt": "a", "model": "org/name"}, "--adapter-sources"),
    ],
)
def test_a_hint_says_what_a_client_can_do(refused, path, body, named):
    _, hint = refused(path, **body)

    assert named in hint
    assert not PYTHON.search(hint)


CHAT = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 100}, "max_tokens"),
        ("/v1/completions", {"prompt": "word " * 100}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": [99_999]}, "prompt"),
        ("/v1/chat/completions", CHAT | {"max_tokens": 100}, "max_tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 100}]}, "messages"),
        ("/v1/chat/completions", CHAT | {"logit_bias": {"99999": 1}}, "logit_bias"),
        ("/v1/embeddings", {"input": [99_999]}, "input"),
        ("/v1/embeddings", {"input": "word " * 100}, "input"),
        ("/v1/rerank", {"query": "a", "documents": ["word " * 100], "model": "relevant"}, None),
    ],
)
def test_an_error_names_the_field_that_is_wrong(engine, client, path, body, param):
    answer = ask(client(engine), "POST", path, json=body)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "begin"),
    [
        ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 100}}, "max_new_tokens: a prompt of"),
        ("/generate", {"inputs": "word " * 100}, "inputs: a prompt of"),
        ("/tei/embed", {"inputs": [99_999]}, "inputs: token id 99999 is not"),
        ("/tei/embed", {"inputs": [-1]}, "inputs.0: Input should be greater than or equal to 0 (found -1)"),
        ("/tei/embed", {"inputs": [[1], [-1]]}, "inputs.1.0: Input should be greater than or equal to 0 (found -1)"),
        ("/tei/decode", {"ids": [99_999]}, "ids: token id 99999 is not"),
        ("/tei/rerank", {"query": "a", "texts": ["word " * 100], "model": "relevant"}, "an input of"),
    ],
)
def test_errors_of_other_apis_begin_with_their_own_field(refused, path, body, begin):
    assert refused(path, **body)[0].startswith(begin)


def test_no_hint_that_a_request_can_reach_is_of_python_alone(repository):
    root = repository / "core/lorax_core"
    wrong = []
    for file in (path for part in ("serving", "engine", "adapters") for path in sorted((root / part).rglob("*.py"))):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        for call in calls if file.stem not in APART else []:
            given = {one.arg: ast.unparse(one.value) for one in call.keywords}
            if PYTHON.search(given.get("hint", "")) and "http_hint" not in given:
                wrong.append(f"{file.name}:{call.lineno}: {given['hint']}")

    assert not wrong
