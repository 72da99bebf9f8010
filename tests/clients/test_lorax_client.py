"""`lorax-client` as it is published, against a server on loopback."""

from __future__ import annotations

import numpy as np
import pytest
import transformers as hf
from builders import BERT, make_letter_tokenizer
from loopback import listening
from lorax_cases import HONOURED, LONG, TESTED_ALONE
from oracles import make_model, saved

import lorax_core

PROMPT = "The cat"
MERGED = {"ids": ["upper", "bullets"], "weights": [0.5, 0.4], "density": 0.0}
CALLED = {"stop": "stop_sequences"}
"""What the client calls a parameter that it sends under another name."""
SENT = {
    "adapter_source": {"adapter_id": "upper", "adapter_source": "hub"},
    "api_token": {"adapter_id": "upper", "api_token": "a-token"},
    "best_of": {"best_of": 2, "do_sample": True},
    "ignore_eos_token": {"ignore_eos_token": True},
}
"""Parameters that are taken, and tested for what they do elsewhere."""
both = pytest.mark.parametrize("asynchronous", [False, True], ids=["client", "async-client"])


@pytest.fixture
def ask(client, url):
    def ask(method="generate", **arguments):
        said = client(url, method, **{"prompt": PROMPT, "max_new_tokens": 8, **arguments})
        assert "error" not in said, said
        return said["found"]

    return ask


@both
def test_an_answer_with_its_details(ask, qwen2, asynchronous):
    expected = qwen2.generate(PROMPT, max_tokens=8, adapter="upper", logprobs=2, prompt_logprobs=0)

    found = ask(adapter_id="upper", decoder_input_details=True, return_k_alternatives=2, asynchronous=asynchronous)

    details = found["details"]
    assert found["generated_text"] == expected.text
    assert [one["id"] for one in details["tokens"]] == expected.token_ids
    assert [one["id"] for one in details["prefill"]] == qwen2.tokenize(PROMPT).ids
    assert [len(one["alternative_tokens"]) for one in details["tokens"]] == [2] * 8
    assert details["finish_reason"] == "length"
    np.testing.assert_allclose(
        [one["logprob"] for one in details["tokens"]], [one.logprob for one in expected.logprobs], rtol=1e-4
    )


@both
def test_a_stream(ask, qwen2, asynchronous):
    expected = qwen2.generate(PROMPT, max_tokens=8, adapter="bullets")

    found = ask("generate_stream", adapter_id="bullets", asynchronous=asynchronous)

    assert [one["token"]["id"] for one in found] == expected.token_ids
    assert "".join(one["token"]["text"] for one in found if not one["token"]["special"]) == expected.text
    assert found[-1]["generated_text"] == expected.text
    assert found[-1]["details"]["generated_tokens"] == 8


@both
def test_a_weighted_sum_of_adapters(ask, qwen2, asynchronous):
    expected = qwen2.generate(PROMPT, max_tokens=8, adapter={"upper": 0.5, "bullets": 0.4})

    assert ask(merged_adapters=MERGED, asynchronous=asynchronous)["generated_text"] == expected.text


@both
def test_the_best_of_several(ask, asynchronous):
    found = ask(best_of=2, do_sample=True, asynchronous=asynchronous)

    assert len(found["details"]["best_of_sequences"]) == 1


@both
def test_an_embedding(client, url, qwen2, asynchronous):
    found = client(url, "embed", inputs="a text", asynchronous=asynchronous)

    np.testing.assert_allclose(found["found"]["embeddings"], qwen2.embed("a text"), rtol=1e-4)


def test_entities(client, tmp_path):
    labels = {0: "O", 1: "B-PER", 2: "I-PER"}
    make_letter_tokenizer().save_pretrained(tmp_path)
    saved(make_model(hf.BertForTokenClassification, BERT, seed=7, num_labels=3, id2label=labels), tmp_path)
    texts = ["Mary Smith went", "to Paris"]

    # The asynchronous client's own classify does not read the list that LoRAX answers.
    with lorax_core.load(tmp_path) as engine, listening(engine) as url:
        one = client(url, "classify", inputs=texts[0])["found"]["entities"]
        both = client(url, "classify_batch", inputs=texts)["found"]
        expected = engine.classify(texts)

    assert one == both[0]["entities"]
    for found, answer in zip(both, expected, strict=True):
        assert [(entity["entity_group"], entity["word"]) for entity in found["entities"]] == [
            (entity.label, entity.text) for entity in answer.entities
        ]


def test_every_parameter_that_the_client_can_send_is_known(client, url):
    fields = client(url, "fields")["found"]

    assert set(fields["Parameters"]) <= set(HONOURED) | TESTED_ALONE
    assert set(fields["Request"]) == set(fields["BatchRequest"]) == {"inputs", "parameters", "stream"}
    for name in set(fields["Parameters"]) & set(HONOURED):
        given, without = ({CALLED.get(key, key): value for key, value in one.items()} for one in HONOURED[name])
        with_it, without_it = (
            client(url, "generate", **{"prompt": LONG, "max_new_tokens": 8, "details": False, **one})
            for one in (given, without)
        )
        assert "found" in with_it, (name, with_it)
        assert with_it != without_it, name
    for name in set(fields["Parameters"]) - set(HONOURED) - {"watermark"}:
        assert "found" in client(url, "generate", prompt=PROMPT, max_new_tokens=2, **SENT[name]), name


@both
@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"watermark": True}, "ValidationError", "parameters.watermark"),
        (
            {"merged_adapters": {**MERGED, "merge_strategy": "ties"}},
            "ValidationError",
            "merged_adapters.merge_strategy",
        ),
        ({"adapter_id": "uper"}, "NotFoundError", "parameters.adapter_id"),
        ({"adapter_id": "org/name"}, "NotFoundError", "parameters.adapter_id"),
        ({"max_new_tokens": 100_000}, "ValidationError", "too long"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "generate_stream"])
def test_a_refusal_is_the_clients_own_error(client, url, asynchronous, method, arguments, error, named):
    said = client(url, method, prompt=PROMPT, asynchronous=asynchronous, **arguments)

    assert said["error"] == error, said
    assert named in said["message"]
