from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import Olmo2Config, PhiConfig, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention
from transformers.models.phi.modeling_phi import PhiAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from lorax_core.errors import CheckpointError
from lorax_core.kernels.elementwise import READABLE
from lorax_core.modeling import MLP, GatedMLP, LayerNorm, RMSNorm, Rope, RotaryAttention, RotaryEmbedding, SelfAttention
from lorax_core.modeling.batch import NoAdapters

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        *(({"window": value}, f"window of {value!r}") for value in (0, -1, 4.0, "4", True)),
        *(({"soft_cap": value}, f"soft cap of {value!r}") for value in (0.0, -1.0, NAN, INF, "30", True)),
        *(({"scale": value}, f"scale of {value!r}") for value in (0.0, -1.0, NAN, INF, "1", True)),
        ({"head_dim": 0}, "key heads of 0"),
        ({"kv_heads": 3}, "4 query heads over 3 key heads"),
        ({"heads": 5}, "24 is not a multiple of 5 heads"),
    ],
)
def test_attention_that_cannot_be_is_refused_when_it_is_made(options, told):
    with pytest.raises(ValueError, match=told):
        SelfAttention(**{"hidden": 24, "heads": 4, "causal": True, **options})


def test_rotary_dimensions_must_fit_the_head():
    rotary = RotaryEmbedding(16, Rope(original_length=64))

    with pytest.raises(ValueError, match="16 rotary dimensions do not fit a head of 6"):
        RotaryAttention(24, 4, rotary=rotary, causal=True)


@pytest.mark.parametrize("kind", [MLP, GatedMLP])
def test_an_activation_that_is_not_known_is_refused_with_the_nearest(kind):
    with pytest.raises(CheckpointError, match="'gelo' is not supported") as caught:
        kind(8, 16, "gelo")

    assert "'gelu'" in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_with_an_offset_is_gemmas(dtype):
    generator = torch.Generator().manual_seed(3)
    oracle = GemmaRMSNorm(32, eps=1e-6)
    oracle.weight.data = torch.randn(32, generator=generator).to(dtype)
    x = (10 * torch.randn(5, 32, generator=generator)).to(dtype)

    normed = READABLE.rms_norm(x, oracle.weight, 1e-6, offset=1.0)

    torch.testing.assert_close(normed, oracle(x), rtol=1e-6 if dtype is torch.float32 else 0, atol=0)


QK_NORMS = {
    "of heads": (Qwen3Attention, Qwen3Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)),
    "of heads, layer norms": (
        PhiAttention,
        PhiConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, qk_layernorm=True),
    ),
    "of the whole": (Olmo2Attention, Olmo2Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)),
}


@pytest.mark.parametrize(("theirs", "config"), QK_NORMS.values(), ids=QK_NORMS)
@torch.inference_mode()
def test_norms_of_queries_and_keys_are_those_of_transformers(theirs, config):
    oracle = theirs(config, layer_idx=0)
    q_norm, k_norm = getattr(oracle, "q_norm", None), getattr(oracle, "k_norm", None)
    q_norm, k_norm = (q_norm, k_norm) if q_norm is not None else (oracle.q_layernorm, oracle.k_layernorm)
    make = (lambda size: LayerNorm(size, 1e-5)) if theirs is PhiAttention else (lambda size: RMSNorm(size, 1e-6))
    whole = theirs is Olmo2Attention
    attention = SelfAttention(32, 4, 2, causal=True, bias=theirs is PhiAttention, qk_norm=make, qk_norm_whole=whole)
    draw = torch.Generator().manual_seed(4)
    for ours, norm in ((attention.q_norm, q_norm), (attention.k_norm, k_norm)):
        norm.eps = norm.variance_epsilon = ours.eps
        for name, numbers in norm.named_parameters():
            numbers.copy_(torch.randn(numbers.shape, generator=draw))
            ours.get_parameter(name).data = numbers.data
    for numbers in attention.qkv_proj.parameters():
        numbers.data = torch.randn(numbers.shape, generator=draw)
    x, seen = torch.randn(5, 32, generator=draw), []
    attention.attend = lambda q, k, v, batch: seen.extend((q, k)) or x
    attention.o_proj.weight.data.zero_()

    attention(x, SimpleNamespace(adapters=NoAdapters()))

    q, k = (part.reshape(5, -1) for part in attention.qkv_proj.project(x, SimpleNamespace(adapters=NoAdapters()))[:2])
    shapes = ((5, -1), (5, -1)) if whole else ((5, 4, 8), (5, 2, 8))
    for found, norm, rows, shape in zip(seen, (q_norm, k_norm), (q, k), shapes, strict=True):
        torch.testing.assert_close(found.reshape(shape), norm(rows.reshape(shape)), rtol=1e-5, atol=1e-6)
