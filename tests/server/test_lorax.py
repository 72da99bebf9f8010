"""LoRAX's routes: shapes, adapters, and each parameter honoured or refused by name."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest
import transformers as hf
from asking import ask
from builders import BERT, make_letter_tokenizer, make_lora, make_qwen2, make_qwen2_model
from lorax_cases import HONOURED, LONG, TESTED_ALONE
from oracles import make_model, saved
from transformers import AutoTokenizer

import lorax_core
from lorax_core.server.lorax.answers import events as streamed_events
from lorax_core.server.lorax.params import Asked, GenerateParameters
from lorax_core.server.lorax.shapes import EntityAnswer, Generated, LoraxInfo, LoraxToken, StreamedToken
from lorax_core.types import Completion, Event, FinishReason, TokenLogprobs, Usage

PROMPT = "The cat"
ADAPTERS = "examples/tiny_qwen2/adapters"


@pytest.fixture(scope="module")
def engine(repository):
    folder = repository / "examples/tiny_qwen2"
    adapters = {name: folder / "adapters" / name for name in ("upper", "bullets")}
    with lorax_core.load(
        folder / "model", adapters=adapters, kv_cache_tokens=4_096, adapter_sources=[str(folder / "adapters")]
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def entities(tmp_path_factory):
    """A classifier of tokens, with B- and I- labels."""
    folder = tmp_path_factory.mktemp("ner")
    labels = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
    make_letter_tokenizer().save_pretrained(folder)
    saved(make_model(hf.BertForTokenClassification, BERT, seed=7, num_labels=5, id2label=labels), folder)
    with lorax_core.load(folder) as engine:
        yield engine


def generate(client, engine, path="/generate", prompt=PROMPT, **parameters):
    return ask(client(engine), "POST", path, json={"inputs": prompt, "parameters": {"max_new_tokens": 8, **parameters}})


def answered(client, engine, prompt=PROMPT, **parameters):
    """The one answer of `/`, which must have LoRAX's shape."""
    answer = generate(client, engine, "/", prompt, **parameters)
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()
    Generated.model_validate(found)
    return found


def events(answer):
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    for one in found:
        StreamedToken.model_validate(one)
    return found


def refused(client, engine, param, path="/generate", **parameters):
    """The refusal of a parameter, which it must name."""
    answer = generate(client, engine, path, **parameters)
    body = answer.json()
    assert answer.status_code == 422, answer.text
    assert body["error_type"] == "validation"
    assert body["error"].startswith(f"parameters.{param}:"), body
    return body


