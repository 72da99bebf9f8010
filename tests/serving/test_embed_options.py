"""Pooling, length, unit length and prompts of single requests, beside sentence-transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import BERT, make_bert, make_byte_tokenizer, make_lora, make_qwen2_model, make_sentence_files, with_lora
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import lorax_core as lorax

HIDDEN = BERT["hidden_size"]
TEXTS = ["Ab", "the quick brown fox", "x", "Jumps over THE lazy dog, twice!"]
PAIRS = [("Ab", "CD"), ("x", "Jumps over THE lazy dog")]
PROMPTS = {"query": "find this: ", "passage": "", "topic": "Topic? "}
NO_BAR = {"show_progress_bar": False, "convert_to_numpy": True}


def make_new(folder, *modules, **options):
    """A checkpoint as the installed sentence-transformers writes one; gives that library's model of it as well."""
    transformer = Transformer(str(make_bert(folder / "bert")), max_seq_length=64)
    made = SentenceTransformer(modules=[transformer, *modules], device="cpu", **options)
    made.save_pretrained(str(folder / "new"))
    return folder / "new", made


def assert_same(found, expected, tolerance=3e-6):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, np.asarray(other), atol=tolerance, rtol=0)
        assert one.dtype == np.float32
    assert max(np.abs(np.asarray(other)).max() for other in expected) > 10 * tolerance


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """Checkpoints whose prompts are pooled and are not."""
    return {
        include: make_new(
            tmp_path_factory.mktemp("prompted"),
            Pooling(HIDDEN, "mean", include_prompt=include),
            prompts=PROMPTS,
            default_prompt_name="topic",
        )
        for include in (True, False)
    }


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("inputs", [TEXTS, PAIRS], ids=["texts", "pairs"])
@pytest.mark.parametrize(
    "asked", [{}, {"prompt_name": "query"}, {"prompt_name": "passage"}, {"prompt": "Q: "}, {"prompt": ""}], ids=str
)
def test_prompts_are_put_in_front_as_sentence_transformers_does(prompted, include, inputs, asked):
    folder, theirs = prompted[include]

    with lorax.load(folder) as engine:
        vectors = engine.embed(inputs, **asked)

    assert_same(vectors, theirs.encode(inputs, **asked, **NO_BAR))


def test_each_prompt_is_left_out_of_the_pooling_by_its_own_length(prompted):
    folder, theirs = prompted[False]
    asked = [{"prompt_name": "query"}, {}, {"prompt": "Q"}, {"prompt_name": "topic"}, {"prompt_name": "query"}]

    with lorax.load(folder) as engine:
        found = [engine.embed(TEXTS[1], **one) for one in asked]

    assert_same(found, [theirs.encode(TEXTS[1], **one, **NO_BAR) for one in asked])


def test_a_prompt_needs_no_files(bert):
    with lorax.load(bert, pooling="mean") as engine:
        np.testing.assert_allclose(engine.embed("fox", prompt="the "), engine.embed("the fox"), atol=1e-6)
        with pytest.raises(lorax.RequestError, match="no prompt is called 'query'; the checkpoint names none"):
            engine.embed("fox", prompt_name="query")


@pytest.mark.parametrize(
    ("asked", "told", "hint"),
    [
        (
            {"prompt_name": "qery"},
            "no prompt is called 'qery'; the checkpoint names 'document', 'passage', 'query', 'topic'",
            "'query'",
        ),
        ({"prompt_name": "zz"}, "no prompt is called 'zz'", "prompt='query: '"),
        ({"prompt_name": "query", "prompt": "a"}, "prompt_name and prompt exclude each other", ""),
        ({"text": [5, 9], "prompt": "a"}, "token ids are taken as they are", ""),
        ({"dimensions": 65}, "65 were asked for, and the vectors of this checkpoint have 64", "1 to 64"),
        ({"dimensions": 65, "pooling": "none"}, "have 64", "1 to 64"),
        ({"dimensions": 0}, "dimensions: ", ""),
        ({"pooling": "max"}, "pooling: ", ""),
        ({"normalise": True}, "no option 'normalise'", "'normalize'"),
        ({"truncate_dim": 5}, "no option 'truncate_dim'", "'dimensions'"),
        ({"text": [], "dimensions": "8"}, "dimensions: ", ""),
    ],
    ids=str,
)
def test_options_that_cannot_be_followed_are_refused(prompted, asked, told, hint):
    folder, _ = prompted[True]

    with lorax.load(folder) as engine, pytest.raises(lorax.RequestError, match=told) as caught:
        engine.embed(**{"text": "fox", **asked})

    assert hint in caught.value.hint


@pytest.mark.parametrize("normal", [True, False], ids=["unit", "any"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "plain"])
def test_length_and_unit_length_are_those_of_each_request(tmp_path, normal, dense):
    torch.manual_seed(6)
    projection = [Dense(HIDDEN, 24)] if dense else []
    folder, theirs = make_new(tmp_path, Pooling(HIDDEN, "mean"), *projection, *([Normalize()] if normal else []))
    plain = SentenceTransformer(
        modules=[module for module in theirs if not isinstance(module, Normalize)], device="cpu"
    )
    asked = [(scale, length) for scale in (None, True, False) for length in (None, 1, 9, 24)]

    with lorax.load(folder) as engine:
        found = engine.run(
            [
                lorax.EmbedRequest(input=text, normalize=scale, dimensions=length)
                for text in TEXTS
                for scale, length in asked
            ]
        )

    expected = {
        (scale, length): plain.encode(
            TEXTS, truncate_dim=length, normalize_embeddings=normal if scale is None else scale, **NO_BAR
        )
        for scale, length in asked
    }
    assert_same([one.vector for one in found], [expected[one][at] for at in range(len(TEXTS)) for one in asked])


