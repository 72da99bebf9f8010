from __future__ import annotations

import json
import re

import pytest
from rigs import within

import lorax_core as lorax
from lorax_core.errors import CapacityError, RequestError

LIMIT = 120  # seconds: for a constraint that is worked on for ever
# The library gives up on it after some thirty letters.
TOO_COMPLEX = {"regex": "((a{1,100}){1,100}){1,100}b", "logit_bias": {ord("b"): -100.0}}

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(qwen2):
    with lorax.load(qwen2, kv_cache_tokens=2048) as engine:
        yield engine


def sampled(engine, seeds, **options):
    requests = [
        lorax.GenerateRequest(prompt="abc", max_tokens=200, temperature=20.0, seed=seed, **options) for seed in seeds
    ]
    return [completion.text for completion in engine.run(requests)]


def test_text_follows_a_json_schema_however_random_the_model(engine):
    texts = sampled(engine, range(4), json_schema=SCHEMA)

    for text in texts:
        person = json.loads(text)
        assert set(person) == {"name", "age"}
        assert len(person["name"]) <= 5
        assert 0 <= person["age"] <= 99


def test_text_matches_a_regular_expression_whole(engine):
    texts = sampled(engine, range(8), regex=r"[a-f]{3}-[0-9]{2,4}")

    assert all(re.fullmatch(r"[a-f]{3}-[0-9]{2,4}", text) for text in texts)
    assert len(set(texts)) > 1


def test_text_is_one_of_the_choices(engine):
    choices = ["yes", "no", 'may "be"']

    texts = sampled(engine, range(12), choice=choices)

    assert set(texts) <= set(choices)
    assert len(set(texts)) > 1


def test_a_constrained_answer_stops_by_itself(engine):
    completion = engine.generate("abc", choice=["yes", "no"], max_tokens=50)

    assert completion.finish_reason == "stop"


def test_constrained_and_free_requests_share_a_batch(engine):
    free = lorax.GenerateRequest(prompt="abc", max_tokens=6, ignore_eos=True)
    alone = engine.run([free])[0].token_ids

    constrained, beside = engine.run([lorax.GenerateRequest(prompt="abc", choice=["yes"], max_tokens=6), free])

    assert constrained.text == "yes"
    assert beside.token_ids == alone


def test_each_of_several_answers_follows_the_constraint_its_own_way(engine):
    completion = engine.generate("abc", regex="[0-9]{4}", n=3, temperature=1.0, seed=5)

    texts = [one.text for one in (completion, *completion.alternatives)]
    assert all(re.fullmatch("[0-9]{4}", text) for text in texts)
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    "constraint", [{"regex": "[a-"}, {"json_schema": {"type": "nonsense"}}, {"json_schema": "{not json"}]
)
def test_a_constraint_that_makes_no_sense_is_refused_and_the_engine_serves_on(engine, constraint):
    with pytest.raises(RequestError, match="constraint"):
        engine.generate("abc", max_tokens=4, **constraint)

    assert engine.generate("abc", max_tokens=4, ignore_eos=True).usage.completion_tokens == 4


def test_a_checkpoint_without_a_tokenizer_cannot_be_constrained(tmp_path):
    from builders import make_qwen2

    with (
        lorax.load(make_qwen2(tmp_path, tokenizer=False), kv_cache_tokens=256) as engine,
        pytest.raises(RequestError, match=r"needs a checkpoint with a fast tokenizer"),
    ):
        engine.generate([1, 2], regex="a", max_tokens=4)


@pytest.mark.parametrize("count", [2_000, 10_000])
def test_thousands_of_choices_are_choices(engine, count):
    choices = [f"{at} is one of the choices" for at in range(count)]

    texts = sampled(engine, range(3), choice=choices)

    assert set(texts) <= set(choices)
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    "constraint", [{"choice": ["<|end|>"]}, {"regex": r"a<\|end\|>b"}, {"json_schema": {"const": "<|end|>"}}]
)
def test_text_that_is_written_like_a_special_token_is_spelt_out(engine, constraint):
    texts = sampled(engine, range(2), **constraint)

    assert set(texts) <= {"<|end|>", "a<|end|>b", '"<|end|>"'}


def test_a_constraint_that_the_library_gives_up_on_ends_with_an_error_and_no_other_request_does(engine):
    free = lorax.GenerateRequest(prompt="abc", max_tokens=80, ignore_eos=True)
    alone = engine.run([free])[0].token_ids
    constrained = lorax.GenerateRequest(prompt="abc", **TOO_COMPLEX, max_tokens=200, n=2)

    with pytest.raises(lorax.StepError) as caught:
        within(LIMIT, lambda: engine.run([free, constrained, free]))

    before, failure, after = caught.value.results
    assert before.token_ids == after.token_ids == alone
    assert type(failure) is CapacityError
    assert "cannot be followed" in failure.message
    assert failure.hint


