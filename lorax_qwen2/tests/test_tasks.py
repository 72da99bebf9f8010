"""The shipped classifier and embedding adapter beside transformers and PEFT, on text that they never trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import with_lora
from transformers import AutoTokenizer, Qwen2ForSequenceClassification, Qwen2Model

import lorax_core as lorax

SHIPPED = Path(__file__).resolve().parents[2] / "examples/tiny_qwen2"
AREAS = {0: "numbers", 1: "files", 2: "tests"}
TOLD = {
    "There is no limit for the length of integer literals apart from what can be stored in available memory.": "numbers",
    "True if the path is absolute (has both a root and, if applicable, a drive).": "files",
    "Return True if name points to a tar archive that we are able to handle, else return False.": "files",
    "Returns a one-line description of the subtest, or None if no description has been provided.": "tests",
}
HALVES = {
    "Return a list of files in": "a given directory (default the current).",
    "Call the invalidate_caches() method on all meta": "path finders stored in sys.meta_path (where implemented).",
    "Return a bytes object with": "the contents for a .plist file.",
    "This will quote the value if": "needed or if quote is true.",
    "Wrapper for an overlapped pipe": "handle which is vaguely file-object like.",
}


@pytest.fixture(scope="module")
def engine(host):
    with lorax.load(SHIPPED / "model", host=host, kv_cache_tokens=8192) as engine:
        engine.adapters.load("topic", SHIPPED / "adapters/topic", id2label=AREAS)
        engine.adapters.load("similar", SHIPPED / "adapters/similar")
        yield engine


@torch.inference_mode()
def test_topic_is_right_and_its_scores_are_pefts(engine):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "model")
    oracle = with_lora(
        Qwen2ForSequenceClassification.from_pretrained(SHIPPED / "model", num_labels=3), SHIPPED / "adapters/topic"
    )

    answers = engine.classify(list(TOLD), adapter="topic")

    assert [answer.labels[0] for answer in answers] == list(TOLD.values())
    for text, answer in zip(TOLD, answers, strict=True):
        expected = oracle(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].softmax(-1)
        found = dict(zip(answer.labels, answer.scores, strict=True))
        assert [found[name] for name in AREAS.values()] == pytest.approx(expected.tolist(), abs=1e-4)


@torch.inference_mode()
def test_similar_finds_halves_that_the_base_does_not_and_its_vectors_are_pefts(engine):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "model")
    oracle = with_lora(Qwen2Model.from_pretrained(SHIPPED / "model"), SHIPPED / "adapters/similar")
    texts = [*HALVES, *HALVES.values()]

    vectors = {name: engine.embed(texts, adapter=name) for name in (None, "similar")}

    nearest = {}
    for name, found in vectors.items():
        left, right = np.split(found / np.linalg.norm(found, axis=1, keepdims=True), 2)
        nearest[name] = (left @ right.T).argmax(1).tolist()
    assert nearest["similar"] == list(range(len(HALVES)))
    assert nearest[None] != nearest["similar"]
    for text, vector in zip(texts, vectors["similar"], strict=True):
        expected = oracle(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0, -1]
        assert np.abs(vector - expected.numpy()).max() < 1e-4