def test_no_texts_give_a_matrix_of_the_length_that_was_asked_for(prompted):
    folder, _ = prompted[True]

    with lorax.load(folder) as engine:
        assert engine.embed([], dimensions=9).shape == (0, 9)
        assert engine.embed([], pooling="none") == []


@pytest.mark.parametrize("include", [True, False])
def test_each_request_is_pooled_by_its_own_mode(tmp_path, include):
    modes = {"cls": "cls", "mean": "mean", "last": "lasttoken"}
    folder, _ = make_new(tmp_path, Pooling(HIDDEN, "mean", include_prompt=include), Normalize(), prompts=PROMPTS)
    theirs = {
        mode: SentenceTransformer(
            modules=[
                Transformer(str(folder), max_seq_length=64),
                Pooling(HIDDEN, name, include_prompt=include),
                Normalize(),
            ],
            device="cpu",
        )
        for mode, name in modes.items()
    }
    asked = [(mode, prompt, text) for text in TEXTS for prompt in ("", "find: ") for mode in modes]

    with lorax.load(folder) as engine:
        found = engine.run(
            [lorax.EmbedRequest(input=text, pooling=mode, prompt=before) for mode, before, text in asked]
        )

    expected = [theirs[mode].encode(text, prompt=before, **NO_BAR) for mode, before, text in asked]
    assert_same([one.vector for one in found], expected)


@pytest.mark.parametrize("include", [True, False])
def test_without_pooling_the_rows_of_all_tokens_come(tmp_path, include):
    folder, theirs = make_new(
        tmp_path, Pooling(HIDDEN, "mean", include_prompt=include), Dense(HIDDEN, 24), Normalize(), prompts=PROMPTS
    )

    with lorax.load(folder) as engine:
        rows = engine.embed(TEXTS, pooling="none", prompt_name="query")
        one = engine.embed(TEXTS[1], pooling="none", prompt_name="query")
        short = engine.embed(TEXTS, pooling="none", prompt_name="query", dimensions=9, normalize=True)
        usage = engine.run([lorax.EmbedRequest(input=TEXTS[1], pooling="none", prompt_name="query")])[0].usage

    expected = theirs.encode(TEXTS, prompt_name="query", output_value="token_embeddings", show_progress_bar=False)
    assert_same(rows, expected, 2e-5)
    assert_same([one], [expected[1]], 2e-5)
    assert usage.prompt_tokens == len(one)
    assert_same(short, [torch.nn.functional.normalize(rows[:, :9], dim=-1) for rows in expected], 2e-5)


def test_a_causal_model_pools_prompts_in_chunks_beside_all_else(tmp_path):
    model = make_qwen2_model()
    model.save_pretrained(tmp_path / "base")
    make_byte_tokenizer().save_pretrained(tmp_path / "base")
    lora = make_lora(model, tmp_path / "lora", seed=5)
    ids = list(range(7, 90))
    modes = ["last", "none", "mean", "cls", None]
    names = [None, "it"]
    requests = [lorax.EmbedRequest(input=ids, pooling=mode, adapter=name) for name in names for mode in modes]
    more = [lorax.GenerateRequest(prompt=ids, max_tokens=4, ignore_eos=True)]

    with lorax.load(tmp_path / "base", adapters={"it": lora}, max_batch_tokens=32, kv_cache_tokens=2048) as engine:
        twice = [engine.run([*requests, *more]) for _ in range(2)]  # the second time, from what the cache has of them

    expected = []
    for adapter in (None, lora):
        oracle = model if adapter is None else with_lora(model, adapter)
        with torch.inference_mode():
            rows = oracle(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        expected += [rows[-1], rows, rows.mean(0), rows[0], rows[-1]]
    for found in twice:
        assert_same([one.vector for one in found[:-1]], expected, 2e-4)
        assert len(found[-1].token_ids) == 4


def test_rows_of_tokens_are_computed_though_a_cache_has_the_text(qwen2):
    ids = list(range(7, 90))

    with lorax.load(qwen2, kv_cache_tokens=1024) as engine:
        last = engine.embed(ids)
        rows = engine.embed(ids, pooling="none")

    assert rows.shape == (len(ids), 64)
    np.testing.assert_allclose(rows[-1], last, atol=1e-4)


def test_a_text_that_is_all_prompt_keeps_a_row(tmp_path):
    folder = make_sentence_files(make_bert(tmp_path), pooling={"pooling_mode": "mean", "include_prompt": False})

    with lorax.load(folder) as engine:
        vectors = [engine.embed("", prompt="find: ", pooling=mode) for mode in ("cls", "mean", "last")]

    assert all(np.isfinite(vector).all() for vector in vectors)
