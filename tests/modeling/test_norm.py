from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from lorax_core.modeling import LayerNorm, RMSNorm
from lorax_core.modeling.batch import HeadRows
from lorax_core.types import Task

SIZE = 48


def make_rows(dtype=torch.float32):
    """Rows of very unequal size: a statistic taken in 16 bit would show."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([1e-3, 1.0, 30.0, 400.0])[:, None]
    return (torch.randn(4, SIZE, generator=generator) * scales + scales).to(dtype)


def make_filled(norm, oracle, dtype=torch.float32):
    """The same numbers in both."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in oracle.named_parameters():
        values = torch.randn(SIZE, generator=generator).to(dtype)
        tensor.data = values
        norm.get_parameter(name).data = values
    return norm, oracle


def make_batch():
    return HeadRows(Task.EMBED, (), (), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_torchs(dtype, bias):
    norm, oracle = make_filled(LayerNorm(SIZE, 1e-5, bias), nn.LayerNorm(SIZE, 1e-5, bias=bias), dtype)
    rows = make_rows(dtype)

    normed = norm(rows, make_batch())

    assert torch.equal(normed, oracle(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_transformers(dtype):
    norm, oracle = make_filled(RMSNorm(SIZE, 1e-6), Qwen2RMSNorm(SIZE, 1e-6), dtype)
    rows = make_rows(dtype)

    normed = norm(rows, make_batch())

    # 16 bit rounds at the same places, so it must agree to the bit.
    torch.testing.assert_close(normed, oracle(rows), rtol=1e-6 if dtype is torch.float32 else 0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_without_numbers_is_olmos(dtype):
    norm, rows = LayerNorm(SIZE, 1e-5, weight=False), make_rows(dtype)

    normed = norm(rows, make_batch())

    assert not list(norm.parameters())
    assert torch.equal(normed, OlmoLayerNorm(SIZE)(rows))


def test_epsilon_counts_where_a_row_is_nearly_nothing():
    norm, oracle = make_filled(RMSNorm(SIZE, 1e-2), Qwen2RMSNorm(SIZE, 1e-2))
    rows = torch.full((1, SIZE), 1e-4)

    normed = norm(rows, make_batch())

    torch.testing.assert_close(normed, oracle(rows), rtol=1e-6, atol=0)
    assert normed.abs().max() < 0.01


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
@pytest.mark.parametrize(
    "eps", [-1e-6, float("nan"), float("inf"), "1e-6", True, None, 10**400], ids=lambda eps: f"{eps!r:.8}"
)
def test_an_eps_that_is_no_number_of_at_least_zero_is_refused(make, eps):
    with pytest.raises(ValueError, match="an eps of"):
        make(SIZE, eps)


@pytest.mark.parametrize("eps", [0, 0.0, 1e-320, 1.0])
def test_any_other_eps_is_computed_as_transformers_does(eps):
    ours, oracle = make_filled(RMSNorm(SIZE, eps), Qwen2RMSNorm(SIZE, eps))
    other, torchs = make_filled(LayerNorm(SIZE, eps), nn.LayerNorm(SIZE, eps))

    torch.testing.assert_close(ours(make_rows(), make_batch()), oracle(make_rows()))
    torch.testing.assert_close(other(make_rows(), make_batch()), torchs(make_rows()))
