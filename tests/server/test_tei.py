"""TEI's routes over an embedder, a classifier and a reranker: what the engine says, in TEI's shapes."""

from __future__ import annotations

import numpy as np
import pytest
import transformers as hf
from asking import ask
from builders import BERT, make_bert, make_letter_tokenizer, make_sentence_files
from huggingface_hub import InferenceClient
from loopback import listening
from oracles import make_model, saved

import lorax_core
from lorax_core.server.tei.shapes import Prediction, Rank, TeiFailure, TeiInfo, TeiToken

TEXTS = ["a text", "another, longer one"]
LONG = "long " * 40


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    folder = make_bert(tmp_path_factory.mktemp("embedder"), seed=2)
    make_sentence_files(folder, sentence={"prompts": {"query": "ask: "}})
    with lorax_core.load(folder) as engine:
        yield engine


def make_scorer(folder, labels):
    names = {at: f"label-{at}" for at in range(labels)}
    make_letter_tokenizer().save_pretrained(folder)
    saved(make_model(hf.BertForSequenceClassification, BERT, seed=3, num_labels=labels, id2label=names), folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    with lorax_core.load(make_scorer(tmp_path_factory.mktemp("classifier"), 3)) as engine:
        yield engine


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    with lorax_core.load(make_scorer(tmp_path_factory.mktemp("reranker"), 1)) as engine:
        yield engine


def post(client, engine, path, **body):
    return ask(client(engine, max_batch=4), "POST", f"/tei{path}", json=body)


def good(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()


def failed(answer, status, kind):
    found = TeiFailure.model_validate(answer.json())
    assert (answer.status_code, found.error_type) == (status, kind), answer.text
    return found.error


def test_vectors_are_those_of_the_engine_and_come_as_a_list(embedder, client):
    expected = [embedder.embed(text, normalize=True) for text in TEXTS]

    answer = post(client, embedder, "/embed", inputs=TEXTS)
    one = post(client, embedder, "/embed", inputs=TEXTS[0])
    ids = post(client, embedder, "/embed", inputs=[embedder.tokenize(text).ids for text in TEXTS])
    alone = post(client, embedder, "/embed", inputs=embedder.tokenize(TEXTS[0]).ids)

    np.testing.assert_allclose(good(answer), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(good(one), expected[:1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(good(ids), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(good(alone), expected[:1], rtol=1e-5, atol=1e-6)
    assert answer.headers["x-compute-tokens"] == str(sum(len(embedder.tokenize(text).ids) for text in TEXTS))
    assert answer.headers["x-compute-characters"] == str(sum(map(len, TEXTS)))


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"normalize": False}, {"normalize": False}),
        ({"dimensions": 8}, {"dimensions": 8, "normalize": True}),
        ({"prompt_name": "query"}, {"prompt_name": "query", "normalize": True}),
    ],
)
def test_each_option_of_a_vector_is_honoured(embedder, client, asked, options):
    found = good(post(client, embedder, "/embed", inputs=TEXTS[0], **asked))

    np.testing.assert_allclose(found[0], embedder.embed(TEXTS[0], **options), rtol=1e-5, atol=1e-6)
    assert found != good(post(client, embedder, "/embed", inputs=TEXTS[0]))


@pytest.mark.parametrize(("direction", "side"), [("left", "start"), ("Left", "start"), ("Right", "end")])
def test_a_text_that_is_too_long_is_cut_at_the_side_that_was_named(embedder, client, direction, side):
    text = f"begin {LONG} end"

    found = good(post(client, embedder, "/embed", inputs=text, truncate=True, truncation_direction=direction))

    np.testing.assert_allclose(found[0], embedder.embed(text, truncate=side, normalize=True), rtol=1e-5, atol=1e-6)
    assert "too long" in failed(post(client, embedder, "/embed", inputs=text), 413, "Validation")


@pytest.mark.parametrize(("direction", "side"), [("left", "start"), ("right", "end")])
def test_pairs_labels_and_comparisons_are_cut_as_vectors_are(embedder, classifier, reranker, client, direction, side):
    text, cut = f"begin {LONG} end", {"truncate": True, "truncation_direction": direction}
    compared = {"source_sentence": text, "sentences": TEXTS}
    first, *others = embedder.embed([text, *TEXTS], truncate=side, normalize=True)
    labels, [ranked] = classifier.classify(text, truncate=side), reranker.rerank("who", [text], truncate=side)

    predicted = good(post(client, classifier, "/predict", inputs=text, **cut))
    [rank] = good(post(client, reranker, "/rerank", query="who", texts=[text], **cut))
    cosines = good(post(client, embedder, "/similarity", inputs=compared, parameters=cut))

    assert [one["label"] for one in predicted] == labels.labels
    np.testing.assert_allclose([one["score"] for one in predicted], labels.scores, rtol=1e-5)
    assert rank["score"] == pytest.approx(ranked.score, rel=1e-5)
    np.testing.assert_allclose(cosines, [one @ first for one in others], rtol=1e-5)


def test_every_token_has_a_vector(embedder, client):
    found = good(post(client, embedder, "/embed_all", inputs=TEXTS))
    [prompted] = good(post(client, embedder, "/embed_all", inputs=TEXTS[0], prompt_name="query"))

    expected = embedder.embed(TEXTS[0], pooling="none", normalize=False, prompt_name="query")
    np.testing.assert_allclose(prompted, expected, rtol=1e-5, atol=1e-6)
    for text, rows in zip(TEXTS, found, strict=True):
        expected = embedder.embed(text, pooling="none", normalize=False)
        assert np.shape(rows) == (len(embedder.tokenize(text).ids), 64)
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("raw", [False, True])
def test_labels_come_by_falling_score_for_texts_and_pairs(classifier, client, raw):
    pair = ("one", "two")
    expected = classifier.classify(["a", pair], raw_scores=raw)

    batch = good(post(client, classifier, "/predict", inputs=[["a"], list(pair)], raw_scores=raw))
    text = good(post(client, classifier, "/predict", inputs="a", raw_scores=raw))
    single = good(post(client, classifier, "/predict", inputs=["a"], raw_scores=raw))
    paired = good(post(client, classifier, "/predict", inputs=list(pair), raw_scores=raw))

    assert (text, single, paired) == (batch[0], batch[0], batch[1])
    for found, answer in zip(batch, expected, strict=True):
        assert [Prediction.model_validate(one).label for one in found] == answer.labels
        np.testing.assert_allclose([one["score"] for one in found], answer.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("raw", [False, True])
def test_texts_are_ranked_as_the_engine_ranks_them(reranker, client, raw):
    expected = reranker.rerank("who", TEXTS, normalize=not raw)

    found = good(post(client, reranker, "/rerank", query="who", texts=TEXTS, raw_scores=raw))
    with_text = good(post(client, reranker, "/rerank", query="who", texts=TEXTS, raw_scores=raw, return_text=True))

    assert [Rank.model_validate(one).index for one in found] == [one.index for one in expected]
    np.testing.assert_allclose([one["score"] for one in found], [one.score for one in expected], rtol=1e-5)
    assert all("text" not in one for one in found)
    assert [one["text"] for one in with_text] == [TEXTS[one.index] for one in expected]


def test_tokens_are_told_with_their_part_of_the_text(embedder, client):
    found = good(post(client, embedder, "/tokenize", inputs=["a Bc"]))[0]
    plain = good(post(client, embedder, "/tokenize", inputs="a Bc", add_special_tokens=False))[0]

    assert [(TeiToken.model_validate(one).text, one["special"]) for one in found] == [
        ("[CLS]", True), ("a", False), ("B", False), ("c", False), ("[SEP]", True),
    ]  # fmt: skip
    many = good(post(client, embedder, "/tokenize", inputs=["a Bc", LONG * 20]))

    assert plain == found[1:-1]
    assert (many[0], len(many[1])) == (found, len(embedder.tokenize(LONG * 20).ids))
    assert (found[0]["start"], found[3]["start"], found[3]["stop"]) == (None, 3, 4)


@pytest.mark.parametrize(
    ("engine", "kind"), [("embedder", "embedding"), ("classifier", "classifier"), ("reranker", "reranker")]
)
def test_info_says_what_kind_of_model_it_is(request, client, engine, kind):
    engine = request.getfixturevalue(engine)

    found = ask(client(engine, max_batch=4), "GET", "/tei/info").json()

    TeiInfo.model_validate(found)
    assert list(found["model_type"]) == [kind]
    assert found["max_input_length"] == engine.info().max_text_tokens
    assert found["max_client_batch_size"] == 4
    if kind == "embedding":
        assert found["model_type"][kind] == {"pooling": "mean"}
    else:
        assert found["model_type"][kind]["id2label"]["0"] == "label-0"


def test_health_needs_no_key_and_has_no_body(embedder, client):
    answer = ask(client(embedder, api_keys=["the-secret-key"]), "GET", "/tei/health")

    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("/embed", {"inputs": TEXTS[0], "dimensions": 99_999}, 422, "dimensions"),
        ("/embed", {"inputs": TEXTS[0], "prompt_name": "nobody"}, 422, "nobody"),
        ("/embed", {"inputs": TEXTS[0], "normalise": True}, 422, "normalize"),
        ("/embed", {"inputs": []}, 422, "inputs"),
        ("/embed", {"inputs": ["a"] * 5}, 413, "inputs"),
        ("/embed", {"inputs": [99_999]}, 422, "99999"),
        ("/embed_all", {"inputs": ["a"] * 5}, 413, "inputs"),
        ("/predict", {"inputs": [["a"]] * 5}, 413, "inputs"),
        ("/rerank", {"query": "a", "texts": ["b"] * 5}, 413, "texts"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"] * 5}}, 413, "inputs.sentences"),
        ("/tokenize", {"inputs": ["a"] * 5}, 413, "inputs"),
        ("/predict", {"inputs": ["a", "b", "c"]}, 422, "inputs"),
        ("/predict", {"inputs": "a"}, 422, "classification"),
        ("/rerank", {"query": "a", "texts": ["b"]}, 422, "reranking"),
        ("/tokenize", {"inputs": "a", "prompt_name": "query"}, 422, "prompt_name"),
        ("/predict", {"inputs": "a", "parameters": {"top_k": 2}}, 422, "parameters.top_k"),
        ("/decode", {"ids": [5], "skip_special_tokens": False}, 422, "skip_special_tokens"),
    ],
)
def test_what_cannot_be_is_refused_in_the_shape_of_tei(embedder, client, path, body, status, named):
    assert named in failed(post(client, embedder, path, **body), status, "Validation")


def test_the_route_without_a_name_does_what_the_base_was_trained_for(embedder, classifier, reranker, client):
    ranked = {"query": "who", "texts": TEXTS}

    for engine, path, body in (
        (embedder, "/embed", {"inputs": TEXTS}),
        (classifier, "/predict", {"inputs": "a"}),
        (reranker, "/rerank", ranked),
    ):
        named = good(post(client, engine, path, **body))
        assert good(post(client, engine, "", **body)) == named
        assert good(post(client, engine, "/", **body)) == named
    assert "query" in failed(post(client, embedder, "", **ranked), 422, "Validation")
    paths = ask(client(reranker), "GET", "/openapi.json").json()["paths"]
    assert "/rerank" in paths["/tei"]["post"]["description"]
    assert paths["/tei"]["post"]["requestBody"] == paths["/tei/rerank"]["post"]["requestBody"]


def test_sentences_are_compared_by_the_cosine_of_their_vectors(embedder, client):
    asked = {"source_sentence": "who", "sentences": TEXTS}
    first, *others = embedder.embed(["who", *TEXTS], normalize=True)

    found = good(post(client, embedder, "/similarity", inputs=asked))
    prompted = good(post(client, embedder, "/similarity", inputs=asked, parameters={"prompt_name": "query"}))

    np.testing.assert_allclose(found, [one @ first for one in others], rtol=1e-5)
    assert prompted != found
    wrong = {"source_sentence": "who", "sentences": []}
    assert "sentences" in failed(post(client, embedder, "/similarity", inputs=wrong), 422, "Validation")


def test_token_ids_become_text_again(embedder, client):
    rows = [embedder.tokenize(text).ids for text in TEXTS]

    assert good(post(client, embedder, "/decode", ids=rows)) == [embedder.detokenize(one) for one in rows]
    assert good(post(client, embedder, "/decode", ids=rows[0])) == [embedder.detokenize(rows[0])]
    assert "99999" in failed(post(client, embedder, "/decode", ids=[99_999]), 422, "Validation")
    assert "ids" in failed(post(client, embedder, "/decode", ids=[[5]] * 5), 413, "Validation")


def test_sparse_vectors_are_refused_by_name(embedder, client):
    assert "sparse" in failed(post(client, embedder, "/embed_sparse", inputs="a"), 404, "NotFound")


def test_the_client_of_huggingface_hub_needs_the_address_alone(embedder, classifier, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    with listening(embedder) as url:
        client = InferenceClient(f"{url}/tei", timeout=30)
        vectors = client.feature_extraction(TEXTS, normalize=True, truncate=True, truncation_direction="left")
        prompted = client.feature_extraction(TEXTS[0], prompt_name="query", dimensions=8)
        scores = InferenceClient(f"{url}/tei/similarity", timeout=30).sentence_similarity("who", TEXTS)
    with listening(classifier) as url:
        label = InferenceClient(f"{url}/tei/", timeout=30).text_classification("a")

    first, *others = embedder.embed(["who", *TEXTS], normalize=True)
    np.testing.assert_allclose(vectors, others, rtol=1e-5, atol=1e-6)
    expected = embedder.embed(TEXTS[0], prompt_name="query", dimensions=8, normalize=True)
    np.testing.assert_allclose(prompted[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scores, [one @ first for one in others], rtol=1e-5)
    assert (
        label.label == classifier.classify("a").labels[0]
    )  # of a single text TEI gives a list, and the client its first


def test_a_model_names_the_adapter_that_answers(repository, client):
    folder, text = repository / "examples/tiny_qwen2", "Read the next line of the file and close it."
    query, texts = "How do I read a file?", ["x", text]
    adapters = {name: folder / "adapters" / name for name in ("topic", "similar", "relevant")}
    with lorax_core.load(folder / "model", adapters=adapters, kv_cache_tokens=1_024) as engine:
        labels = good(post(client, engine, "/predict", model="topic", inputs=text))
        ranks = good(post(client, engine, "/rerank", model="base:relevant", query=query, texts=texts))
        [vector] = good(post(client, engine, "/embed", model="similar", inputs=text))
        compared = {"source_sentence": query, "sentences": texts}
        cosines = good(post(client, engine, "/similarity", model="similar", inputs=compared))
        unknown = post(client, engine, "/predict", model="topics", inputs=text)
        classified = engine.classify(text, adapter="topic")
        ranked = engine.rerank(query, texts, adapter="relevant")
        embedded = engine.embed(text, adapter="similar", normalize=True)
        first, *others = engine.embed([query, *texts], adapter="similar", normalize=True)

    assert [one["label"] for one in labels] == classified.labels
    # Requests of a server may meet in other steps, and round otherwise.
    near = [(one.index, pytest.approx(one.score, abs=1e-5)) for one in ranked]
    assert [(one["index"], one["score"]) for one in ranks] == near
    assert np.allclose(vector, embedded, atol=1e-6)
    np.testing.assert_allclose(cosines, [one @ first for one in others], rtol=1e-4, atol=1e-5)
    assert "did you mean 'topic'" in unknown.json()["hint"]
