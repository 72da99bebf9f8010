"""The native sources on processors that this machine has not: they compile without a warning, and ARM's results are torch's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import Case, With, check, drawn_cases
from compiled import STRICT
from emulated import ARM, X86, Emulated, cross_compile

from lorax_core.adapters.lora_kernels.native import NativeKernel
from lorax_core.adapters.lora_kernels.select import wrong_numbers
from lorax_core.engine.sampler import select_native
from lorax_core.kernels import onednn
from lorax_core.kernels.elementwise import READABLE
from lorax_core.kernels.native import attention, elementwise, low_rank, quantized, sampling, skinny
from lorax_core.kernels.native.elementwise import NativeElementwise
from lorax_core.kernels.native.low_rank import LowRankProduct
from lorax_core.kernels.native.quantized import QuantizedProduct
from lorax_core.kernels.native.sampling import NativeSampling
from lorax_core.kernels.native.skinny import SkinnyProduct
from lorax_core.kernels.quantized import FORMATS
from lorax_core.modeling.activation import get_activation

SOURCES = sorted(Path(attention.__file__).parent.glob("*.cpp"))
PROCESSORS = [
    pytest.param(ARM, "generic", id="NEON"),
    pytest.param(ARM, "neoverse_v1", id="NEON with products of bytes, SVE"),
    pytest.param(X86, "x86_64_v3", id="AVX2"),
    pytest.param(X86, "alderlake", id="AVX2 with products of bytes"),
    pytest.param(X86, "x86_64_v4", id="AVX-512"),
    pytest.param(X86, "znver4", id="AVX-512 with bfloat16 and products of bytes"),
]
DTYPES = [torch.float32, torch.bfloat16]
PACKED = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not onednn.works(torch.bfloat16), reason="oneDNN packs no bfloat16 on this processor"),
    ),
]
CPU = torch.device("cpu")


def emulated(source, processors):
    """A fixture: the functions of a source on each processor."""

    @pytest.fixture(scope="module", params=processors)
    def library(request, tmp_path_factory):
        return Emulated(source, tmp_path_factory.mktemp("arm"), request.param)

    return library


attention_library = emulated(attention.SOURCE, ["generic"])
low_rank_library = emulated(low_rank.SOURCE, ["generic"])
elementwise_library = emulated(elementwise.SOURCE, ["generic"])
quantized_library = emulated(quantized.SOURCE, ["generic", "generic+dotprod"])
sampling_library = emulated(sampling.SOURCE, ["generic"])
skinny_library = emulated(skinny.SOURCE, ["generic"])


@pytest.mark.parametrize(("target", "processor"), PROCESSORS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_source_compiles_without_a_warning(source, target, processor, tmp_path):
    said = cross_compile(source, tmp_path / "code.o", *STRICT, target=target, processor=processor)

    assert said == ""
    machine = (tmp_path / "code.o").read_bytes()[18]
    assert machine == {ARM: 183, X86: 62}[target]


def test_every_source_has_a_test_on_arm():
    assert {each.SOURCE for each in (attention, elementwise, low_rank, quantized, sampling, skinny)} == set(SOURCES)


def test_what_is_not_the_function_s_is_neither_read_nor_written(low_rank_library):
    with pytest.raises(Exception, match="UNMAPPED"):
        low_rank_library.low_rank_float32(64, 1, 64, 1, 1, 64, 1, 64, 1)


def test_weights_of_8_and_4_bits_on_arm(quantized_library):
    assert quantized._difference(QuantizedProduct(quantized_library)) is None


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_over_8_and_4_bits_has_the_same_bits_in_any_batch_on_arm(quantized_library, name):
    product = QuantizedProduct(quantized_library)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 200, generator=generator), torch.randn(70, 200, generator=generator)
    packed = product.quantize(weight, FORMATS[name])

    together = product(x, packed, None)

    assert torch.equal(together, torch.cat([product(row[None], packed, None) for row in x]))
    exact = x.double() @ packed.dense().double().t()
    assert (together - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    "by", [(0.0, 0.0, 1.0, 0.0, 1.0, 0), (0.8, 0.6, 1.0, 0.0, 1.0, 0), (0.8, 0.7, 0.93, 0.01, 0.91, 40)], ids=str
)
def test_sampling_on_arm(sampling_library, by):
    found, here = NativeSampling(sampling_library), select_native(CPU)
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)) * 3
    masked = [logits.clone(), logits.clone()]
    bits = np.random.default_rng(0).integers(0, 256, (1, 38), np.uint8)

    for form, of in zip((found, here), masked, strict=True):
        form.mask(of, [1], bits)
    assert torch.equal(*masked)
    for ours, theirs in zip(
        found.sample(masked[0], logits, [by] * 3), here.sample(masked[1], logits, [by] * 3), strict=True
    ):
        assert torch.equal(ours, theirs)
    chosen = torch.tensor([0, 5, 299])
    for ours, theirs in zip(found.score(logits, chosen, 4), here.score(logits, chosen, 4), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (200, 160), (33, 64)], ids=str)
@pytest.mark.parametrize("dtype", PACKED)
def test_products_for_few_rows_on_arm(skinny_library, dtype, shape):
    product = SkinnyProduct(skinny_library)
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator).to(dtype) for size in (shape, shape[:1], (11, shape[1])))
    packed = onednn.pack(weight)
    layout = onednn.find_rows(packed, weight)
    assert product.reads(layout.blocks)

    found = product(x, layout.blocks, bias, shape[0])

    exact = x.double() @ weight.double().t() + bias.double()
    bound = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
    rounding = 2**-24 if dtype is torch.float32 else 2**-8
    assert ((found.double() - exact).abs() <= rounding * exact.abs() + 2**-20 * bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_updates_on_arm(low_rank_library, dtype):
    kernel = NativeKernel(LowRankProduct(low_rank_library), 1_000_000)

    assert wrong_numbers(kernel, dtype, CPU) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_gates_on_arm(elementwise_library, dtype):
    form = NativeElementwise(elementwise_library)
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(5, 100, generator=generator).to(dtype) for _ in "xr")
    weight, act = torch.randn(100, generator=generator).to(dtype), get_activation("silu")

    normed, total = form.add_rms_norm(x, residual, weight, 1e-6)

    near = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 1e-3}
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, READABLE.rms_norm(total, weight, 1e-6), **near)
    torch.testing.assert_close(form.gated_act(x, act), READABLE.gated_act(x, act), **near)
    torch.testing.assert_close(form.act(x, get_activation("gelu_new")), get_activation("gelu_new")(x), **near)


@pytest.mark.parametrize("case", list(drawn_cases())[::8], ids=lambda case: str(case.seed))
def test_attention_on_arm(attention_library, case):
    check(case, With(attention_library))


def test_attention_over_several_parts_on_arm(attention_library):
    check(Case(sequences=((1000, 1), (3, 1))), With(attention_library))
