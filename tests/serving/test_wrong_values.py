"""Any value in any option: an answer, or a LoraxError with the next step and nothing else; and the engine serves on."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from odd_values import EVERY, ODD, doubled, values
from rigs import within

import lorax_core as lorax
from lorax_core.modeling.model import Model
from lorax_core.options import EngineOptions
from lorax_core.serving.engine import Engine

LIMIT = 300  # seconds: for a value that is worked on for ever
DRAWN = 25  # values of each test, besides those that have a name
PROBE = lorax.GenerateRequest(prompt=[5, 6, 7], max_tokens=3, ignore_eos=True)
KINDS = {
    lorax.GenerateRequest: {"prompt": "ab", "max_tokens": 2},
    lorax.EmbedRequest: {"input": "ab"},
    lorax.ClassifyRequest: {"input": "ab"},
    lorax.RerankRequest: {"query": "ab", "document": "c"},
}
FIELDS = [(kind, field) for kind in KINDS for field in kind.model_fields]


@pytest.fixture(scope="module")
def engine(qwen2):
    with lorax.load(qwen2, kv_cache_tokens=1024, adapter_sources=[]) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine):
    return engine.run([PROBE])[0].token_ids


def outcome(call, *args, **options):
    """What a call gave, or its error when that is one of ours, with a hint."""
    try:
        return within(LIMIT, lambda: call(*args, **options))
    except lorax.LoraxError as error:
        refused = error
    assert refused.hint, repr(refused)
    assert str(refused).encode()
    return refused


def answered(engine, kind, options):
    def call():
        # Short answers, whatever else is asked for: some values are sound.
        request = kind(**options)
        if kind is lorax.GenerateRequest and (request.max_tokens or 99) > 20:
            request = request.model_copy(update={"max_tokens": 2, "min_tokens": 0})
        return engine.run([request])

    return outcome(call)


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda one: getattr(one, "__name__", one))
def test_any_value_of_any_option_of_a_request_is_answered_or_refused(engine, expected, kind, field):
    for make in EVERY:
        answered(engine, kind, {**KINDS[kind], field: make()})

    @settings(max_examples=DRAWN)
    @given(values)
    def drawn(value):
        answered(engine, kind, {**KINDS[kind], field: value})

    drawn()
    assert engine.run([PROBE])[0].token_ids == expected


@pytest.mark.parametrize("field", EngineOptions.model_fields)
def test_any_value_of_any_option_of_an_engine_is_taken_or_refused(field):
    for make in EVERY:
        outcome(EngineOptions, **{"checkpoint": "m", field: make()})

    @settings(max_examples=DRAWN)
    @given(values)
    def drawn(value):
        found = outcome(EngineOptions, **{"checkpoint": "m", field: value})
        assert isinstance(found, (EngineOptions, lorax.LoraxError))

    drawn()


@pytest.mark.parametrize(("call", "options"), [*KINDS.items(), (EngineOptions, {"checkpoint": "m"})])
def test_a_billion_values_through_many_levels_are_refused(call, options):
    found = outcome(call, **{**options, next(iter(options)): doubled()})

    assert type(found) is lorax.RequestError


# What an engine is not loaded with here: `threads` is one for the process, and these three read from elsewhere.
LOADED = sorted({*EngineOptions.model_fields} - {"threads", "token", "revision"})


@pytest.mark.parametrize("field", LOADED)
def test_an_engine_is_loaded_or_refused(qwen2, field):
    def tried(value):
        with lorax.load(**{"checkpoint": str(qwen2), "kv_cache_tokens": 64, field: value}) as engine:
            assert len(engine.run([PROBE])) == 1

    for value in (
        2**31 - 1,
        2**59,
        1,
        1e-300,
        1.0,
        "a",
        "torch",
        "/nowhere",
        "\0",
        ["a"],
        {"a": "b/../c"},
        {"*": "plain"},
    ):
        outcome(tried, value)


METHODS = {
    "generate": lambda engine, value: engine.generate(value, max_tokens=2),
    "stream": lambda engine, value: list(engine.stream(value, max_tokens=2)),
    "embed": lambda engine, value: engine.embed(value),
    "classify": lambda engine, value: engine.classify(value),
    "run": lambda engine, value: engine.run(value),
    "submit": lambda engine, value: engine.submit(value).wait(),
    "count_tokens": lambda engine, value: engine.count_tokens(value),
    "adapter": lambda engine, value: engine.generate("ab", adapter=value, max_tokens=2),
    "an adapter for each": lambda engine, value: engine.embed(["ab", "c"], adapter=[value, value]),
    "truncate": lambda engine, value: engine.embed("ab", truncate=value),
    "from_options": lambda engine, value: Engine.from_options(value),
    "wait": lambda engine, value: engine.submit([PROBE]).wait(value),
    "load_model": lambda engine, value: lorax.load_model(value),
    "make_batch": lambda engine, value: lorax.make_batch(value, [[1]]),
}


@pytest.mark.parametrize("method", METHODS)
def test_any_value_in_any_call_is_answered_or_refused(engine, expected, method):
    def tried(value):
        # A time limit that is one may be too short.
        try:
            return outcome(METHODS[method], engine, value)
        except TimeoutError:
            assert method == "wait"
            return None

    for make in EVERY:
        tried(make())

    @settings(max_examples=DRAWN)
    @given(values)
    @example(5)
    def drawn(value):
        tried(value)

    drawn()
    assert engine.run([PROBE])[0].token_ids == expected


@pytest.mark.parametrize("option", ["model_class", "revision", "token", "dtype", "device", "host"])
def test_any_value_of_a_model_without_an_engine_is_taken_or_refused(qwen2, option):
    for make in [*ODD, lambda: "a", lambda: 5]:
        value = make()
        found = outcome(lorax.load_model, qwen2, **{option: value})
        assert isinstance(found, (Model, lorax.LoraxError))


def test_plugins_that_are_none_are_refused(qwen2):
    for make in EVERY:
        found = outcome(lorax.load, qwen2, kv_cache_tokens=64, host=make())

        if isinstance(found, Engine):
            found.close()
        else:
            assert isinstance(found, lorax.RequestError)


SURROGATE = "a\ud800"
PLACES = {
    "prompt": lambda engine, text: engine.generate(text, max_tokens=2),
    "prompts": lambda engine, text: engine.generate(["a", text], max_tokens=2),
    "chat": lambda engine, text: engine.generate([{"role": "user", "content": text}], max_tokens=2),
    "chat parts": lambda engine, text: engine.generate([{"role": "user", "content": [{"text": text}]}], max_tokens=2),
    "chat keys": lambda engine, text: engine.generate([{"role": "user", text: "a"}], max_tokens=2),
    "stop": lambda engine, text: engine.generate("a", stop=text, max_tokens=2),
    "stops": lambda engine, text: engine.generate("a", stop=["b", text], max_tokens=2),
    "choice": lambda engine, text: engine.generate("a", choice=["b", text], max_tokens=2),
    "regex": lambda engine, text: engine.generate("a", regex=text, max_tokens=2),
    "schema": lambda engine, text: engine.generate("a", json_schema={"const": text}, max_tokens=2),
    "schema keys": lambda engine, text: engine.generate("a", json_schema={"properties": {text: {}}}, max_tokens=2),
    "schema text": lambda engine, text: engine.generate("a", json_schema='{"const": "' + text + '"}', max_tokens=2),
    "adapter": lambda engine, text: engine.generate("a", adapter=text, max_tokens=2),
    "adapters": lambda engine, text: engine.generate("a", adapter={text: 1.0}, max_tokens=2),
    "embed": lambda engine, text: engine.embed(text),
    "pair": lambda engine, text: engine.embed(("a", text)),
    "classify": lambda engine, text: engine.classify(text),
    "truncate": lambda engine, text: engine.embed("a", truncate=text),
    "count_tokens": lambda engine, text: engine.count_tokens(text),
    "stream": lambda engine, text: list(engine.stream(text, max_tokens=2)),
    "option": lambda engine, text: engine.generate("a", **{text: 5}),
}


@pytest.mark.parametrize("place", PLACES)
def test_half_a_character_is_refused_wherever_it_stands(engine, expected, place):
    error = outcome(PLACES[place], engine, SURROGATE)

    assert type(error) is lorax.RequestError
    assert "ud800" in error.message
    assert engine.run([PROBE])[0].token_ids == expected


@pytest.mark.parametrize("field", ["checkpoint", "revision", "token", "device", "attention", "dtype"])
def test_half_a_character_is_no_option_of_an_engine(field):
    error = outcome(EngineOptions, **{"checkpoint": "m", field: SURROGATE})

    assert type(error) is lorax.RequestError
    assert field == "token" or "ud800" in error.message


MESSAGE = {"role": "user", "content": "a"}
BOUNDS = {
    "stop strings": ({"stop": ["ab"] * 128}, {"stop": ["ab"] * 129}),
    "two million stop strings": ({"stop": "ab"}, {"stop": ["ab"] * 2_000_000}),
    "a stop string": ({"stop": ["a" * 4_096]}, {"stop": ["a" * 4_097]}),
    "stop tokens": ({"stop_token_ids": [5] * 4_096}, {"stop_token_ids": [5] * 4_097}),
    "biases": ({"logit_bias": dict.fromkeys(range(320), 1.0)}, {"logit_bias": dict.fromkeys(range(4_097), 1.0)}),
    "choices": ({"choice": [f"c{at}" for at in range(10_000)]}, {"choice": [f"c{at}" for at in range(10_001)]}),
    "a choice": ({"choice": ["a" * 100_000]}, {"choice": ["a" * 100_000] * 3}),
    "an expression": ({"regex": "a" * 1_000}, {"regex": "a" * 300_000}),
    "answers": ({"n": 3}, {"n": 129}),
    "logprobs": ({"logprobs": 100}, {"logprobs": 101}),
    "logprobs of the prompt": ({"prompt_logprobs": 100}, {"prompt_logprobs": 101}),
    "top_k": ({"top_k": 2**31 - 1, "temperature": 1.0}, {"top_k": 2**31}),
    "a seed": ({"seed": 2**64 - 1}, {"seed": 2**64}),
    "summands": ({}, {"adapter": {f"a{at}": 1.0 for at in range(65)}}),
    "a name": ({}, {"adapter": "a" * 5_000}),
    "messages": ({"prompt": [MESSAGE] * 3}, {"prompt": [MESSAGE] * 10_001}),
    "a message": ({"prompt": [MESSAGE]}, {"prompt": [{**MESSAGE, "content": "a" * 17_000_000}]}),
    "a prompt": ({}, {"prompt": "a" * 17_000_000}),
    "lists in lists": ({}, {"prompt": [{**MESSAGE, "parts": [[[["a"] * 200] * 200] * 200] * 200}]}),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_what_a_request_may_measure_is_bounded(engine, case):
    largest, larger = BOUNDS[case]

    found = outcome(lambda: engine.run([lorax.GenerateRequest(**{"prompt": "ab", "max_tokens": 2, **largest})]))
    refused = outcome(lambda: lorax.GenerateRequest(**{"prompt": "ab", **larger}))

    assert isinstance(found, list), found
    assert type(refused) is lorax.RequestError


def test_a_request_whose_lists_were_changed_is_refused_and_nothing_starts(engine, expected):
    request = lorax.GenerateRequest(prompt=[5, 6], max_tokens=2)
    request.prompt.append("not an id")

    error = outcome(engine.run, [PROBE, request])

    assert type(error) is lorax.RequestError
    assert engine.run([PROBE])[0].token_ids == expected
