"""OpenAI's own client, unmodified, against a server on loopback: whole answers, streams, tools, embeddings, errors."""

from __future__ import annotations

import asyncio
import base64
import json

import numpy as np
import openai
import pydantic
import pytest
from builders import make_byte_tokenizer, make_qwen2
from chats import CLOCK, TOOL_TEMPLATE, WEATHER
from loopback import listening

import lorax_core

CHAT = [{"role": "user", "content": "hello"}]
KEY = "a-key-of-clients"
GREEDY = {"model": "base", "temperature": 0}


@pytest.fixture(scope="module")
def engine(tmp_path_factory, repository):
    folder = make_qwen2(tmp_path_factory.mktemp("qwen2"), max_position_embeddings=2048)
    make_byte_tokenizer(TOOL_TEMPLATE).save_pretrained(folder)
    with lorax_core.load(folder, kv_cache_tokens=16_384, max_batch_rows=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine):
    with listening(engine, api_keys=[KEY], max_queue=2_000) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def asked(url):
    """Runs a coroutine over an asynchronous client."""

    def run(job):
        async def inside():
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
                return await job(client)

        return asyncio.run(inside())

    return run


def test_a_text_is_continued_as_the_engine_continues_it(engine, client):
    expected = engine.generate(["abc", "the thing"], max_tokens=12)

    found = client.completions.create(prompt=["abc", "the thing"], max_tokens=12, **GREEDY)
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=["abc", "the thing"], max_tokens=12, stream=True, **GREEDY):
        streamed[chunk.choices[0].index] += chunk.choices[0].text

    assert [one.text for one in found.choices] == [one.text for one in expected] == streamed
    assert [one.finish_reason for one in found.choices] == ["length", "length"]
    assert found.usage.completion_tokens == 24
    assert found.system_fingerprint


def test_a_prompt_of_token_ids_is_taken_as_it_is(engine, client):
    ids = engine.tokenize("abc").ids

    found = client.completions.create(prompt=[ids, ids], max_tokens=8, echo=True, **GREEDY)

    assert [one.text for one in found.choices] == ["abc" + engine.generate(ids, max_tokens=8).text] * 2


def test_a_conversation_is_answered_as_the_engine_answers_it(engine, asked):
    expected = engine.generate(CHAT, max_tokens=12)

    async def job(client):
        whole = client.chat.completions.create(messages=CHAT, max_completion_tokens=12, **GREEDY)
        stream = await client.chat.completions.create(
            messages=CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
        return await whole, [chunk async for chunk in stream]

    whole, chunks = asked(job)

    assert whole.choices[0].message.content == expected.text
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens == expected.usage.total_tokens


def test_equal_seeds_give_equal_answers_and_each_of_n_is_its_own(engine, client):
    options = {"messages": CHAT, "max_tokens": 8, "n": 3, "seed": 7, "model": "base"}
    expected = engine.generate(CHAT, max_tokens=8, n=3, seed=7, temperature=1.0)

    first = client.chat.completions.create(**options)
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""

    texts = [expected.text, *(one.text for one in expected.alternatives)]
    assert [one.message.content for one in first.choices] == texts == streamed
    assert len(set(texts)) == 3
    assert first.usage.prompt_tokens == expected.usage.prompt_tokens
    assert first.usage.completion_tokens == 24


def test_logprobs_are_the_engine_s_and_their_bytes_are_the_text(engine, client):
    expected = engine.generate(CHAT, max_tokens=10, logprobs=2)
    options = {"messages": CHAT, "max_tokens": 10, "logprobs": True, "top_logprobs": 2, **GREEDY}

    whole = client.chat.completions.create(**options).choices[0].logprobs.content
    streamed = []
    for chunk in client.chat.completions.create(**options, stream=True):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []

    assert [one.model_dump() for one in streamed] == [one.model_dump() for one in whole]
    assert [one.logprob for one in whole] == pytest.approx([one.logprob for one in expected.logprobs])
    assert [[top.logprob for top in one.top_logprobs] for one in whole] == [
        pytest.approx([*one.top.values()]) for one in expected.logprobs
    ]
    joined = b"".join(bytes(one.bytes) for one in whole)
    assert joined.decode(errors="replace").startswith(expected.text.rstrip("\ufffd"))


def test_a_stop_string_ends_an_answer_and_is_left_out(engine, client):
    text = engine.generate(CHAT, max_tokens=40).text
    stop = text[5:8]

    found = client.chat.completions.create(messages=CHAT, max_tokens=40, stop=[stop], **GREEDY).choices[0]

    assert found.message.content == text[: text.index(stop)]
    assert found.finish_reason == "stop"


class Answer(pydantic.BaseModel):
    """What an answer is parsed into."""

    ok: bool
    letter: str = pydantic.Field(max_length=2)


def test_an_answer_follows_a_schema_that_the_client_makes_of_a_class(client):
    found = client.chat.completions.parse(messages=CHAT, response_format=Answer, model="base", seed=3, max_tokens=300)

    assert isinstance(found.choices[0].message.parsed, Answer)


def test_json_object_gives_an_object(client):
    found = client.chat.completions.create(
        messages=CHAT, response_format={"type": "json_object"}, model="base", seed=1, max_tokens=300,
        logit_bias={str(ord("}")): 100},
    )  # fmt: skip

    assert isinstance(json.loads(found.choices[0].message.content), dict)


def tools(choice, **options):
    return {
        "messages": CHAT, "tools": [WEATHER, CLOCK], "tool_choice": choice, "model": "base", "seed": 4,
        "max_tokens": 400, "parallel_tool_calls": False, **options,
    }  # fmt: skip


def test_a_named_tool_is_called_and_its_result_is_told(client):
    named = {"type": "function", "function": {"name": "get_weather"}}

    choice = client.chat.completions.create(**tools(named)).choices[0]
    (call,) = choice.message.tool_calls
    messages = [*CHAT, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    after = client.chat.completions.create(messages=messages, tools=[WEATHER, CLOCK], max_tokens=3, model="base")

    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"place", "days"}
    assert after.choices[0].message.content is not None


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_calls_come_in_streams_whole(client, choice):
    # With "auto" and a schema, the first character decides between a call and an answer.
    answer = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    more = {"response_format": answer, "logit_bias": {str(ord("{")): -100}} if choice == "auto" else {}
    whole = client.chat.completions.create(**tools(choice, **more)).choices[0]

    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**tools(choice, **more), stream=True)]

    (call,) = whole.message.tool_calls
    (streamed,) = [one for chunk in chunks for one in chunk.delta.tool_calls or []]
    assert streamed.index == 0
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].finish_reason == whole.finish_reason == "tool_calls"


