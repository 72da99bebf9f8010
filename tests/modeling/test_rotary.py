from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from lorax_core.kernels.elementwise import READABLE
from lorax_core.modeling import Rope, RotaryEmbedding

DIM = 16
POSITIONS = torch.tensor([0, 1, 2, 17, 5, 511, 4096, 99_999])  # in no order: rows of a batch come from many sequences
LENGTH = 64

# What each type needs beside its name.
PARAMETERS = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LENGTH,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": LENGTH},
}
FIELDS = {"original_max_position_embeddings": "original_length"}


def make_heads(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(POSITIONS), 3, DIM, generator=generator)  # [tokens, heads, dim]


def make_rotary(kind="default", theta=10000.0, partial=1.0):
    fields = {FIELDS.get(name, name): value for name, value in PARAMETERS[kind].items()}
    return RotaryEmbedding(
        DIM, Rope(**{"type": kind, "theta": theta, "partial": partial, "original_length": LENGTH} | fields)
    )


def make_oracle(kind="default", theta=10000.0, dim=DIM):
    parameters = {"rope_type": kind, "rope_theta": theta, **PARAMETERS[kind]}
    config = Qwen2Config(
        hidden_size=dim, num_attention_heads=1, max_position_embeddings=4 * LENGTH, rope_parameters=parameters
    )
    return Qwen2RotaryEmbedding(config)


def turned_by_transformers(oracle, heads):
    x = heads.transpose(0, 1)[None]  # [1, heads, tokens, dim]
    cos, sin = oracle(x, POSITIONS[None])
    return apply_rotary_pos_emb(x, x, cos, sin)[0][0].transpose(0, 1)


@pytest.mark.parametrize("kind", sorted(PARAMETERS))
@pytest.mark.parametrize("theta", [10000.0, 1_000_000.0])
def test_frequencies_are_those_of_transformers(kind, theta):
    rotary, oracle = make_rotary(kind, theta), make_oracle(kind, theta)

    torch.testing.assert_close(rotary.inv_freq, oracle.inv_freq, rtol=1e-6, atol=0)
    assert rotary.factor == pytest.approx(oracle.attention_scaling)


@pytest.mark.parametrize("kind", ["default", "yarn"])  # yarn has a factor on the angles
def test_heads_are_turned_as_transformers_turns_them(kind):
    rotary = make_rotary(kind)
    heads = make_heads()

    turned, _ = READABLE.rotate(heads, heads, rotary.angles(POSITIONS, torch.float32))

    torch.testing.assert_close(turned, turned_by_transformers(make_oracle(kind), heads), rtol=1e-5, atol=1e-5)


def test_a_partial_rotation_leaves_the_rest_of_each_head():
    rotary = make_rotary(partial=0.5)
    heads = make_heads()

    turned, _ = READABLE.rotate(heads, heads, rotary.angles(POSITIONS, torch.float32))

    first = turned_by_transformers(make_oracle(dim=DIM // 2), heads[..., : DIM // 2])
    torch.testing.assert_close(turned[..., : DIM // 2], first, rtol=1e-5, atol=1e-5)
    assert torch.equal(turned[..., DIM // 2 :], heads[..., DIM // 2 :])


def test_angles_are_exact_far_out_in_16_bit():
    rotary = make_rotary()

    cos, sin = rotary.angles(POSITIONS, torch.bfloat16)

    exact_cos, exact_sin = make_oracle()(torch.zeros(1, dtype=torch.bfloat16), POSITIONS[None])
    assert torch.equal(cos[:, 0], exact_cos[0, :, : DIM // 2])
    assert torch.equal(sin[:, 0], exact_sin[0, :, : DIM // 2])


def test_scores_depend_on_the_distance_alone():
    rotary = make_rotary()
    q, k = make_heads(1), make_heads(2)

    def scores(shift):
        angles = rotary.angles(POSITIONS[:6] + shift, torch.float32)
        return torch.einsum("thd,shd->hts", *READABLE.rotate(q[:6], k[:6], angles))

    torch.testing.assert_close(scores(0), scores(300), rtol=1e-4, atol=1e-4)


def test_buffers_made_without_memory_come_back():
    with torch.device("meta"):
        rotary = make_rotary("yarn")

    rotary.reset_buffers("cpu")

    fresh = make_rotary("yarn")
    assert torch.equal(rotary.inv_freq, fresh.inv_freq)
    assert rotary.factor == fresh.factor != 1.0
