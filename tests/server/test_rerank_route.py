"""`/v1/rerank`: order and scores are the engine's, in the shape that Cohere's, Jina's and vLLM's clients read."""

from __future__ import annotations

import numpy as np
import pytest
import transformers as hf
from asking import ask
from builders import BERT, make_letter_tokenizer, make_lora
from oracles import make_model, saved

import lorax_core
from lorax_core.server.rerank import Reranked, best_first
from lorax_core.server.schemas import OpenAIError
from lorax_core.types import Relevance, Usage

QUERY = "who ate it"
DOCUMENTS = ["the dog", "a cat that sat on the mat", "x"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("reranker")
    model = make_model(hf.BertForSequenceClassification, BERT, seed=3, num_labels=1)
    make_letter_tokenizer().save_pretrained(root / "base")
    saved(model, root / "base")
    adapter = make_lora(model, root / "lora", seed=7, task_type="SEQ_CLS", target_modules=["query"])
    with lorax_core.load(root / "base", adapters={"tuned": adapter}) as engine:
        yield engine


def rerank(client, engine, path="/v1/rerank", **body):
    return ask(client(engine, max_batch=4), "POST", path, json={"query": QUERY, "documents": DOCUMENTS, **body})


def ranked(answer):
    assert answer.status_code == 200, answer.text
    return Reranked.model_validate(answer.json())


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_documents_come_the_best_first(engine, client, path):
    expected = engine.rerank(QUERY, DOCUMENTS)

    found = ranked(rerank(client, engine, path))

    assert [one.index for one in found.results] == [one.index for one in expected]
    np.testing.assert_allclose(
        [one.relevance_score for one in found.results], [one.score for one in expected], rtol=1e-5
    )
    assert found.model == "base"
    assert found.usage.total_tokens == sum(len(engine.tokenize((QUERY, one)).ids) for one in DOCUMENTS)


def test_documents_of_one_score_keep_their_order():
    results = [Relevance(score, Usage(1)) for score in (0.5, 0.7, 0.5, 0.7)]

    assert best_first(results) == [(1, 0.7), (3, 0.7), (0, 0.5), (2, 0.5)]


def test_every_option_is_honoured(engine, client):
    plain = ranked(rerank(client, engine))

    assert ranked(rerank(client, engine, top_n=1)).results == plain.results[:1]
    worst_first = [DOCUMENTS[one.index] for one in reversed(plain.results)]
    assert ranked(rerank(client, engine, top_n=1, documents=worst_first)).results[0].index == len(DOCUMENTS) - 1
    texts = ranked(rerank(client, engine, return_documents=True, documents=[{"text": one} for one in DOCUMENTS]))
    assert [one.document.text for one in texts.results] == [DOCUMENTS[one.index] for one in plain.results]
    raw = ranked(rerank(client, engine, use_activation=False))
    logits = [one.score for one in engine.rerank(QUERY, DOCUMENTS, normalize=False)]
    np.testing.assert_allclose([one.relevance_score for one in raw.results], logits, rtol=1e-5)
    tuned = ranked(rerank(client, engine, model="tuned"))
    scores = [one.score for one in engine.rerank(QUERY, DOCUMENTS, adapter="tuned")]
    np.testing.assert_allclose([one.relevance_score for one in tuned.results], scores, rtol=1e-5)
    assert tuned.results != plain.results
    assert tuned.model == "tuned"
    long = {"documents": ["word " * 60]}
    assert rerank(client, engine, **long).json()["error"]["code"] == "context_length_exceeded"
    assert len(ranked(rerank(client, engine, truncate_prompt_tokens=-1, **long)).results) == 1


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"documents": []}, 400, "documents"),
        ({"documents": ["a"] * 5}, 413, "documents"),
        ({"top_n": 0}, 400, "top_n"),
        ({"max_tokens_per_doc": 10}, 400, "max_tokens_per_doc"),
        ({"rank_fields": ["a"]}, 400, "rank_fields"),
        ({"truncate_prompt_tokens": 5}, 400, "truncate_prompt_tokens"),
        ({"topn": 1}, 400, "topn"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(engine, client, body, status, param):
    answer = rerank(client, engine, **body)

    assert answer.status_code == status, answer.text
    assert OpenAIError.model_validate(answer.json()).error.param == param
