"""OpenAI's API, parameter by parameter: honoured or refused by name, and answers that have the shapes of `/openapi.json`."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

import lorax_core
from lorax_core.server.app import build_app
from lorax_core.server.openai import embeddings, shapes
from lorax_core.server.openai.chat import ChatBody
from lorax_core.server.openai.completions import CompletionBody
from lorax_core.server.options import ServerOptions
from lorax_core.server.schemas import OpenAIError

CHAT = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
BODIES = {
    "/v1/chat/completions": (ChatBody, {"messages": CHAT}),
    "/v1/completions": (CompletionBody, {"prompt": "The"}),
}
# What each parameter is to the engine, with a value that is not the default.
HONOURED = {
    "frequency_penalty": (0.5, {"frequency_penalty": 0.5}),
    "presence_penalty": (-0.5, {"presence_penalty": -0.5}),
    "logit_bias": ({"5": 3}, {"logit_bias": {5: 3}}),
    "n": (2, {"n": 2}),
    "seed": (-4, {"seed": -4}),
    "stop": (["a", "b"], {"stop": ["a", "b"]}),
    "temperature": (0, {"temperature": 0}),
    "top_p": (0.5, {"top_p": 0.5}),
    "response_format": ({"type": "json_object"}, {"json_schema": {"type": "object"}}),
    "top_k": (3, {"top_k": 3}),
    "min_p": (0.2, {"min_p": 0.2}),
    "typical_p": (0.9, {"typical_p": 0.9}),
    "repetition_penalty": (1.2, {"repetition_penalty": 1.2}),
    "min_tokens": (2, {"min_tokens": 2}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "stop_token_ids": ([7], {"stop_token_ids": [7]}),
    "prompt_logprobs": (1, {"prompt_logprobs": 1}),
    "priority": (-3, {"priority": 3}),
    "guided_json": (SCHEMA, {"json_schema": SCHEMA}),
    "guided_regex": ("a+", {"regex": "a+"}),
    "guided_choice": (["x"], {"choice": ["x"]}),
    "structured_outputs": ({"json": SCHEMA}, {"json_schema": SCHEMA}),
}
# About what is sent, how it comes back, or nothing at all; tests of their own hold those that do something.
ELSEWHERE = {
    "model", "max_tokens", "stream", "stream_options", "user", "metadata", "messages", "max_completion_tokens", "logprobs",
    "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "prompt", "best_of", "echo",
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(repository):
    folder = repository / "examples/tiny_qwen2"
    adapters = {"org/upper": str(folder / "adapters/upper"), "plain": str(folder / "adapters/upper")}
    with lorax_core.load(folder / "model", kv_cache_tokens=4_096, adapters=adapters, adapter_sources=[]) as engine:
        yield engine


@pytest.fixture(scope="module")
def app(engine):
    return build_app(engine, model_name="base")


@pytest.fixture
def ask(app):
    """Status and answer to a body; a list of chunks of a stream."""

    def asked(path, body=None, app=app):
        async def inside():
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as one:
                return await (one.get(path) if body is None else one.post(path, json=body))

        answer = asyncio.run(inside())
        if not answer.headers["content-type"].startswith("text/event-stream"):
            return answer.status_code, answer.json()
        *events, last = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
        assert last == "[DONE]"
        return answer.status_code, [json.loads(event) for event in events]

    return asked


def test_every_parameter_is_accounted_for():
    for kind, _ in BODIES.values():
        refused = kind.unsupported().keys()

        assert {*kind.model_fields} - refused <= {*HONOURED, *ELSEWHERE}
        assert not refused & (HONOURED.keys() | (ELSEWHERE - {"echo"}))


@pytest.mark.parametrize("parameter", HONOURED)
@pytest.mark.parametrize("path", BODIES)
def test_a_parameter_reaches_the_engine(path, parameter):
    kind, needed = BODIES[path]
    value, expected = HONOURED[parameter]

    body = kind(**needed, **{parameter: value})
    body.check()

    # The engine's own default is greedy, OpenAI's is not.
    assert body.options(ServerOptions()) == {"temperature": 1.0, **expected}


@pytest.mark.parametrize("path", BODIES)
def test_what_is_not_honoured_is_refused_by_name_unless_it_changes_nothing(ask, path):
    kind, needed = BODIES[path]
    assert kind.unsupported()
    for parameter, harmless in kind.unsupported().items():
        status, body = ask(path, {**needed, parameter: "something"})

        assert (status, body["error"]["param"]) == (400, parameter)
        for value in harmless:
            kind(**needed, **{parameter: value}).check()


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": "{}"}}]}]}, "messages.0.tool_calls"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": "no"}}]}]}, "messages.0.tool_calls.0.function.arguments"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
         "messages.0.content.0.type"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        *[("/v1/chat/completions", {name: 9_999, "stream": stream}, name)
          for name in ("max_tokens", "max_completion_tokens") for stream in (False, True)],
        ("/v1/chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("/v1/chat/completions", {"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ("/v1/chat/completions", {"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ("/v1/chat/completions", {"n": 129}, "n"),
        ("/v1/chat/completions", {"model": "nobody"}, "model"),
        ("/v1/chat/completions", {"temprature": 1}, "temprature"),
        ("/v1/chat/completions", {"temperature": "1"}, "temperature"),
        ("/v1/chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/chat/completions", {"stream": True, "stream_options": {"include_obfuscation": True}},
         "stream_options.include_obfuscation"),
        ("/v1/chat/completions", {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ("/v1/chat/completions", {"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ("/v1/chat/completions", {"structured_outputs": {"grammar": "start: /a/"}}, "structured_outputs.grammar"),
        ("/v1/chat/completions", {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ("/v1/chat/completions", {"guided_regex": "a" * 70_000}, "guided_regex"),
        ("/v1/chat/completions", {"stop": ["a" * 4_000, "b" * 4_000]}, "stop"),
        ("/v1/chat/completions", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ("/v1/chat/completions", {"stop": ["a"] * 129}, "stop"),
        ("/v1/chat/completions", {"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ("/v1/chat/completions", {"logit_bias": {"99999": 1}}, "logit_bias"),
        ("/v1/chat/completions", {"stop_token_ids": [99_999]}, "stop_token_ids"),
        *[("/v1/chat/completions", {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": choice,
                                    "response_format": {"type": "json_object"}}, "tool_choice")
          for choice in ("required", {"type": "function", "function": {"name": "f"}})],
        ("/v1/completions", {"best_of": 2}, "best_of"),
        ("/v1/completions", {"logit_bias": {"\u0665": 1}}, "logit_bias"),
        ("/v1/completions", {"max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"echo": True, "stream": True, "logprobs": 1}, "logprobs"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["a", 1]}, "input.1"),
        ("/v1/embeddings", {"input": "a", "dimensions": 9_999}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "prompt_name": "query"}, "prompt_name"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ("/v1/embeddings", {"input": ["a"] * 1_025}, "input"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(ask, path, changes, param):
    status, body = ask(path, {**BODIES.get(path, (None, {}))[1], **changes})

    assert status in (400, 404, 413)
    assert body["error"]["param"] == param, body
    OpenAIError.model_validate(body)


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/completions", "/v1/completions"),
        ("/embeddings", "/v1/embeddings"),
        ("/v1/chat/completion", "/v1/chat/completions"),
    ],
)
def test_an_address_without_v1_is_answered_with_the_route_that_was_meant(ask, path, near):
    status, body = ask(path, {})

    assert (status, body["error"]["message"]) == (404, f"there is no route {path}")
    assert body["error"]["hint"].startswith(f"did you mean {near}? GET /openapi.json")


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat/completions", {"prompt": "a"}, "unknown parameter 'prompt'; 'messages' is missing"),
        ("/v1/chat/completions", {"message": []}, "unknown parameter 'message'; did you mean 'messages'?"),
        (
            "/v1/completions",
            {"prompt": "a", "suffix": "b"},
            "suffix: 'b' is not supported by this server; leave it out",
        ),
        ("/v1/completions", {"prompt": "a", "max_tokens": "4"}, "max_tokens: Input should be a valid integer"),
        ("/v1/completions", {"prompt": "a " * 9_999}, "a prompt of "),
    ],
)
def test_the_message_alone_names_the_field(ask, path, body, message):
    _, found = ask(path, body)

    assert found["error"]["message"].startswith(message)
    assert found["error"]["param"] in message


@pytest.mark.parametrize("path", ["/generate", "/tokenize"])
def test_what_is_missing_is_named_where_another_field_came(ask, path):
    _, body = ask(path, {"prompt": "a"})

    assert body["error"] == "prompt: unknown parameter 'prompt'; 'inputs' is missing"


def test_the_place_of_wrong_json_is_named(app):
    async def inside():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as one:
            headers = {"Content-Type": "application/json"}
            return await one.post("/v1/completions", content=b'{"a": 1 "b": 2}', headers=headers)

    answer = asyncio.run(inside())

    assert answer.json()["error"]["message"] == "the body is not JSON: Expecting ',' delimiter at character 8"


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "model": "\\ud800"}',
        b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"\\ud800": 1}}',
        b'{"messages": [{"role": "user", "content": "a"}], "guided_json": ' + b'{"a":' * 930 + b"1" + b"}" * 931,
        b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": {"name": "f", '
        b'"parameters": ' + b'{"a":' * 930 + b"1" + b"}" * 934,
        b'{"messages": [{"role": "user", "content": "a"}], "guided_json": {"a": NaN}}',
        b'{"messages": [{"role": "user", "content": "a"}], "top_p": 1e999}',
        b'{"messages": [{"role": "user", "content": "a"}], "seed": 1' + b"0" * 4_000 + b"}",
        b"[" * 100_000,
        b"\xff",
        b"",
    ],
)
def test_no_body_is_an_error_of_the_server(app, body):
    async def inside():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as one:
            headers = {"Content-Type": "application/json"}
            return await one.post("/v1/chat/completions", content=body, headers=headers)

    answer = asyncio.run(inside())

    assert answer.status_code in (400, 404), answer.text
    shapes.OpenAIError.model_validate(answer.json())


@pytest.mark.parametrize(
    ("path", "changes", "said"),
    [
        ("/v1/embeddings", {"input": []}, "at least 1 item"),
        ("/v1/embeddings", {"input": [-1]}, "greater than or equal to 0"),
        ("/v1/completions", {"stop": ["a"] * 129}, "at most 128 items"),
    ],
)
def test_of_a_field_that_may_be_several_things_the_error_is_about_the_one_that_was_meant(ask, path, changes, said):
    _, body = ask(path, {**BODIES.get(path, (None, {}))[1], **changes})

    assert said in body["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}, 200),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 3}, 413),
        ("/v1/chat/completions", {"messages": CHAT, "n": 4}, 200),
        ("/v1/chat/completions", {"messages": CHAT, "n": 5}, 413),
    ],
)
def test_each_answer_to_a_prompt_counts_as_an_input(engine, ask, path, body, status):
    app = build_app(engine, ServerOptions(max_batch=4), model_name="base")

    found, _ = ask(path, {**body, "max_tokens": 1}, app)

    assert found == status


def test_tools_are_refused_where_the_template_does_not_know_them(ask):
    tool = {"type": "function", "function": {"name": "f"}}

    status, body = ask("/v1/chat/completions", {"messages": CHAT, "tools": [tool], "max_tokens": 2})

    assert status == 400
    assert "shows no tools" in body["error"]["message"]


def test_parts_of_text_are_one_text_and_a_developer_is_the_system(engine, ask):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "c"}, {"role": "user", "content": parts}]
    expected = engine.generate([{"role": "system", "content": "c"}, {"role": "user", "content": "a\nb"}], max_tokens=5)

    _, body = ask("/v1/chat/completions", {"messages": messages, "max_tokens": 5, "temperature": 0})

    assert body["choices"][0]["message"]["content"] == expected.text


def test_the_last_message_is_continued(engine, ask):
    messages = [*CHAT, {"role": "assistant", "content": "The optional"}]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 4, "temperature": 0}

    _, found = ask("/v1/chat/completions", body)

    expected = engine.generate("User: hello\nAssistant: The optional", max_tokens=4).text
    assert found["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("model", ["org/upper", "base:org/upper", "plain"])
def test_a_model_may_be_an_adapter(engine, ask, model):
    expected = engine.generate("The", adapter="org/upper", max_tokens=6).text

    _, body = ask("/v1/completions", {"prompt": "The", "model": model, "max_tokens": 6, "temperature": 0})
    status, card = ask(f"/v1/models/{model}")

    assert body["choices"][0]["text"] == expected != engine.generate("The", max_tokens=6).text
    _, vectors = ask("/v1/embeddings", {"input": "The", "model": model})

    assert body["model"] == vectors["model"] == model
    assert (status, card["parent"]) == (200, "base")
    assert card["id"] == model.removeprefix("base:")


def test_all_models_are_listed(engine, ask):
    _, body = ask("/v1/models")

    models = shapes.ModelList.model_validate(body).data
    assert [one.id for one in models] == ["base", "org/upper", "plain"]
    assert {one.max_model_len for one in models} == {engine.info().max_tokens}


def test_an_echo_has_log_probabilities_of_the_prompt_where_its_tokens_begin(engine, ask):
    prompt = "The default value"
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 3, "temperature": 0}
    expected = engine.generate(prompt, max_tokens=3, logprobs=1, prompt_logprobs=1)

    _, whole = ask("/v1/completions", body)
    _, alone = ask("/v1/completions", {**body, "max_tokens": 0})

    choice = whole["choices"][0]
    logprobs, text = choice["logprobs"], choice["text"]
    assert text == prompt + expected.text
    assert alone["choices"][0]["text"] == prompt
    assert alone["usage"]["completion_tokens"] == 0
    ends = [*logprobs["text_offset"][1:], len(text)]
    assert [text[at:end] for at, end in zip(logprobs["text_offset"], ends, strict=True)] == logprobs["tokens"]
    scores = [*expected.prompt_logprobs, *expected.logprobs]
    assert logprobs["token_logprobs"] == [None, *(pytest.approx(one.logprob) for one in scores[1:])]
    assert alone["choices"][0]["logprobs"]["tokens"] == logprobs["tokens"][:-3]


def test_an_echo_has_as_many_likeliest_tokens_as_logprobs_says(ask):
    body = {"prompt": "The default value", "echo": True, "logprobs": 1, "prompt_logprobs": 4, "max_tokens": 1}

    _, found = ask("/v1/completions", body)

    [choice] = found["choices"]
    # The likeliest, and the one that is there.
    assert all(len(one) <= 2 for one in choice["logprobs"]["top_logprobs"][1:])
    assert all(len(one) >= 4 for one in choice["prompt_logprobs"][1:])


ANSWERED = [
    ("/v1/completions", {"prompt": ["The", "a"], "n": 2, "logprobs": 2, "prompt_logprobs": 1, "seed": 1}),
    ("/v1/completions", {"prompt": "The", "echo": True, "temperature": 0}),
    ("/v1/completions", {"prompt": "The", "echo": True, "max_tokens": 0}),
    ("/v1/completions", {"prompt": "The", "logprobs": 0, "stop": "a", "seed": 3}),
    ("/v1/chat/completions", {"messages": CHAT, "n": 2, "logprobs": True, "top_logprobs": 3, "max_tokens": 5, "seed": 2}),
    ("/v1/chat/completions", {"messages": CHAT, "prompt_logprobs": 2, "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": CHAT, "guided_choice": ["yes", "no"], "seed": 2, "user": "u", "metadata": {}}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), ANSWERED)
def test_answers_and_chunks_have_the_shapes_that_are_described(ask, path, body):
    chat = "chat" in path
    _, whole = ask(path, body)
    (shapes.ChatCompletion if chat else shapes.TextCompletion).model_validate(whole)
    if "prompt_logprobs" in body:
        return

    _, chunks = ask(path, {**body, "stream": True, "stream_options": {"include_usage": True}})

    for chunk in chunks:
        (shapes.ChatCompletionChunk if chat else shapes.TextCompletion).model_validate(chunk)
    texts = [""] * len(whole["choices"])
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["delta"].get("content", "") if chat else choice["text"]
    assert texts == [choice["message"]["content"] if chat else choice["text"] for choice in whole["choices"]]
    assert {key: chunks[-1]["usage"][key] for key in ("prompt_tokens", "completion_tokens")} == {
        key: whole["usage"][key] for key in ("prompt_tokens", "completion_tokens")
    }


def test_tokens_of_the_prompt_that_were_in_the_cache_are_counted(ask):
    body = {"prompt": "The default value of the optional argument is a string " * 6, "max_tokens": 1}

    ask("/v1/completions", body)
    _, again = ask("/v1/completions", body)

    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_an_encoder_embeds_and_says_what_it_cannot_do(bert, ask):
    with lorax_core.load(bert) as encoder:
        app = build_app(encoder, model_name="encoder")
        status, body = ask("/v1/chat/completions", {"messages": CHAT}, app)
        done, vectors = ask("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}, app)

    assert status == 400
    assert "'generate'; it has 'embed'" in body["error"]["message"]
    assert done == 200
    shapes.EmbeddingList.model_validate(vectors)


@pytest.mark.parametrize("options", [{"dimensions": 3}, {"normalize": True}, {"dimensions": 5, "normalize": True}])
def test_vectors_are_shaped_as_asked(engine, ask, options):
    _, body = ask("/v1/embeddings", {"input": "The", **options})

    assert body["data"][0]["embedding"] == pytest.approx(engine.embed("The", **options).tolist())


def test_many_vectors_come_in_the_order_of_their_inputs(engine, ask):
    prompts = [[at] for at in range(1, 401)]
    expected = engine.embed(prompts)
    assert expected.size > embeddings._INLINE

    _, body = ask("/v1/embeddings", {"input": prompts})

    assert [one["index"] for one in body["data"]] == [*range(400)]
    assert body["data"][399]["embedding"] == pytest.approx(expected[399].tolist(), rel=1e-4, abs=1e-4)
    assert body["usage"]["total_tokens"] == 400


def test_a_prompt_that_the_checkpoint_does_not_name_is_refused(ask):
    status, body = ask("/v1/embeddings", {"input": "The", "prompt_name": "query"})

    assert status == 400
    assert "no prompt is called 'query'" in body["error"]["message"]


def test_errors_are_described_and_validation_has_no_status_of_its_own(ask):
    _, document = ask("/openapi.json")

    for path in (*BODIES, "/v1/embeddings"):
        responses = document["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "413", "429", "503", "504"} <= responses.keys()
        assert "422" not in responses
