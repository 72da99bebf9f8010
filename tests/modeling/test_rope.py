"""Rotary parameters as files state them, beside transformers' own reading of the same files."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import GPTNeoXConfig as TheirConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

from lorax_core.errors import CheckpointError
from lorax_core.modeling import Rope, RotaryEmbedding
from lorax_neox.config import GPTNeoXConfig

NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BROKEN = [math.nan, math.inf, "2", True, [2.0], -1.0, 10**400]


def ours(**keys):
    rope = GPTNeoXConfig.parse(copy.deepcopy({**NEOX, "rotary_pct": 1.0, **keys})).rope
    embedding = RotaryEmbedding(32, rope)
    return embedding.inv_freq, embedding.factor


def theirs(**keys):
    embedding = GPTNeoXRotaryEmbedding(TheirConfig(**copy.deepcopy({**NEOX, "rotary_pct": 1.0, **keys})))
    return embedding.inv_freq, float(embedding.attention_scaling)


@pytest.mark.parametrize(
    "keys",
    [
        # The old key wins whole where a file has both.
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}},
        {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_parameters": {"rope_theta": 77.0}, "rope_theta": 9.0},
        # So does the length that stands outside.
        {"rope_scaling": YARN, "original_max_position_embeddings": 64},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
        # null is not the default.
        {"rope_scaling": {**YARN, "truncate": None}},
        {"rope_scaling": {**YARN, "truncate": False}},
        # 0 means unset in these.
        {"rope_scaling": {**YARN, "beta_fast": 0, "beta_slow": 0}},
        {"rope_scaling": {**YARN, "mscale": 0.0, "mscale_all_dim": 0.0}},
        {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.0}},
        {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
        {"rope_scaling": {**YARN, "attention_factor": 1.7, "mscale": 0.7, "mscale_all_dim": 1.3}},
        {"rope_scaling": {**YARN, "beta_fast": 2, "beta_slow": 16}},
        {"rope_scaling": {**YARN, "factor": 0.5}},
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        {"rope_scaling": {"type": "linear", "factor": 3}},
        {"rope_scaling": {"type": "dynamic", "factor": 1e3}},
        {"rope_scaling": {"type": "default", "factor": 3.0, "mscale": 2.0}},
        {"rotary_emb_base": 1.0},
        {"rotary_emb_base": 0.25},
        {"rope_theta": 77.0},
        {"rope_theta": 77.0, "rotary_emb_base": 88.0, "partial_rotary_factor": 0.5},
    ],
)
def test_what_transformers_computes_is_computed(keys):
    inverse, factor = ours(**keys)

    expected, scaling = theirs(**keys)

    assert torch.equal(inverse, expected)
    assert factor == scaling


@pytest.mark.parametrize("value", [0, *BROKEN], ids=lambda value: f"{value!s:.6}")
@pytest.mark.parametrize("rope", [YARN, LLAMA3, {"type": "linear"}, {"type": "dynamic"}], ids=lambda one: one["type"])
def test_a_factor_that_is_no_number_above_zero_is_refused(rope, value):
    with pytest.raises(CheckpointError, match=r"rope\.factor"):
        ours(rope_scaling={**rope, "factor": value})


@pytest.mark.parametrize("value", [0, *BROKEN], ids=lambda value: f"{value!s:.6}")
def test_a_theta_that_is_no_number_above_zero_is_refused_in_either_place(value):
    with pytest.raises(CheckpointError, match=r"rope\.rope_theta"):
        ours(rotary_emb_base=value)
    with pytest.raises(CheckpointError, match=r"rope\.rope_theta"):
        ours(rope_parameters={"rope_type": "default", "rope_theta": value})


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        *((YARN, name) for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
        *((LLAMA3, name) for name in ("low_freq_factor", "high_freq_factor")),
        *((rope, "original_max_position_embeddings") for rope in (YARN, LLAMA3)),
    ],
)
@pytest.mark.parametrize("value", BROKEN, ids=lambda value: f"{value!s:.6}")
def test_a_parameter_that_is_no_number_is_refused_by_the_name_that_the_file_gives_it(rope, field, value):
    with pytest.raises(CheckpointError, match=rf"rope\.{field}"):
        ours(rope_scaling={**rope, field: value})


@pytest.mark.parametrize(
    ("rope", "told"),
    [
        ({**YARN, "attention_factor": 0}, "rope.attention_factor"),
        ({**YARN, "original_max_position_embeddings": 0}, "rope.original_max_position_embeddings"),
        ({**LLAMA3, "original_max_position_embeddings": 0}, "rope.original_max_position_embeddings"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor 4.0 is not below high_freq_factor 4.0"),
        ({**LLAMA3, "low_freq_factor": 9.0}, "low_freq_factor 9.0 is not below high_freq_factor 4.0"),
        ({**YARN, "truncate": "no"}, "rope.truncate"),
        ({**YARN, "partial_rotary_factor": 1.5}, "rope.partial_rotary_factor"),
        ({**YARN, "partial_rotary_factor": "half"}, "rope.partial_rotary_factor"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "rope.type.*'longrope'"),
        ({"type": 5}, "rope.type"),
        ([1, 2], r"rope_scaling is \[1, 2\], where an object belongs"),
        ("yarn", "rope_scaling is 'yarn', where an object belongs"),
    ],
)
def test_parameters_that_no_position_can_be_turned_by_are_refused(rope, told):
    with pytest.raises(CheckpointError, match=told):
        ours(rope_scaling=rope)


@pytest.mark.parametrize(
    ("fields", "dim", "told"),
    [
        # Finite parameters whose frequencies are not.
        ({"type": "linear", "factor": 1e-320}, 32, "factor 1e-320"),
        ({"theta": 1e-320}, 32, "theta 1e-320"),
        ({"type": "dynamic", "factor": 1e30}, 32, "factor 1e[+]30"),
        ({"type": "yarn", "factor": 2.0, "theta": 1.0}, 32, "theta 1.0"),
        ({"type": "yarn", "factor": 2.0, "beta_fast": 1e-320}, 32, "beta_fast"),
        ({"type": "yarn", "factor": 2.0, "partial": 0.5}, 6, "3 rotary dimensions are odd"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_when_they_are_made(fields, dim, told):
    rope = Rope(**{"original_length": 64, **fields})

    with pytest.raises(ValueError, match=told):
        RotaryEmbedding(dim, rope)


def test_what_is_not_finite_is_refused_before_a_model_of_shapes_gets_its_numbers():
    with torch.device("meta"):
        rotary = RotaryEmbedding(32, Rope(original_length=64, type="linear", factor=1e-320))

    with pytest.raises(ValueError, match="not finite"):
        rotary.reset_buffers("cpu")
