"""Weights of 8 and 4 bits: what the codes stand for, and products that are exact but for the rounding of x."""

from __future__ import annotations

import subprocess

import pytest
import torch
from compiled import compiled_for_avx2, only_on_x86

from lorax_core.kernels import quantized as readable
from lorax_core.kernels.native import quantized as native
from lorax_core.kernels.native.quantized import SOURCE, QuantizedProduct, load_quantized
from lorax_core.kernels.quantized import FORMATS, Format, Quantized
from lorax_core.settings import Settings

DTYPES = [torch.float32, torch.bfloat16]
# [out, in]: whole records; rests on both sides; less than one record; more groups than rows.
SHAPES = [(64, 64), (200, 896), (130, 201), (3, 5), (65, 4864)]
LOST = {"int8": 0.008, "int4": 0.1}  # of a weight of normal numbers, root mean square


@pytest.fixture(scope="module", params=["this processor", pytest.param("AVX2", marks=only_on_x86), "torch"])
def product(request, tmp_path_factory):
    if request.param == "torch":
        return Readable()
    if request.param == "AVX2":  # without instructions for products of bytes
        return QuantizedProduct(compiled_for_avx2(SOURCE, tmp_path_factory.mktemp("avx2")))
    found, why = load_quantized(Settings.from_env())
    assert found is not None, why
    return found


class Readable:
    """The form in plain torch, called as the compiled one."""

    quantize = staticmethod(readable.quantize)

    def __call__(self, x, weight, bias):
        return readable.multiply(x, weight, bias)


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@only_on_x86
def test_the_oldest_processors_give_the_same_numbers(tmp_path):
    library = compiled_for_avx2(SOURCE, tmp_path, "x86-64")

    assert native._difference(QuantizedProduct(library)) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_stand_for_the_weight_and_rows_are_those_of_the_whole(product, dtype, name, shape):
    weight = drawn(*shape, dtype=dtype)

    packed = product.quantize(weight, FORMATS[name])

    dense = packed.dense()
    assert dense.shape == weight.shape
    assert dense.dtype is dtype
    assert relative(dense, weight) < LOST[name]
    ids = torch.tensor([0, shape[0] - 1, shape[0] // 2, 0])
    assert torch.equal(packed.rows(ids), dense[ids])
    assert packed.rows(ids[:0]).shape == (0, shape[1])


@pytest.mark.parametrize("name", FORMATS)
def test_a_number_takes_the_bits_that_the_format_has_and_little_more(product, name):
    packed = product.quantize(drawn(128, 256), FORMATS[name])

    bits = packed.data.nbytes * 8 / (128 * 256)
    assert bits == {"int8": 8.25, "int4": 4.5}[name]


@pytest.mark.parametrize("name", FORMATS)
def test_the_compiled_form_gives_the_codes_of_the_readable_one(name):
    compiled, why = load_quantized(Settings.from_env())
    assert compiled is not None, why
    weight = drawn(130, 201)

    ours, theirs = (by.quantize(weight, FORMATS[name]) for by in (compiled, readable))

    assert torch.equal(ours.data, theirs.data)


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_of_any_size_keep_their_scale(product, name):
    sizes = torch.logspace(-30, 30, 64)[:, None]
    weight = drawn(64, 64) * sizes
    weight[7] = 0

    dense = product.quantize(weight, FORMATS[name]).dense()

    lost = (dense.double() - weight).norm(dim=1) / sizes[:, 0]
    assert float(lost.max()) < 12 * LOST[name]  # of a row, whose length is about 8
    assert not dense[7].any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, *DTYPES])
def test_the_largest_numbers_of_a_dtype_stay_finite(product, dtype, name):
    most = torch.finfo(dtype).max
    weight = (drawn(70, 128).clamp(-1, 1).double() * most).to(dtype)  # many of them the largest

    packed = product.quantize(weight, FORMATS[name])

    dense = packed.dense()
    assert dense.isfinite().all()
    assert torch.equal(packed.rows(torch.arange(70)), dense)
    assert relative(dense.double() / most, weight.double() / most) < LOST[name]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1e-37, 1e-40, 1e-45])
def test_groups_whose_scale_has_no_inverse_count_as_zero(product, name, size):
    weight = drawn(4, 64)
    weight[1:] = size

    packed = product.quantize(weight, FORMATS[name])

    assert not packed.dense()[1:].any()
    assert not product(torch.full((2, 64), size), product.quantize(drawn(4, 64), FORMATS[name]), None).any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_may_lie_column_by_column(product, dtype, name):
    weight = drawn(96, 70, dtype=dtype).t()

    found = product.quantize(weight, FORMATS[name]).dense()

    assert torch.equal(found, product.quantize(weight.contiguous(), FORMATS[name]).dense())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_in_a_weight_stays_in_sight(product, name, bad):
    weight = drawn(4, 128)
    weight[2, 70] = bad

    packed = product.quantize(weight, FORMATS[name])

    assert packed.dense().isfinite().all(dim=1).tolist() == [True, True, False, True]
    assert product(drawn(3, 128), packed, None).isfinite().all(dim=0).tolist() == [True, True, False, True]


