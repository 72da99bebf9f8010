from __future__ import annotations

import pytest
import torch
from builders import change_json
from oracles import (
    TEXTS,
    add_tensors,
    assert_same,
    make_model,
    our_hidden,
    ours,
    rename_tensors,
    saved,
    their_hidden,
    their_logits,
)
from rigs import all_logits
from safetensors.torch import save_file
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2Model,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

import lorax_core as lorax
from lorax_core.errors import CapacityError, CheckpointError, RequestError
from lorax_core.types import Task
from lorax_qwen2.config import Qwen2Config as OurConfig
from lorax_qwen2.modeling import FlashQwen2ForCausalLM, FlashQwen2ForEmbeddings

QWEN2 = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
LONG = [[at * 7 % 96 for at in range(120)], [5, 9, 2]]  # most of it beyond the original length of the scalings
SCALINGS = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn without truncation": {"factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
    "yarn with its own attention": {"factor": 2.0, "original_max_position_embeddings": 32, "attention_factor": 1.3},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
OLD, NEW = "rope_theta and rope_scaling", "rope_parameters"
SPELLINGS = {
    OLD: lambda kind, more: {"rope_theta": 5000.0, "rope_scaling": {"type": kind, **more}, "rope_parameters": None},
    "rope_scaling with rope_type": lambda kind, more: {
        "rope_theta": 5000.0,
        "rope_scaling": {"rope_type": kind, **more},
        "rope_parameters": None,
    },
    NEW: lambda kind, more: {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **more}},
}


def make_qwen2(folder, kind=Qwen2ForCausalLM, seed=0, **changes):
    """A random Qwen2 of transformers, and its files."""
    model = make_model(kind, QWEN2, seed, **changes)
    return model, saved(model, folder)


def parse(**changes):
    return OurConfig.parse({**QWEN2, "model_type": "qwen2", **changes})


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_positions_are_those_of_transformers_in_every_spelling(scaling, spelling, tmp_path):
    rope = SPELLINGS[spelling](scaling.split()[0], SCALINGS[scaling])
    folder = saved(make_model(Qwen2ForCausalLM, QWEN2), tmp_path, **rope)
    oracle = Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    found = our_hidden(ours(folder), LONG)

    assert_same(found, their_hidden(oracle, LONG))


@pytest.mark.parametrize("original", [32, 100, 4096])
@pytest.mark.parametrize("theta", [10000.0, 1_000_000.0])
@pytest.mark.parametrize("scaling", ["default", *SCALINGS])
def test_frequencies_are_those_of_transformers_to_the_last_bit(scaling, theta, original):
    more = dict(SCALINGS.get(scaling, {}))
    if "original_max_position_embeddings" in more:
        more["original_max_position_embeddings"] = original
    parameters = {"rope_type": scaling.split()[0], "rope_theta": theta, **more}
    oracle = Qwen2RotaryEmbedding(Qwen2Config(**{**QWEN2, "head_dim": 80, "rope_parameters": dict(parameters)}))

    inverse, factor = parse(head_dim=80, rope_parameters=parameters).rope.frequencies(80)

    assert torch.equal(inverse, oracle.inv_freq)
    assert factor == oracle.attention_scaling


def test_a_fraction_of_the_head_is_not_read_as_in_transformers(tmp_path):
    folder = saved(make_model(Qwen2ForCausalLM, QWEN2), tmp_path, partial_rotary_factor=0.5)
    oracle = Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    assert_same(our_hidden(ours(folder)), their_hidden(oracle))


