"""The compiled product for few rows reads oneDNN's packed weights rightly, whatever their sizes."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled_for_avx2, only_on_x86

from lorax_core.kernels import onednn
from lorax_core.kernels.native.skinny import MOST_ROWS, SOURCE, SkinnyProduct, load_skinny
from lorax_core.linear_methods.onednn import FEW_ROWS, OneDnn
from lorax_core.settings import Settings

packs_bfloat16 = pytest.mark.skipif(
    not onednn.works(torch.bfloat16), reason="oneDNN packs no bfloat16 on this processor, so there is nothing to read"
)
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=packs_bfloat16)]
# [out, in]: whole blocks, a last block that is cut, one block alone, inputs that fill no tile.
SHAPES = [(64, 64), (192, 896), (200, 160), (48, 32), (33, 64), (130, 4864)]


@pytest.fixture(scope="module", params=["this processor", pytest.param("AVX2", marks=only_on_x86)])
def product(request, tmp_path_factory):
    if request.param == "AVX2":  # without instructions for bfloat16
        return SkinnyProduct(compiled_for_avx2(SOURCE, tmp_path_factory.mktemp("avx2")))
    found, why = load_skinny(Settings.from_env())
    assert found is not None, why
    return found


def made(out, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator).to(dtype)
    bias = torch.randn(out, generator=generator).to(dtype)
    return weight, bias


def layout(product, weight):
    """How oneDNN packed it, recognised by its numbers; and the packed weight, which must live as long."""
    packed = onednn.pack(weight)
    found = onednn.find_rows(packed, weight)
    assert found is not None
    assert product.reads(found.blocks)
    return found.blocks, packed


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, MOST_ROWS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_is_that_of_float64(product, dtype, shape, rows):
    weight, bias = made(*shape, dtype)
    blocks, _packed = layout(product, weight)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)

    found = product(x, blocks, bias, shape[0])

    exact = x.double() @ weight.double().t() + bias.double()
    bound = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
    rounding = 2**-24 if dtype is torch.float32 else 2**-8
    assert found.shape == (rows, shape[0])
    assert ((found.double() - exact).abs() <= rounding * exact.abs() + 2**-20 * bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(product, dtype):
    weight, bias = made(200, 896, dtype)
    blocks, _packed = layout(product, weight)
    x = torch.randn(12, 896, generator=torch.Generator().manual_seed(1)).to(dtype)
    together = product(x, blocks, bias, 200)
    before = torch.get_num_threads()

    torch.set_num_threads(5)
    try:
        alone = torch.cat([product(row[None], blocks, bias, 200) for row in x])
    finally:
        torch.set_num_threads(before)

    assert torch.equal(alone, together)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart(product, dtype):
    weight, _ = made(64, 64, dtype)
    blocks, _packed = layout(product, weight)
    wide = torch.randn(4, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
    across = torch.randn(64, 4, generator=torch.Generator().manual_seed(2)).to(dtype)

    found = product(wide[:, 30:94], blocks, None, 64), product(across.t(), blocks, None, 64)

    expected = (
        product(wide[:, 30:94].contiguous(), blocks, None, 64),
        product(across.t().contiguous(), blocks, None, 64),
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_takes_it_for_few_rows_and_onednn_for_more(dtype):
    weight, bias = made(192, 896, dtype)
    kernel = OneDnn().prepare(weight, bias)
    assert kernel.skinny is not None
    few = torch.randn(FEW_ROWS[dtype], 896, generator=torch.Generator().manual_seed(1)).to(dtype)
    many = torch.cat([few, few])

    found, more = kernel(few), kernel(many)

    assert torch.equal(found, kernel.skinny.product(few, kernel.skinny.blocks, bias, 192))
    assert torch.equal(more, onednn.linear(many, kernel.packed, bias))


@pytest.mark.parametrize("weight", [torch.full((64, 64), torch.inf), made(33, 10, torch.float32)[0]])
def test_a_weight_whose_layout_is_not_recognised_is_left_to_onednn(weight):
    kernel = OneDnn().prepare(weight, None)

    assert kernel.skinny is None
    assert kernel(torch.ones(1, weight.shape[1])).shape == (1, len(weight))


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("LORAX_NATIVE", "0")
    weight, _ = made(64, 64, torch.float32)

    assert OneDnn().prepare(weight, None).skinny is None


def test_another_layout_is_not_read(product):
    weight, _ = made(64, 64, torch.float32)
    blocks, _packed = layout(product, weight)

    assert not product.reads(blocks.view(2, 64, 32, 1).transpose(0, 1))
    assert not product.reads(blocks.view(1, 32, 64, 2))
    assert not product.reads(blocks.view(-1, 64, 8, 1))
    assert not product.reads(blocks.double())


@packs_bfloat16
def test_results_between_two_numbers_of_bfloat16_go_to_the_even_one(product):
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    weight[0, :2] = torch.tensor([1.0, 2**-8])  # between 1 and 1 + 2^-7
    weight[1, :2] = torch.tensor([1.0, 3 * 2**-8])  # between 1 + 2^-7 and 1 + 2^-6
    blocks = onednn.pack(weight)
    layouts = [found for found in onednn.layouts(blocks, 64, 64, torch.bfloat16) if product.reads(found)]

    found = product(torch.ones(1, 64, dtype=torch.bfloat16), layouts[0], None, 64)

    assert found[0, :2].tolist() == [1.0, 1 + 2**-6]