def test_an_adapter_s_own_tokenizer_reads_and_shows_what_is_asked_of_it(tmp_path, client):
    base, own = (
        make_qwen2(tmp_path / "base"),
        make_lora(make_qwen2_model(), tmp_path / "own", 1, target_modules=["q_proj"]),
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens("<hat>")
    tokenizer.save_pretrained(own)
    text, ids = "a <hat> a", tokenizer("a <hat> a")["input_ids"]
    with lorax_core.load(base, adapters={"own": own}, kv_cache_tokens=256) as engine:

        def post(path, **body):
            answer = ask(client(engine), "POST", path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        lorax = post("/tokenize", inputs=text, parameters={"adapter_id": "own"})
        [tei] = post("/tei/tokenize", inputs=text, model="own")
        decoded = post("/tei/decode", ids=ids, model="own")
        prefill = {"adapter_id": "own", "decoder_input_details": True, "max_new_tokens": 1}
        details = post("/generate", inputs=text, parameters=prefill)["details"]
        echo = {"echo": True, "logprobs": 0, "max_tokens": 1}
        [echoed] = post("/v1/completions", prompt=text, model="own", **echo)["choices"]
        plain = post("/tokenize", inputs=text)

    assert [[one["id"] for one in found] for found in (lorax, tei, details["prefill"])] == [ids] * 3
    assert decoded == [tokenizer.decode(ids)]
    assert len(echoed["logprobs"]["tokens"]) == len(ids) + 1
    assert len(plain) > len(ids)


def test_the_root_gives_a_list_and_generate_the_answer_alone(engine, client):
    expected = engine.generate(PROMPT, max_tokens=8)

    listed = generate(client, engine, "/", details=True)
    alone = generate(client, engine, "/generate", details=True)

    assert listed.json() == [alone.json()]
    details = alone.json()["details"]
    assert alone.json()["generated_text"] == expected.text
    assert (details["finish_reason"], details["seed"], details["prefill"]) == ("length", None, [])
    assert (details["prompt_tokens"], details["generated_tokens"]) == (3, 8)
    assert [one["id"] for one in details["tokens"]] == expected.token_ids
    assert "".join(one["text"] for one in details["tokens"]) == expected.text
    assert alone.headers["x-total-tokens"] == "11"
    assert alone.headers["x-prompt-tokens"] == "3"
    assert alone.headers["x-generated-tokens"] == "8"
    assert alone.headers["x-model-id"] == "base"
    assert alone.headers["x-compute-characters"] == str(len(PROMPT))
    assert {"x-compute-time", "x-total-time", "x-inference-time", "x-time-per-token"} <= set(alone.headers)
    assert "x-adapter-id" not in alone.headers


@pytest.mark.parametrize("path", ["/", "/generate_stream"])
def test_a_stream_has_an_event_for_each_token_and_ends_with_the_text(engine, client, path):
    expected = engine.generate(PROMPT, max_tokens=8, adapter="upper", logprobs=0)
    body = {
        "inputs": PROMPT,
        "stream": True,
        "parameters": {"max_new_tokens": 8, "adapter_id": "upper", "details": True},
    }

    answer = ask(client(engine), "POST", path, json=body)

    found = events(answer)
    assert [one["token"]["id"] for one in found] == expected.token_ids
    assert "".join(one["token"]["text"] for one in found) == expected.text
    np.testing.assert_allclose(
        [one["token"]["logprob"] for one in found], [one.logprob for one in expected.logprobs], rtol=1e-5
    )
    assert [one["generated_text"] for one in found] == [None] * 7 + [expected.text]
    assert found[-1]["details"] == {
        "finish_reason": "length",
        "prompt_tokens": 3,
        "generated_tokens": 8,
        "seed": None,
    }
    assert answer.headers["x-adapter-id"] == "upper"
    assert answer.headers["x-accel-buffering"] == "no"


def test_tokens_of_part_characters_and_special_tokens_make_the_text(tmp_path_factory, client):
    with lorax_core.load(make_qwen2(tmp_path_factory.mktemp("bytes"), seed=5)) as engine:
        # Random bytes, most of them parts of characters; the end token is special.
        body = {
            "inputs": "é",
            "parameters": {
                "max_new_tokens": 60,
                "ignore_eos_token": True,
                "details": True,
                "temperature": 3.0,
                "seed": 4,
            },
        }
        whole = ask(client(engine), "POST", "/generate", json=body).json()
        streamed = events(ask(client(engine), "POST", "/generate_stream", json=body))

    tokens = whole["details"]["tokens"]
    assert "".join(one["text"] for one in tokens if not one["special"]) == whole["generated_text"]
    assert "".join(one["token"]["text"] for one in streamed if not one["token"]["special"]) == whole["generated_text"]
    assert streamed[-1]["generated_text"] == whole["generated_text"]
    assert [one["token"]["id"] for one in streamed] == [one["id"] for one in tokens]
    assert "" in [one["text"] for one in tokens]


# --- each parameter ---


def test_every_parameter_is_tested():
    assert set(HONOURED) | TESTED_ALONE == set(GenerateParameters.model_fields)


@pytest.mark.parametrize("name", HONOURED)
def test_a_parameter_changes_the_answer_and_again_in_the_same_way(engine, client, name):
    given, without = HONOURED[name]

    first, again = answered(client, engine, LONG, **given), answered(client, engine, LONG, **given)

    assert first == again
    assert first != answered(client, engine, LONG, **without)


@pytest.mark.parametrize(
    ("parameters", "options"),
    [
        ({"adapter_id": "bullets"}, {"adapter": "bullets"}),
        ({"adapter_id": ""}, {}),
        ({"adapter_id": "__base_model__"}, {}),
        ({"adapter_id": "base:upper"}, {"adapter": "upper"}),
        (
            {"merged_adapters": {"ids": ["upper", "bullets", "upper"], "weights": [0.5, 0.3, 0.25], "density": 0.9}},
            {"adapter": {"upper": 0.75, "bullets": 0.3}},
        ),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"temperature": 0, "do_sample": True, "top_k": 3}, {}),
        ({"temperature": 1.0, "seed": 5}, {}),
        ({"top_k": 5, "seed": 5}, {"temperature": 1.0, "top_k": 5, "seed": 5}),
        ({"top_p": 0.9, "seed": 5}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}),
        ({"temperature": 0.7, "seed": 5}, {"temperature": 0.7, "seed": 5}),
        ({"truncate": 2}, {"truncate_prompt_tokens": 2}),
        ({"stop": ["e"]}, {"stop": ["e"]}),
    ],
)
def test_parameters_mean_what_the_engine_does_with_them(engine, client, parameters, options):
    expected = engine.generate(LONG, max_tokens=8, **options)

    assert answered(client, engine, LONG, **parameters)["generated_text"] == expected.text