def test_dynamic_positions_are_exact_up_to_their_length_and_refused_beyond(tmp_path):
    rope = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 5000.0, "rope_parameters": None}
    folder = saved(make_model(Qwen2ForCausalLM, QWEN2), tmp_path, **rope)
    oracle = Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    longest = [at % 96 for at in range(128)]

    with lorax.load(folder, pooling="last") as engine:
        vector = engine.embed(longest)
        with pytest.raises(CapacityError, match=r"129 tokens is too long.*128"):
            engine.embed([*longest, 1])
        with pytest.raises(CapacityError, match="120 tokens and 9 more asked for is too long: the model holds 128"):
            engine.generate(longest[:120], max_tokens=9)

    assert_same([torch.from_numpy(vector)], [their_hidden(oracle, [longest])[0][-1]])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope.type.*'longrope'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "rope.type.*'mrope'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "stretch": 3}}, "rope.stretch"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": None}}, "rope type 'yarn' needs factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "0.5: Qwen2 turns whole heads",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers of 2"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types.1.*'linear_attention'"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, told):
    with pytest.raises(CheckpointError, match=told):
        parse(**changes)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"use_sliding_window": False, "max_window_layers": 0}, [None, None]),
        ({"use_sliding_window": True, "max_window_layers": 0}, [8, 8]),
        ({"use_sliding_window": True, "max_window_layers": 1}, [None, 8]),
        ({"use_sliding_window": True, "max_window_layers": 2}, [None, None]),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}, [8, None]),
        ({"use_sliding_window": True, "max_window_layers": 0, "is_causal": False}, [9, 9]),  # 8 on each side
    ],
)
def test_a_layer_has_the_window_that_its_place_gives_it(changes, windows):
    config = parse(sliding_window=8, **changes)

    assert [config.window(layer) for layer in range(2)] == windows


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_sees_both_sides_embeds_and_does_not_generate(tied, tmp_path):
    plain, folder = make_qwen2(tmp_path, tie_word_embeddings=tied)
    change_json(folder / "config.json", is_causal=False)
    masks = [{"full_attention": torch.zeros(1, 1, len(ids), len(ids))} for ids in TEXTS]
    with torch.inference_mode():
        expected = [
            plain.model(torch.tensor([ids]), attention_mask=mask).last_hidden_state[0].mean(0)
            for ids, mask in zip(TEXTS, masks, strict=True)
        ]

    with lorax.load(folder, pooling="mean") as engine:
        vectors = engine.embed(TEXTS)
        with pytest.raises(RequestError, match="no head for 'generate'; it has 'embed'"):
            engine.generate(TEXTS[0])

    assert_same([torch.from_numpy(vectors)], [torch.stack(expected)])


def test_heads_of_one_name_are_told_apart_by_the_configuration(tmp_path):
    texts, folder = make_qwen2(tmp_path / "texts", Qwen2ForSequenceClassification, num_labels=3)
    tokens, other = make_qwen2(tmp_path / "tokens", Qwen2ForTokenClassification, num_labels=3)

    with lorax.load(folder) as engine:
        answers = engine.classify(TEXTS)
    with lorax.load(other) as engine:
        best = engine.classify(TEXTS)

    assert_same(
        [torch.tensor(answer.scores) for answer in answers],
        [row.softmax(-1).sort(descending=True).values for row in their_logits(texts)],
    )
    assert_same(
        [torch.tensor(answer.scores) for answer in best], [row.softmax(-1).amax(-1) for row in their_logits(tokens)]
    )


@pytest.mark.parametrize(
    ("kind", "tasks"),
    [
        (Qwen2ForSequenceClassification, (Task.EMBED, Task.SEQUENCE_CLASSIFICATION)),
        (Qwen2ForTokenClassification, (Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION)),
    ],
)
def test_a_bias_tells_labels_of_tokens_where_the_configuration_does_not(kind, tasks, tmp_path):
    model, _ = make_qwen2(tmp_path, kind)

    base = ours(saved(model, tmp_path, architectures=None))

    assert base.model.tasks == tasks
    assert_same(our_hidden(base), their_hidden(model))


def test_vectors_are_means_through_the_dense_layer_of_the_length_asked_for(tmp_path):
    model, folder = make_qwen2(tmp_path, Qwen2Model)
    layers = {}
    for dim in (8, 24):
        layers[dim] = torch.nn.Linear(48, dim)
        (folder / f"2_Dense_{dim}").mkdir()
        change_json(
            folder / f"2_Dense_{dim}/config.json",
            in_features=48,
            out_features=dim,
            bias=True,
            activation_function="torch.nn.modules.linear.Identity",
        )
        tensors = {f"linear.{name}": tensor.detach() for name, tensor in layers[dim].named_parameters()}
        save_file(tensors, folder / f"2_Dense_{dim}/model.safetensors")

    with lorax.load(folder, pooling="mean", embedding_dim=24) as engine:
        vectors = engine.embed(TEXTS)

    means = torch.stack([rows.mean(0) for rows in their_hidden(model)])
    assert_same([torch.from_numpy(vectors)], [layers[24](means).detach()])


def test_a_file_may_have_the_prefix_or_not(tmp_path):
    model, folder = make_qwen2(tmp_path)

    rename_tensors(folder, lambda name: name.removeprefix("model."))

    assert_same(all_logits(ours(folder), TEXTS), their_logits(model))


def test_the_names_of_lorax_fix_the_task(tmp_path):
    _, folder = make_qwen2(tmp_path)

    tasks = [ours(folder, model_class=kind).model.tasks for kind in (FlashQwen2ForCausalLM, FlashQwen2ForEmbeddings)]

    assert tasks == [(Task.GENERATE,), (Task.EMBED,)]


def test_a_tensor_of_no_layer_is_refused_although_a_head_was_left_out(tmp_path):
    _, folder = make_qwen2(tmp_path)

    add_tensors(folder, **{"lm_head.bias": torch.ones(96)})

    with pytest.raises(CheckpointError, match=r"no parameter takes: 'lm_head\.bias'"):
        ours(folder, model_class=FlashQwen2ForEmbeddings)
