"""Logits of classifiers instead of probabilities, beside transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import BERT, QWEN2, make_letter_tokenizer
from oracles import make_model, saved
from transformers import BertForSequenceClassification, BertForTokenClassification, Qwen2ForSequenceClassification

import lorax_core as lorax

IDS = [2, 9, 30, 77, 13, 64, 41, 3]
NAMES = {"id2label": {0: "no", 1: "yes", 2: "maybe"}}


@torch.inference_mode()
def logits_of(model, ids=IDS):
    return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
@pytest.mark.parametrize(
    ("kind", "config"), [(BertForSequenceClassification, BERT), (Qwen2ForSequenceClassification, QWEN2)]
)
def test_raw_scores_of_a_text_are_its_logits(tmp_path, kind, config, problem):
    model = make_model(kind, config, problem_type=problem, pad_token_id=0, **NAMES)
    expected = sorted(zip(logits_of(model).tolist(), NAMES["id2label"].values(), strict=True), reverse=True)
    folder = saved(model, tmp_path)

    with lorax.load(folder, max_batch_tokens=5) as engine:
        raw = engine.classify(IDS, raw_scores=True)

    assert raw.labels == [name for _, name in expected]
    np.testing.assert_allclose(raw.scores, [score for score, _ in expected], atol=2e-5)


def test_raw_scores_of_tokens_are_the_logits_of_their_labels(tmp_path):
    model = make_model(BertForTokenClassification, BERT, id2label={0: "O", 1: "B-X", 2: "I-X"})
    make_letter_tokenizer().save_pretrained(tmp_path)
    folder = saved(model, tmp_path)
    best = logits_of(model, make_letter_tokenizer()("abcdefg")["input_ids"])[1:-1].max(-1)

    with lorax.load(folder) as engine:
        raw = engine.classify("abcdefg", raw_scores=True)

    np.testing.assert_allclose(raw.scores, best.values, atol=2e-5)
    assert raw.labels == [model.config.id2label[at] for at in best.indices.tolist()]
    first = raw.entities[0]
    inside = [
        score for score, (start, _) in zip(raw.scores, raw.offsets, strict=True) if first.start <= start < first.end
    ]
    assert first.score == pytest.approx(np.mean(inside))


def test_requests_of_one_step_have_the_scores_that_each_asked_for(tmp_path):
    folder = saved(make_model(BertForSequenceClassification, BERT, **NAMES), tmp_path)
    asked = [False, True, False, True]

    with lorax.load(folder) as engine:
        found = engine.run([lorax.ClassifyRequest(input=IDS, raw_scores=raw) for raw in asked])

    assert [sum(one.scores) == pytest.approx(1, abs=1e-6) for one in found] == [not raw for raw in asked]
    logits = torch.tensor(found[1].scores)
    np.testing.assert_allclose(found[0].scores, logits.softmax(-1), atol=1e-6)
