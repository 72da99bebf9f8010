"""Reranking: scores and order are those of sentence-transformers' CrossEncoder, for pairs of texts and for conversations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import (
    BERT,
    QWEN2,
    change_json,
    change_tensors,
    make_bert,
    make_byte_tokenizer,
    make_letter_tokenizer,
    make_lora,
    with_lora,
)
from oracles import make_model, saved
from sentence_transformers import CrossEncoder
from transformers import BertForSequenceClassification, Qwen2ForSequenceClassification

import lorax_core as lorax
from lorax_core.serving.labels import relevance
from lorax_core.serving.text import Encoded

QUERY = "who ate it"
DOCUMENTS = ["the dog", "a cat that sat on the mat", "x", "Nobody knows, and nobody asked!"]
NO_BAR = {"show_progress_bar": False}
IDENTITY = {"activation_fn": "torch.nn.modules.linear.Identity"}
ONE = {"num_labels": 1}


def make_reranker(folder, **config):
    """A random BERT with one label and a tokenizer of letters."""
    model = make_model(BertForSequenceClassification, BERT, seed=3, **ONE)
    make_letter_tokenizer().save_pretrained(folder)
    return saved(model, folder, **config)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    return make_reranker(tmp_path_factory.mktemp("reranker"))


@pytest.fixture(scope="module")
def engine(reranker):
    with lorax.load(reranker) as engine:
        yield engine


def ranked_by_theirs(folder, documents=DOCUMENTS, query=QUERY, **options):
    found = CrossEncoder(str(folder), device="cpu", **options).rank(query, documents, batch_size=1, **NO_BAR)
    return [one["corpus_id"] for one in found], [one["score"] for one in found]


def assert_ranked(ranked, expected, tolerance=2e-6):
    order, scores = expected
    np.testing.assert_allclose([one.score for one in ranked], scores, atol=tolerance, rtol=2e-5)
    assert np.ptp(scores) > 100 * tolerance
    assert [one.index for one in ranked] == order


def test_order_and_scores_are_a_cross_encoders(engine, reranker):
    assert_ranked(engine.rerank(QUERY, DOCUMENTS), ranked_by_theirs(reranker))


def test_without_normalising_scores_are_logits(engine, reranker):
    expected = ranked_by_theirs(reranker, activation_fn=torch.nn.Identity())

    assert_ranked(engine.rerank(QUERY, DOCUMENTS, normalize=False), expected, 2e-5)


def test_a_checkpoint_that_names_no_sigmoid_gives_logits_there_and_when_asked_here(tmp_path):
    folder = make_reranker(tmp_path, sentence_transformers=IDENTITY)
    order, scores = ranked_by_theirs(folder)

    with lorax.load(folder) as engine:
        raw, normal = (engine.rerank(QUERY, DOCUMENTS, normalize=normal) for normal in (False, True))

    assert_ranked(raw, (order, scores), 2e-5)
    assert_ranked(normal, (order, torch.tensor(scores).sigmoid().tolist()))


def test_the_default_prompt_of_a_cross_encoder_is_put_before_the_query(tmp_path):
    folder = make_reranker(tmp_path)
    said = {"model_type": "CrossEncoder", "prompts": {"ask": "find: "}, "default_prompt_name": "ask"}
    plain = ranked_by_theirs(folder)
    change_json(folder / "config_sentence_transformers.json", **said)
    entry = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    (folder / "modules.json").write_text(f"[{entry}]".replace("'", '"'))
    change_json(folder / "sentence_bert_config.json", transformer_task="sequence-classification")
    expected = ranked_by_theirs(folder)

    with lorax.load(folder) as engine:
        ranked = engine.rerank(QUERY, DOCUMENTS)

    assert_ranked(ranked, expected)
    assert expected != plain


@pytest.mark.parametrize("query", [QUERY, QUERY * 12], ids=["the document", "both"])
def test_a_pair_that_is_too_long_is_cut_where_theirs_is(engine, reranker, query):
    documents = [one * 20 for one in DOCUMENTS]

    ranked = engine.rerank(query, documents, truncate="end")

    assert_ranked(ranked, ranked_by_theirs(reranker, documents, query))
    with pytest.raises(lorax.CapacityError, match="this checkpoint takes 96"):
        engine.rerank(query, documents)


def test_the_best_come_first(engine):
    whole = engine.rerank(QUERY, DOCUMENTS)

    assert [one.score for one in whole] == sorted((one.score for one in whole), reverse=True)
    assert engine.rerank(QUERY, DOCUMENTS, top_n=2) == whole[:2]
    assert engine.rerank(QUERY, DOCUMENTS, top_n=99) == whole
    assert engine.rerank(QUERY, []) == []


def test_equal_ones_come_as_they_were_given(tmp_path):
    folder = make_reranker(tmp_path)
    change_tensors(folder / "model.safetensors", lambda held: {**held, "classifier.bias": held["classifier.bias"] + 99})

    with lorax.load(folder) as engine:
        ranked = engine.rerank(QUERY, DOCUMENTS)

    assert ranked == [lorax.Ranked(at, 1.0) for at in range(len(DOCUMENTS))]


def test_a_pair_is_an_answer_like_any_other_of_a_step(engine):
    pair = lorax.RerankRequest(query=QUERY, document=DOCUMENTS[1])
    requests = [lorax.EmbedRequest(input="ab"), pair, lorax.ClassifyRequest(input=(QUERY, DOCUMENTS[1])), pair]

    vector, first, label, second = engine.run(requests)

    assert isinstance(first, lorax.Relevance)
    assert first == second
    assert first.usage.prompt_tokens == engine.count_tokens((QUERY, DOCUMENTS[1]))
    assert not first.truncated
    # A single label without a stated problem is a regression, whose score is the logit.
    assert first.score == pytest.approx(1 / (1 + np.exp(-label.scores[0])), abs=1e-6)
    np.testing.assert_allclose(vector.vector, engine.embed("ab"), atol=1e-5)


def test_a_sigmoid_is_exact_far_from_zero():
    low, small, large, high = (
        relevance(np.array([logit], np.float32), Encoded([5]), normalize=True).score for logit in (-800, -20, 30, 800)
    )

    assert (low, high) == (0.0, 1.0)
    assert small == pytest.approx(2.0611536e-09, rel=1e-6)
    assert 1 - large == pytest.approx(9.3576e-14, rel=1e-2)


def test_the_head_of_an_adapter_scores_beside_others(tmp_path):
    base = make_bert(tmp_path / "base")
    model = make_model(BertForSequenceClassification, BERT, **ONE)
    model.bert.load_state_dict(with_weights_of(base))
    folder = make_lora(model, tmp_path / "lora", task_type="SEQ_CLS", target_modules=["query"])
    inputs = make_letter_tokenizer()(QUERY, DOCUMENTS[1], return_tensors="pt")
    with torch.inference_mode():
        expected = with_lora(model, folder)(**inputs).logits.sigmoid().item()

    with lorax.load(base, adapters={"judge": folder}) as engine:
        pair = lorax.RerankRequest(query=QUERY, document=DOCUMENTS[1], adapter="judge")
        vector, found = engine.run([lorax.EmbedRequest(input="ab"), pair])
        with pytest.raises(lorax.RequestError, match=r"with one label; this checkpoint has heads for 'embed'"):
            engine.rerank(QUERY, DOCUMENTS)

    assert found.score == pytest.approx(expected, abs=2e-6)
    assert vector.vector.shape == (64,)


def with_weights_of(folder):
    from transformers import BertModel

    return BertModel.from_pretrained(folder).state_dict()


def make_causal(folder, template):
    """A random Qwen2 with one label, and a tokenizer of bytes with a chat template."""
    model = make_model(Qwen2ForSequenceClassification, QWEN2, seed=3, pad_token_id=256, **ONE)
    tokenizer = make_byte_tokenizer(template)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return saved(model, folder)


SHOWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %} so"
IN_PARTS = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}{% endfor %} so"


@pytest.mark.parametrize("template", [None, SHOWN, IN_PARTS], ids=["none", "texts", "parts"])
def test_a_chat_template_that_shows_both_makes_a_conversation_of_a_pair(tmp_path, template):
    folder = make_causal(tmp_path, template)

    with lorax.load(folder, max_batch_tokens=16) as engine:
        ranked = engine.rerank(QUERY, DOCUMENTS)

    assert_ranked(ranked, ranked_by_theirs(folder))


@pytest.mark.parametrize("query", [QUERY * 80, QUERY * 20], ids=["the query", "the document"])
def test_a_pair_without_special_tokens_is_cut_where_theirs_is(tmp_path, query):
    folder = make_causal(tmp_path, None)
    documents = [one * 30 for one in DOCUMENTS]

    with lorax.load(folder) as engine:
        ranked = engine.rerank(query, documents, truncate="end")

    assert_ranked(ranked, ranked_by_theirs(folder, documents, query))


def test_a_template_that_shows_other_roles_leaves_a_pair_of_texts(tmp_path):
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    plain = make_causal(tmp_path / "plain", None)
    folder = make_causal(tmp_path / "users", users)

    with lorax.load(folder) as engine:
        ranked = engine.rerank(QUERY, DOCUMENTS)

    assert_ranked(ranked, ranked_by_theirs(plain))


def test_a_conversation_that_is_too_long_keeps_its_end_as_theirs_does(tmp_path):
    folder = make_causal(tmp_path, SHOWN)
    documents = [one * 100 for one in DOCUMENTS]

    with lorax.load(folder) as engine:
        ranked = engine.rerank(QUERY, documents, truncate="end")
        with pytest.raises(lorax.RequestError, match="what this reranker is asked to do"):
            engine.rerank(QUERY, documents, truncate="start")

    assert_ranked(ranked, ranked_by_theirs(folder, documents))


def test_what_has_no_head_with_one_label_is_refused_with_those_that_it_has(tmp_path, qwen2):
    model = make_model(BertForSequenceClassification, BERT, id2label={0: "no", 1: "yes", 2: "maybe"})
    folder = saved(model, tmp_path)

    with lorax.load(folder) as engine, pytest.raises(lorax.RequestError) as several:
        engine.rerank(QUERY, DOCUMENTS)
    with lorax.load(qwen2) as engine, pytest.raises(lorax.RequestError) as none:
        engine.rerank(QUERY, DOCUMENTS)

    assert "has 3: 'no', 'yes', 'maybe'" in several.value.message
    assert "has heads for 'generate', 'embed'" in none.value.message
    assert "engine.classify" in several.value.hint


def test_a_checkpoint_without_a_tokenizer_cannot_read_a_pair(tmp_path):
    folder = saved(make_model(BertForSequenceClassification, BERT, **ONE), tmp_path)

    with lorax.load(folder) as engine, pytest.raises(lorax.RequestError, match="no tokenizer"):
        engine.rerank(QUERY, DOCUMENTS)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"documents": "the dog"}, "documents: a list of texts, not 'the dog'"),
        ({"documents": None}, "documents: a list of texts, not None"),
        ({"documents": ["a", 5]}, "document: "),
        ({"query": ["a"]}, "query: "),
        ({"top_n": 0}, "top_n: 1 or more, not 0"),
        ({"top_n": True}, "top_n: 1 or more, not True"),
        ({"adapter": ["a"]}, "adapter"),
        ({"truncate": "middle"}, "truncate: "),
        ({"normalize": "yes"}, "normalize: "),
    ],
)
def test_what_is_no_query_or_list_of_documents_is_refused(engine, given, told):
    with pytest.raises(lorax.RequestError, match=told) as caught:
        engine.rerank(**{"query": QUERY, "documents": DOCUMENTS, **given})

    assert caught.value.hint