def test_a_seed_that_the_answer_tells_gives_it_again(engine, client):
    first = answered(client, engine, do_sample=True, temperature=2.0, details=True)
    seed = first["details"]["seed"]

    again = answered(client, engine, do_sample=True, temperature=2.0, details=True, seed=seed)
    other = answered(client, engine, do_sample=True, temperature=2.0, details=True)

    assert again == first
    assert other["details"]["seed"] != seed


def test_the_best_of_several_answers_is_the_likeliest_and_each_can_be_had_alone(engine, client):
    found = answered(client, engine, best_of=3, do_sample=True, details=True)

    details = found["details"]
    others = details["best_of_sequences"]
    means = [np.mean([token["logprob"] for token in one["tokens"]]) for one in (details, *others)]
    assert len(others) == 2
    assert means == sorted(means, reverse=True)
    for one in others:
        alone = answered(client, engine, do_sample=True, seed=one["seed"])
        assert alone["generated_text"] == one["generated_text"]


def test_an_answer_ends_by_its_end_token_unless_that_is_ignored(tmp_path_factory, client):
    folder = make_qwen2(tmp_path_factory.mktemp("ends"), seed=3)
    with lorax_core.load(folder) as engine:
        ids = engine.generate("a", max_tokens=4).token_ids
    make_qwen2_model(3, eos_token_id=ids[-1]).save_pretrained(folder)
    with lorax_core.load(folder) as engine:
        ended = answered(client, engine, "a", details=True)["details"]
        ignored = answered(client, engine, "a", details=True, ignore_eos_token=True)["details"]

    assert (ended["finish_reason"], ended["generated_tokens"]) == ("eos_token", ids.index(ids[-1]) + 1)
    assert (ignored["finish_reason"], ignored["generated_tokens"]) == ("length", 8)


def test_text_that_was_held_back_is_not_lost_with_the_end_token(engine):
    """A stop string may begin with the last characters, which then come with a token that clients skip."""
    end = min(engine.special_ids)
    done = Completion(
        "ab", [7, end], FinishReason.STOP, Usage(1, 2), [TokenLogprobs(one, -1.0, {}) for one in (7, end)]
    )

    async def coming():
        yield Event(0, "a", [7], logprobs=done.logprobs[:1])
        yield Event(0, "b", [end], FinishReason.STOP, done, logprobs=done.logprobs[1:])

    async def collected():
        asked = Asked("x", GenerateParameters(), [lorax_core.GenerateRequest(prompt="x")], None)
        lines = streamed_events(SimpleNamespace(engine=engine), asked, coming())
        return [json.loads(line.removeprefix(b"data: ")) async for line in lines]

    first, last = asyncio.run(collected())

    assert (first["token"]["text"], first["generated_text"]) == ("a", None)
    assert (last["token"]["text"], last["token"]["special"], last["generated_text"]) == ("b", False, "ab")


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(engine, client):
    text = engine.generate(PROMPT, max_tokens=8).text
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8, "stop": [text[6:9]], "details": True}}

    whole = ask(client(engine), "POST", "/generate", json=body).json()
    streamed = events(ask(client(engine), "POST", "/generate_stream", json=body))

    assert (whole["generated_text"], whole["details"]["finish_reason"]) == (text[:6], "stop_sequence")
    assert "".join(one["text"] for one in whole["details"]["tokens"]) == text[:6]
    assert "".join(one["token"]["text"] for one in streamed) == text[:6]
    assert streamed[-1]["details"]["finish_reason"] == "stop_sequence"


