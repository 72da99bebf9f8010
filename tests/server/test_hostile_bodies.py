"""Bodies that no client should send: each is refused in the shape of its API, and nothing fails over it."""

from __future__ import annotations

import asyncio
import copy
import json

import httpx
import pytest
from asking import ask
from pydantic import ValidationError

from lorax_core.errors import RequestError
from lorax_core.server.app import build_app
from lorax_core.server.names import ModelNames
from lorax_core.server.openai.chat import ChatBody
from lorax_core.server.openai.completions import CompletionBody
from lorax_core.server.openai.embeddings import EmbeddingsBody
from lorax_core.server.options import ServerOptions
from lorax_core.server.rerank import RerankBody
from lorax_core.server.tei.shapes import PredictBody

LONE = "\ud800"  # half of a character, which JSON can spell and UTF-8 cannot
BODIES = {
    "/": {"inputs": "a", "parameters": {"adapter_id": "b", "stop": ["c"], "max_new_tokens": 1}},
    "/generate": {"inputs": "a", "parameters": {"merged_adapters": {"ids": ["b", "c"], "weights": [1.0, 2.0]}}},
    "/generate_stream": {
        "inputs": "a",
        "parameters": {"response_format": {"type": "json_object", "schema": {"enum": ["b"]}}},
    },
    "/embed": {"inputs": "a", "parameters": {"adapter_id": "b", "api_token": "c"}},
    "/classify_batch": {"inputs": ["a", "b"]},
    "/tokenize": {"inputs": "a"},
    "/tei/embed": {"inputs": ["a"], "prompt_name": "b"},
    "/tei/predict": {"inputs": [["a"], ["b", "c"]]},
    "/tei/rerank": {"query": "a", "texts": ["b"]},
    "/tei/tokenize": {"inputs": "a"},
    "/v1/rerank": {"query": "a", "documents": ["b", {"text": "c"}], "model": "d"},
    "/v1/adapters": {"name": "a", "source": "b", "id2label": {"0": "c"}},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "b"},
}


def variants(value):
    """A value with each of its texts and keys replaced in turn, by what is no text."""
    if isinstance(value, str):
        yield LONE
    elif isinstance(value, list):
        for at, one in enumerate(value):
            yield from ([*value[:at], other, *value[at + 1 :]] for other in variants(one))
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from ({**value, key: other} for other in variants(one))
        yield {**copy.deepcopy(value), LONE: 1}


@pytest.fixture(scope="module")
def answers(qwen2):
    """What a server answers to texts, which are sent as bodies."""
    app = build_app(qwen2, ServerOptions(admin_key="the-admin-key"), model_name="base")
    headers = {"Authorization": "Bearer the-admin-key", "Content-Type": "application/json"}

    async def ask(path, bodies):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers) as client:
            return [(body, await client.post(path, content=body)) for body in bodies]

    return lambda path, bodies: asyncio.run(ask(path, bodies))


@pytest.mark.parametrize("path", BODIES)
def test_what_is_no_text_or_no_body_is_refused(answers, path):
    no_text = [json.dumps(body) for body in variants(BODIES[path])]
    no_body = ['{"inputs": ' + "[" * 2_000 + "]" * 2_000 + "}", "[]", "null", "1e999", "{", ""]

    for body, answer in answers(path, no_text + no_body):
        assert 400 <= answer.status_code < 424, (body, answer.text)
        assert "error" in answer.json()


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (RerankBody, {"query": "a", "documents": [0] * 200_000}),
        (EmbeddingsBody, {"input": [None] * 200_000}),
        (ChatBody, {"messages": [{"role": "user", "content": [{}] * 200_000}]}),
        (PredictBody, {"inputs": [[]] * 200_000}),
        (CompletionBody, {"prompt": "a", "logit_bias": {str(at): "x" for at in range(200_000)}}),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_list_of_wrong_elements_is_given_up_at_the_first(model, body):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)

    assert caught.value.error_count() < 50


def test_a_text_that_is_too_long_is_not_tokenized(qwen2, client):
    long = {"inputs": "a" * 300_000}

    for path, body in (("/tokenize", long), ("/tei/tokenize", long), ("/tei/decode", {"ids": [5] * 300_000})):
        answer = ask(client(qwen2), "POST", path, json=body)

        assert answer.status_code == 413


def test_an_adapter_must_not_be_called_like_the_base(qwen2, repository):
    upper = repository / "examples/tiny_qwen2/adapters/upper"
    for name in ("base", "__base_model__"):
        qwen2.adapters.load(name, upper)
        try:
            with pytest.raises(RequestError, match="means the base"):
                build_app(qwen2, model_name="base")
        finally:
            qwen2.adapters.unload(name)


def test_of_two_names_of_the_base_the_longer_one_is_meant(qwen2, repository):
    qwen2.adapters.load("upper", repository / "examples/tiny_qwen2/adapters/upper")
    names = ModelNames("base", qwen2.adapters, source="base:8b")
    try:
        assert [names.adapter(one) for one in ("base:8b", "base:upper", "base:8b:upper")] == [None, "upper", "upper"]
    finally:
        qwen2.adapters.unload("upper")


def test_a_name_that_begins_like_the_base_is_an_adapter_first(qwen2, repository):
    upper = repository / "examples/tiny_qwen2/adapters/upper"
    names = ModelNames("base", qwen2.adapters)
    for name in ("base:upper", "upper"):
        qwen2.adapters.load(name, upper)
    try:
        assert [names.adapter(one) for one in ("base", "base:upper", "upper")] == [None, "base:upper", "upper"]
        qwen2.adapters.unload("base:upper")
        assert names.adapter("base:upper") == "upper"
    finally:
        qwen2.adapters.unload("upper")
