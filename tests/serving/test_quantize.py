"""`load(quantize=...)`: which layers it rounds, what the engine then answers, and with adapters on top."""

from __future__ import annotations

import pytest
import torch
from builders import make_bert, make_lora, make_qwen2, make_qwen2_model
from oracles import make_model, ours, saved
from transformers import BertConfig, BertForSequenceClassification

import lorax_core
from lorax_core.errors import RequestError
from lorax_core.linear_methods.plain import PlainKernel
from lorax_core.linear_methods.quantized import QuantizedKernel
from lorax_core.linear_methods.select import LinearPolicy
from lorax_core.modeling.prepared import PreparedSite

FORMATS = ["int8", "int4"]
PROMPTS = [[1, 2, 3, 4], [7, 8, 9], [11, 12, 13, 14, 15, 16]]


def engine(folder, **options):
    return lorax_core.load(folder, kv_cache_tokens=512, dtype="float32", **options)


def methods(folder, **options):
    base = ours(folder, linear_policy=LinearPolicy(**options))
    return {choice.path: choice.method for choice in base.model.linears.choices}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_qwen2(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def test_every_layer_of_the_backbone_is_rounded_and_the_head_keeps_8_bits(tied):
    found = methods(tied, quantize="int4")

    assert found.pop("lm_head") == "int8"
    assert set(found.values()) == {"int4"}
    assert len(found) == 8


def test_heads_of_classification_keep_their_numbers(tmp_path):
    config = BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, num_labels=3
    )
    folder = saved(make_model(BertForSequenceClassification, config.to_diff_dict(), seed=1), tmp_path)

    found = methods(folder, quantize="int8")

    assert {path for path, method in found.items() if method != "int8"} == {"classifier", "pooler.dense"}


def test_a_pattern_wins_over_quantize_and_may_name_a_format(tied):
    found = methods(tied, quantize="int4", methods={"layers.0.*": "plain", "layers.1.mlp.*": "int8"})

    assert {method for path, method in found.items() if path.startswith("layers.0.")} == {"plain"}
    assert found["layers.1.mlp.down_proj"] == "int8"
    assert found["layers.1.self_attn.o_proj"] == "int4"


@pytest.mark.parametrize("quantize", FORMATS)
def test_a_tied_embedding_reads_the_rows_of_the_rounded_head(tied, quantize):
    model = ours(tied, linear_policy=LinearPolicy(quantize=quantize)).model
    embedding, head = model.sites["embed_tokens"], model.sites["lm_head"]
    ids = torch.tensor([3, 0, 319])

    assert embedding.weight is None  # memory holds it once
    assert embedding.kernel.method == head.kernel.method == "int8"
    assert torch.equal(embedding.kernel.rows(ids), head.kernel.dense()[ids])


def dequantized(base):
    """The same model with plain products of what its codes stand for."""
    for site in base.model.sites.values():
        if isinstance(site, PreparedSite) and isinstance(site.kernel, QuantizedKernel):
            site.adopt(PlainKernel(site.kernel.dense(), site.bias))
    return base


@pytest.mark.parametrize("quantize", FORMATS)
def test_answers_with_adapters_of_every_kind_are_those_of_the_rounded_weights(tied, quantize, tmp_path):
    """Beside a checkpoint that holds the rounded weights: what adapters add does not depend on how the base is computed."""
    theirs = make_qwen2_model(tie_word_embeddings=True)
    kinds = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True, "r": 5}}
    adapters = {
        name: make_lora(theirs, tmp_path / name, at, target_modules="all-linear", **options)
        for at, (name, options) in enumerate(kinds.items())
    }
    rounded = dequantized(ours(tied, linear_policy=LinearPolicy(quantize=quantize)))
    theirs.load_state_dict(_state(theirs, rounded))
    folder = saved(theirs, tmp_path / "rounded")
    names = [None, *adapters]
    prompts = [prompt for prompt in PROMPTS for _ in names]
    options = {"adapter": names * len(PROMPTS), "max_tokens": 1, "logprobs": 5}
    sources = {name: str(source) for name, source in adapters.items()}
    with engine(tied, quantize=quantize, adapters=sources) as served:
        found = served.generate(prompts, **options)
    with engine(folder, adapters=sources) as plain:
        expected = plain.generate(prompts, **options)

    for one, other in zip(found, expected, strict=True):
        mine, right = one.logprobs[0].top, other.logprobs[0].top
        shared = mine.keys() & right.keys()
        assert len(shared) >= 3
        assert max(abs(mine[token] - right[token]) for token in shared) < 0.25


def _state(theirs, base):
    """The numbers of our model under transformers' names; fused layers are taken apart."""
    state = theirs.state_dict()
    for name in state:
        path = name.removeprefix("model.").removesuffix(".weight").removesuffix(".bias")
        head, _, last = path.rpartition(".")
        for fused, parts in {
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "gate_up_proj": ("gate_proj", "up_proj"),
        }.items():
            if last in parts:
                site = base.model.sites[f"{head}.{fused}"]
                at = parts.index(last)
                first = sum(site.parts[:at])
                whole = site.kernel.dense() if name.endswith("weight") else site.bias
                state[name] = whole[first : first + site.parts[at]].clone()
                break
        else:
            site = base.model.sites.get(path)
            if site is not None and name.endswith("weight") and hasattr(site, "kernel"):
                state[name] = site.kernel.dense().clone()
    return state


@pytest.mark.parametrize("quantize", FORMATS)
def test_answers_do_not_depend_on_the_batch(tied, quantize):
    with engine(tied, quantize=quantize) as served:
        together = served.generate(PROMPTS, max_tokens=12)
        alone = [served.generate(prompt, max_tokens=12) for prompt in PROMPTS]

    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_an_engine_says_what_it_rounded_and_takes_less_memory(tied):
    with engine(tied, quantize="int8") as served:
        assert served.info().linear_methods == {"int8": 9}


def test_embeddings_of_rounded_weights_are_near_those_of_the_whole(tmp_path):
    folder = make_bert(tmp_path)
    vectors = []
    for quantize in (None, "int8"):
        with lorax_core.load(folder, dtype="float32", quantize=quantize) as served:
            vectors.append(torch.tensor(served.embed(["ab cd", "a longer text of some words"])))

    assert float(torch.cosine_similarity(*vectors).min()) > 0.99


def test_without_compiled_code_the_answers_are_the_same(tied, monkeypatch, caplog):
    from lorax_core.linear_methods import quantized

    with engine(tied, quantize="int8") as served:
        expected = served.generate(PROMPTS, max_tokens=6)
    monkeypatch.setenv("LORAX_NATIVE", "off")
    quantized._compiled.cache_clear()
    try:
        with engine(tied, quantize="int8") as served:
            found = served.generate(PROMPTS, max_tokens=6)
    finally:
        quantized._compiled.cache_clear()

    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert "in plain torch, which is slow: LORAX_NATIVE is off" in caplog.text


def test_other_formats_are_refused_with_those_that_there_are(tied):
    with pytest.raises(RequestError, match="quantize") as caught:
        lorax_core.load(tied, quantize="int3")
    assert "int8" in str(caught.value)
    with pytest.raises(RequestError, match="quantize"):
        lorax_core.load(tied, load_in_8bit=True)