def test_details_of_the_prompt_are_its_tokens_and_what_they_were_scored(engine, client):
    expected = engine.generate(LONG, max_tokens=1, prompt_logprobs=0)

    whole = answered(client, engine, LONG, decoder_input_details=True)["details"]["prefill"]
    cut = answered(client, engine, LONG, decoder_input_details=True, truncate=3)["details"]["prefill"]

    ids = engine.tokenize(LONG).ids
    assert [one["id"] for one in whole] == ids
    assert "".join(one["text"] for one in whole) == LONG
    assert [one["logprob"] for one in whole] == [None, *(one.logprob for one in expected.prompt_logprobs[1:])]
    assert [one["id"] for one in cut] == ids[-3:]


def test_alternatives_are_the_likeliest_tokens(engine, client):
    found = answered(client, engine, details=True, return_k_alternatives=3)["details"]["tokens"]

    for token in found:  # greedy, so the first alternative is the token itself
        scores = [one["logprob"] for one in token["alternative_tokens"]]
        assert token["alternative_tokens"][0]["id"] == token["id"]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("param", "parameters"),
    [
        ("watermark", {"watermark": True}),
        ("apply_chat_template", {"apply_chat_template": True}),
        ("adapter_source", {"adapter_id": "{adapters}/topic", "adapter_source": "pbase"}),
        ("adapter_source", {"adapter_id": "{adapters}/topic", "adapter_source": "hub"}),
        ("api_token", {"adapter_id": "{adapters}/topic", "api_token": "hf_x"}),
        ("merged_adapters", {"merged_adapters": {"ids": ["upper"], "weights": [1.0]}, "adapter_id": "upper"}),
        ("merged_adapters", {"merged_adapters": {"ids": ["upper"], "weights": [1.0, 2.0]}}),
        ("merged_adapters.ids", {"merged_adapters": {"ids": ["base"], "weights": [1.0]}}),
        ("best_of", {"best_of": 2}),
        ("best_of", {"best_of": 2, "do_sample": True, "temperature": 0}),
        ("seed", {"best_of": 2, "do_sample": True, "seed": 1}),
        ("return_k_alternatives", {"return_k_alternatives": 1}),
        ("response_format.schema", {"response_format": {"type": "json_schema"}}),
        ("response_format.schema", {"response_format": {"type": "text", "schema": {}}}),
        ("response_format.schema", {"response_format": {"type": "json_object", "schema": {"enum": ["x" * 99_999]}}}),
        ("temperature", {"temperature": -1}),
        ("top_p", {"top_p": 0}),
        ("best_offf", {"best_offf": 1}),
        ("max_new_tokens", {"max_new_tokens": "3"}),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(engine, client, repository, param, parameters):
    if "adapter_id" in parameters:
        adapter = parameters["adapter_id"].format(adapters=repository / ADAPTERS)
        parameters = {**parameters, "adapter_id": adapter}

    refused(client, engine, param, **parameters)


@pytest.mark.parametrize("parameters", [{"best_of": 2, "do_sample": True}, {"decoder_input_details": True}])
def test_what_a_stream_cannot_have_is_refused_before_it_begins(engine, client, parameters):
    refused(client, engine, next(iter(parameters)), "/generate_stream", **parameters)


def test_a_merge_that_takes_a_command_is_refused_with_the_command(engine, client):
    merged = {"ids": ["upper", "bullets"], "weights": [0.5, 0.25], "merge_strategy": "ties", "density": 0.5}

    body = refused(client, engine, "merged_adapters.merge_strategy", merged_adapters=merged)

    without = refused(client, engine, "merged_adapters.merge_strategy", merged_adapters={**merged, "density": 0})

    assert "lorax adapters merge upper bullets --out DIR --strategy ties --density 0.5 --weight 0.5" in body["hint"]
    assert "--strategy ties --weight 0.5" in without["hint"]


def test_an_adapter_is_fetched_from_a_folder_that_requests_may_name_and_from_no_other(engine, client, repository):
    named = str(repository / ADAPTERS / "similar")

    first = generate(client, engine, adapter_id=named, adapter_source="local")
    fetched = engine.adapters.list()
    again = generate(client, engine, adapter_id=named, api_token="changes nothing")
    wrong = generate(client, engine, adapter_id=named, adapter_source="s3")
    other = generate(client, engine, adapter_id=str(repository / "examples/tiny_qwen2/model"))
    unknown = generate(client, engine, adapter_id="uper")
    engine.adapters.unload(named)

    assert named in [one.name for one in fetched]
    assert first.json() == again.json()
    assert first.headers["x-adapter-source"] == "local"
    assert wrong.status_code == 422
    assert other.status_code == 404
    assert unknown.status_code == 404
    assert unknown.json()["hint"] == "did you mean 'upper'?"


def test_a_loaded_name_is_what_it_is_whatever_source_a_client_names(engine, client):
    expected = generate(client, engine, adapter_id="upper").json()

    for source in ("hub", "local", "s3", "pbase"):
        assert generate(client, engine, adapter_id="upper", adapter_source=source, api_token="x").json() == expected


# --- the other routes ---


def test_an_embedding_is_that_of_the_engine_with_its_adapter(engine, client):
    for parameters, adapter in ((None, None), ({"adapter_id": "upper"}, "upper")):
        answer = ask(
            client(engine), "POST", "/embed", json={"inputs": "a text", "parameters": parameters, "stream": False}
        )

        np.testing.assert_allclose(answer.json()["embeddings"], engine.embed("a text", adapter=adapter), rtol=1e-5)


def test_entities_have_their_text_as_it_is_written(entities, client):
    texts = ["Mary Smith went to Paris", "B"]
    expected = entities.classify(texts)

    one = ask(client(entities), "POST", "/classify", json={"inputs": texts[0], "parameters": None, "stream": False})
    both = ask(client(entities), "POST", "/classify_batch", json={"inputs": texts, "parameters": None, "stream": False})

    assert both.json()[0] == one.json()
    for text, found, answer in zip(texts, both.json(), expected, strict=True):
        assert [EntityAnswer.model_validate(entity) for entity in found]
        assert [(entity["entity_group"], entity["start"], entity["end"]) for entity in found] == [
            (entity.label, entity.start, entity.end) for entity in answer.entities
        ]
        assert all(entity["word"] == text[entity["start"] : entity["end"]] for entity in found)


def test_a_model_says_what_it_cannot_do(engine, entities, client):
    classify = ask(client(engine), "POST", "/classify", json={"inputs": "a"})
    generate = ask(client(entities), "POST", "/generate", json={"inputs": "a"})

    assert (classify.status_code, generate.status_code) == (422, 422)
    assert "'generate'" in classify.json()["error"]
    assert "'token-classification'" in generate.json()["error"]


def test_a_text_is_tokenized_with_special_tokens_or_without(entities, client):
    body = {"inputs": "a Bc"}

    whole = ask(client(entities), "POST", "/tokenize", json=body).json()
    plain = ask(client(entities), "POST", "/tokenize", json={**body, "add_special_tokens": False}).json()

    assert [LoraxToken.model_validate(one).text for one in whole] == ["[CLS]", "a", "B", "##c", "[SEP]"]
    assert plain == whole[1:-1]
    assert [(one["start"], one["stop"]) for one in plain] == [(0, 1), (2, 3), (3, 4)]


def test_info_has_the_limits_of_the_engine(engine, entities, client):
    found = LoraxInfo.model_validate(ask(client(engine), "GET", "/info").json())
    encoder = LoraxInfo.model_validate(ask(client(entities), "GET", "/info").json())

    assert (found.model_id, found.model_pipeline_tag) == ("base", "text-generation")
    assert found.max_total_tokens == engine.info().max_tokens
    assert found.max_input_length == engine.info().max_tokens - 1  # an answer has a token
    assert encoder.max_input_length == entities.info().max_text_tokens
    assert found.max_batch_total_tokens == engine.info().kv_cache_tokens
