from __future__ import annotations

import json
import re

import pytest

import lorax_core as lorax
from lorax_core.errors import RequestError

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
