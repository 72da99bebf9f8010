from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from lorax_core.errors import CheckpointError
from lorax_core.kernels.elementwise import READABLE
from lorax_core.modeling import MLP, GatedMLP, Rope, RotaryAttention, RotaryEmbedding, SelfAttention

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
