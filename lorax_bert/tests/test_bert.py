"""BERT of random numbers beside transformers' BertModel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import make_bert, make_bert_model, make_letter_tokenizer
from rigs import Bench, make_loaded

import lorax_core as lorax

LENGTHS = (1, 2, 7, 33, 96)
VARIANTS = {
    "as it comes": {},
    "one layer, one head": {"num_hidden_layers": 1, "num_attention_heads": 1},
    "tanh gelu": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "a large epsilon": {"layer_norm_eps": 0.1},
    "one token type": {"type_vocab_size": 1},
    "heads of 64": {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256},
}


def make_texts(seed=0, vocab=200):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.inference_mode()
def oracle_rows(model, ids, types=None):
    return model(torch.tensor([ids]), token_type_ids=torch.tensor([types or [0] * len(ids)])).last_hidden_state[0]


def rows(base, *texts):
    """Hidden rows of texts, each ids or ids with token types, all in one batch."""
    bench = Bench(base)
    sequences = [bench.sequence(ids, types=types) for ids, types in texts]
    return bench.hidden(*((sequence, 0, len(sequence)) for sequence in sequences))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_hidden_rows_are_those_of_transformers(tmp_path, host, changes):
    base, model = make_loaded(make_bert(tmp_path, **changes), host), make_bert_model(**changes)

    found = rows(base, *((ids, None) for ids in make_texts()))

    for ours, ids in zip(found, make_texts(), strict=True):
        torch.testing.assert_close(ours, oracle_rows(model, ids), rtol=1e-4, atol=1e-5)


def test_token_types_count(tmp_path, host):
    base, model = make_loaded(make_bert(tmp_path), host), make_bert_model()
    ids = make_texts()[2]
    types = [0, 0, 0, 1, 1, 0, 1]

    typed, plain = rows(base, (ids, types), (ids, None))

    torch.testing.assert_close(typed, oracle_rows(model, ids, types), rtol=1e-4, atol=1e-5)
    assert (typed - plain).abs().max() > 0.01


def test_a_pair_is_embedded_with_the_types_of_its_texts(tmp_path, host):
    tokenizer = make_letter_tokenizer()
    made = tokenizer("ab c", "de")

    with lorax.load(make_bert(tmp_path), host=host) as engine:
        vectors = engine.embed([("ab c", "de"), ("de", "ab c")])

    assert 1 in made["token_type_ids"]
    expected = oracle_rows(make_bert_model(), made["input_ids"], made["token_type_ids"])
    np.testing.assert_allclose(vectors[0], expected[0], atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01


def test_without_sentence_files_a_text_is_its_first_row(tmp_path, host):
    ids = make_letter_tokenizer()("some words")["input_ids"]

    with lorax.load(make_bert(tmp_path), host=host) as engine:
        vector = engine.embed("some words")

    np.testing.assert_allclose(vector, oracle_rows(make_bert_model(), ids)[0], atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(tmp_path, host):
    base = make_loaded(make_bert(tmp_path), host)
    together = rows(base, *((ids, None) for ids in make_texts()))

    for ids, row in zip(make_texts(), together, strict=True):
        [alone] = rows(base, (ids, None))
        torch.testing.assert_close(alone, row, rtol=0, atol=1e-6)


def test_a_text_longer_than_the_positions_is_refused_with_the_numbers(tmp_path, host):
    with lorax.load(make_bert(tmp_path), host=host) as engine:
        assert engine.embed([5] * 96).shape == (64,)

        with pytest.raises(lorax.CapacityError, match=r"97 tokens .* takes 96"):
            engine.embed([5] * 97)