def test_calls_of_one_answer_are_numbered_in_a_stream(client):
    more = {"tools": [CLOCK], "parallel_tool_calls": True, "max_tokens": 300, "logit_bias": {str(ord("<")): 100}}
    whole = client.chat.completions.create(**tools("required", **more)).choices[0].message.tool_calls

    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**tools("required", **more), stream=True)]

    assert len(whole) > 1
    assert [call.index for chunk in chunks for call in chunk.delta.tool_calls or []] == [*range(len(whole))]


def test_an_answer_that_is_cut_within_its_second_call_ends_by_its_length(client):
    more = {"tools": [CLOCK], "parallel_tool_calls": True, "max_tokens": 90, "logit_bias": {str(ord("<")): 100}}

    whole = client.chat.completions.create(**tools("required", **more)).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**tools("required", **more), stream=True)]

    assert [call.function.name for call in whole.message.tool_calls] == ["clock"]
    assert whole.finish_reason == chunks[-1].finish_reason == "length"


def test_no_tool_is_shown_where_none_may_be_called(engine, client):
    found = client.chat.completions.create(messages=CHAT, tools=[CLOCK], tool_choice="none", max_tokens=6, **GREEDY)

    assert found.choices[0].message.content == engine.generate(CHAT, max_tokens=6).text
    assert found.usage.prompt_tokens == engine.count_tokens(CHAT)


def test_vectors_are_those_of_the_engine_in_either_encoding(engine, client):
    texts = ["a text", "another"]
    ids = [engine.tokenize(text).ids for text in texts]
    expected = engine.embed(texts)

    for given in (texts, ids):
        for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            found = client.embeddings.create(input=given, model="base", **form)
            vectors = [one.embedding for one in found.data]
            if form.get("encoding_format") == "base64":
                vectors = [np.frombuffer(base64.b64decode(one), "<f4") for one in vectors]
            np.testing.assert_allclose(np.array(vectors, "f4"), expected, rtol=1e-6)
    assert found.usage.total_tokens == sum(map(len, ids))


def test_models_are_listed_and_found(client):
    assert [one.id for one in client.models.list()] == ["base"]
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/name")
    assert caught.value.code == "model_not_found"


def test_errors_are_the_client_s_own(client, url):
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(messages=CHAT, model="base", top_p=2)
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(prompt="a", model="base", max_tokens=10_000)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(prompt="a", model="bose")
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as other:
        other.models.list()

    assert wrong.value.param == "top_p"
    assert long.value.code == "context_length_exceeded"
    assert unknown.value.code == "model_not_found"
    assert "'base'" in unknown.value.body["hint"]


def test_what_goes_wrong_before_a_stream_has_its_status_and_later_is_an_event(client):
    # The library gives up on it after some thirty letters.
    complex = {"guided_regex": "((a{1,100}){1,100}){1,100}b", "logit_bias": {str(ord("b")): -100}}
    options = {"prompt": "abc", "stream": True, **GREEDY}

    with pytest.raises(openai.BadRequestError) as before:
        client.completions.create(max_tokens=10_000, **options)
    with client.completions.create(max_tokens=200, extra_body=complex, **options) as stream:
        read = iter(stream)
        assert next(read).choices[0].text
        with pytest.raises(openai.APIError) as within:
            list(read)

    assert before.value.code == within.value.code == "context_length_exceeded"
    assert "cannot be followed" in within.value.message


def test_a_full_queue_is_a_rate_limit_error(engine):
    long = {"prompt": "abc", "max_tokens": 1_500, "extra_body": {"ignore_eos": True}, **GREEDY}
    with (
        listening(engine, max_queue=0) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        client.completions.create(**long, n=2, stream=True) as stream,
    ):
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**long)

    assert int(caught.value.response.headers["retry-after"]) >= 1