def test_a_stream_of_such_a_constraint_ends_with_the_error(engine):
    stream = engine.stream("abc", **TOO_COMPLEX, max_tokens=200)

    with pytest.raises(CapacityError, match="cannot be followed"):
        within(LIMIT, lambda: list(stream))


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def joined(count, inside=0):
    """Patterns that hold together, in as many parts; each more takes four times as long."""
    parts = [{"type": "string", "pattern": f"(a|b)*a(a|b){{{at}}}c"} for at in range(count)]
    return {"allOf": [{"allOf": parts[:inside]}, *parts[inside:]] if inside else parts}


NO_SCHEMA = {
    "many patterns together": joined(30),
    "many patterns in parts of parts": joined(14, 7),
    "patterns that are named together": {
        "allOf": [{"$ref": f"#/$defs/{at}"} for at in range(20)],
        "$defs": {str(at): one for at, one in enumerate(joined(20)["allOf"])},
    },
    "a negative number that is too large": {"type": "integer", "minimum": -(2**70)},
    "many keys": {"enum": [{"a": at} for at in range(6_000)]},
    "itself": {"$ref": "#"},
    "a definition of itself": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "itself twice": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "in a circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "a large number": {"type": "integer", "minimum": 2**70},
    "a large constant": {"const": 2**64},
    "a number of many digits": {"const": 10**5000},
    "a number that is none": {"const": float("nan")},
    "infinite": {"maximum": float("inf")},
    "many properties": {"properties": {f"p{at}": {"type": "integer"} for at in range(10_000)}},
    "long": {"const": "a" * 300_000},
    "deep": nested(2_000),
    "no JSON": {"const": object()},
    "no JSON either": {"const": {1, 2}},
    "half a character": {"const": "\ud800"},
    "half a character as text": '{"const": "\\ud800"}',
    "long text": " " * 300_000,
    "text of many digits": '{"const": ' + "9" * 5_000 + "}",
    "deep text": "[" * 100_000,
    "no object": "[1, 2]",
    "a number": "5",
    "elsewhere": {"$ref": "http://127.0.0.1:9/schema.json"},
    "a wrong type": {"type": 5},
    "a wrong pattern": {"type": "string", "pattern": "(?<=a)b"},
}


@pytest.mark.parametrize("case", NO_SCHEMA)
def test_a_schema_that_cannot_be_followed_is_refused_before_anything_runs(engine, case):
    with pytest.raises(RequestError) as caught:
        within(LIMIT, lambda: engine.submit([lorax.GenerateRequest(prompt="abc", json_schema=NO_SCHEMA[case])]))

    assert "constraint" in caught.value.message or "json_schema" in caught.value.message
    assert "IndexError" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": -(2**62), "maximum": 2**62},
        nested(40),
        {"allOf": [{"type": "string", "pattern": p} for p in ("^[ab]+$", "^.{1,4}$")]},
        {"allOf": [{"minimum": at} for at in range(20)], "type": "integer"},
        True,
        {},
    ],
)
def test_a_schema_at_the_limits_is_followed(engine, schema):
    given = json.dumps(schema) if schema is True else schema
    if schema is True:
        with pytest.raises(RequestError, match="not an object"):
            engine.generate("abc", json_schema=given, max_tokens=60)
        return

    completion = engine.generate("abc", json_schema=given, max_tokens=60)

    assert completion.token_ids


@pytest.mark.parametrize(
    "regex",
    [
        "(a+)+b",
        "(x+x+)+y",
        "(((((a*)*)*)*)*)*b",
        "(?:a|aa|aaa)*b",
        ".*a.{20}",
        "(" * 3_000 + "a" + ")" * 3_000,
        r"\1(a)",
    ],
)
def test_an_expression_is_followed_or_refused_in_little_time(engine, regex):
    def tried():
        try:
            return engine.generate("abc", regex=regex, max_tokens=30).text
        except RequestError as error:
            return error.message

    found = within(LIMIT, tried)

    assert "constraint" in found or 1 <= len(found) <= 30


def test_blanks_between_the_parts_of_json_are_bounded(engine):
    eager = dict.fromkeys(map(ord, " \n\t"), 50.0)

    completion = engine.generate("abc", json_schema=SCHEMA, max_tokens=400, logit_bias=eager)

    assert completion.finish_reason == "stop"
    assert set(json.loads(completion.text)) == {"name", "age"}
    assert not re.search(r"\s{18}", completion.text)


@pytest.mark.parametrize("style", [{}, {"separators": (",", ":")}, {"indent": 2}, {"indent": 4}])
def test_json_may_be_written_in_the_usual_ways(engine, style):
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": SCHEMA}}, "required": ["a"]}
    request = lorax.GenerateRequest(prompt="a", json_schema=schema)
    preparer = engine._preparer
    grammar = preparer.grammars.grammar(request, preparer.text.tokenizer, preparer.eos_ids)

    for token in json.dumps({"a": [{"name": "b", "age": 5}]}, **style).encode():
        assert grammar.allowed()[token // 8] >> token % 8 & 1
        grammar.advance(token)

    assert grammar.complete