def exact(x, weight: Quantized, form: Format):
    """The product in 64 bits, of x as it is rounded by groups."""
    rounded = torch.zeros_like(x, dtype=torch.float64)
    for start in range(0, x.shape[1], form.group):
        part = x[:, start : start + form.group].float()
        largest = part.abs().amax(1, keepdim=True)
        # As one product in float32: the other way round some halves would go to the other side.
        codes = (part * (torch.tensor(127.0) / largest)).round()
        rounded[:, start : start + form.group] = codes.double() * largest / 127
    return rounded @ weight.dense().double().t()


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 97])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_is_that_of_the_codes_and_of_x_in_8_bits(product, dtype, name, shape, rows):
    form = FORMATS[name]
    # float32, in which `dense` is not rounded once more
    packed = product.quantize(drawn(*shape), form)
    x, bias = drawn(rows, shape[1], dtype=dtype, seed=1), drawn(shape[0], dtype=dtype, seed=2)

    found = product(x, packed, bias)

    expected = exact(x, packed, form) + bias.double()
    assert found.shape == (rows, shape[0])
    assert found.dtype is dtype
    assert relative(found, expected) < (2e-5 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_x_loses_less_than_a_hundredth(product, dtype, name):
    packed = product.quantize(drawn(192, 896, dtype=dtype), FORMATS[name])
    x = drawn(20, 896, dtype=dtype, seed=1)

    found = product(x, packed, None)

    assert relative(found, x.double() @ packed.dense().double().t()) < 0.01


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(product, dtype, name):
    packed = product.quantize(drawn(200, 896, dtype=dtype), FORMATS[name])
    x = drawn(103, 896, dtype=dtype, seed=1)
    together = product(x, packed, None)
    before = torch.get_num_threads()

    torch.set_num_threads(5)
    try:
        alone = torch.cat([product(row[None], packed, None) for row in x])
        parts = torch.cat([product(part, packed, None) for part in x.split([2, 3, 4, 5, 6, 7, 8, 68])])
    finally:
        torch.set_num_threads(before)

    if isinstance(product, Readable):  # its last bit is that of torch's products
        assert relative(alone, together) < 1e-6
    else:
        assert torch.equal(alone, together)
        assert torch.equal(parts, together)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_that_is_not_finite_is_alone_with_it(product, name):
    packed = product.quantize(drawn(70, 128), FORMATS[name])
    x = drawn(5, 128, seed=1)
    clean = product(x, packed, None)
    x[1, 3], x[3, 127] = float("nan"), -float("inf")

    found = product(x, packed, None)

    assert found.isnan().all(dim=1).tolist() == [False, True, False, True, False]
    assert torch.equal(found[::2], clean[::2])


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_zeros_or_none_and_rows_that_lie_apart(product, name):
    packed = product.quantize(drawn(70, 96), FORMATS[name])
    wide = drawn(6, 2 * 96, seed=1)

    assert not product(torch.zeros(3, 96), packed, None).any()
    assert product(torch.zeros(0, 96), packed, None).shape == (0, 70)
    apart = product(wide[:, 96:], packed, None)
    assert torch.equal(apart, product(wide[:, 96:].contiguous(), packed, None))
    columns = product(wide[:, 96:].t().contiguous().t(), packed, None)
    assert torch.equal(columns, apart)


class Off(Readable):
    def __call__(self, x, weight, bias):
        return super().__call__(x, weight, bias) * 1.02


class Forgets(Readable):
    def __call__(self, x, weight, bias):
        return super().__call__(x, weight, None)


class Coarse(Readable):
    @staticmethod
    def quantize(weight, form):
        return readable.quantize((weight * 4).round() / 4, form)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (Off, "gives other numbers in int8 and float32 than torch"),
        (Forgets, "gives other numbers in int8 and float32 than torch"),
        (Coarse, "loses more than torch in int8"),
    ],
)
def test_a_compiled_form_with_other_numbers_is_not_used(wrong, told):
    assert native._difference(wrong()) == told
    assert native._difference(Readable()) is None


def test_a_compiled_form_is_compared_before_it_is_given(monkeypatch):
    monkeypatch.setattr(native, "_difference", lambda product: "off")

    assert native.load_quantized.__wrapped__(Settings.from_env()) == (None, "off")


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_read_or_written_outside_what_was_given(name, tmp_path):
    """Compiled with the address sanitizer, in a process of its own."""
    main = tmp_path / "main.cpp"
    bits = FORMATS[name].bits
    main.write_text(
        f'#include "{SOURCE}"\n'
        "#include <vector>\n"
        "int main() {\n"
        "    for (int64_t out : {1, 64, 65}) for (int64_t width : {1, 31, 64, 130}) for (int64_t rows : {1, 5, 6, 7, 300}) {\n"
        f"        typedef Format<{bits}> F;\n"
        "        const int64_t groups = (width + F::GROUP - 1) / F::GROUP, blocks = (out + 63) / 64;\n"
        "        std::vector<float> w(out * width, 0.5f), x(rows * width, 0.25f), y(rows * out), bias(out, 1.0f);\n"
        "        const int64_t needed = rows * groups * (8 + F::GROUP);\n"
        "        std::vector<uint8_t> packed(blocks * groups * F::RECORD), scratch(needed);\n"
        f"        pack<{bits}>(w.data(), out, width, packed.data(), 2);\n"
        "        uint8_t *given = needed > quantized_own_bytes() ? scratch.data() : nullptr;\n"
        f"        multiply<{bits}>(x.data(), width, packed.data(), bias.data(), y.data(), given, rows, width, out, 2);\n"
        "        for (float one : y) if (!(one > 1.0f)) return 1;\n"
        "    }\n"
        "}\n"
    )
    flags = ["-O1", "-g", "-march=native", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / "main"
    subprocess.run(["g++", *flags, str(main), "-o", str(program)], check=True, cwd=tmp_path)

    ended = subprocess.run([str(program)], capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr[-2000:]
