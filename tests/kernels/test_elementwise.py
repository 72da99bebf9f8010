"""The compiled elementwise arithmetic of a CPU, against the readable one and definitions in 64 bit."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled_for_avx2, only_on_x86

from lorax_core.kernels.elementwise import READABLE
from lorax_core.kernels.native.elementwise import ACTS, SOURCE, NativeElementwise
from lorax_core.modeling import MLP
from lorax_core.modeling.activation import ACTIVATIONS, get_activation
from lorax_core.settings import Settings

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [1, 15, 16, 100, 896]
# Of numbers that are off by one rounding of their dtype, or of a sum in another order.
NEAR = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3}}


def drawn(*shape, dtype, seed=0, size=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def apart(x):
    """The same rows, which lie apart."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), float("nan"), dtype=x.dtype)
    wide[:, 2:-3] = x
    return wide[:, 2:-3]


@pytest.fixture(scope="module", params=["this machine", pytest.param("AVX2", marks=only_on_x86)])
def native(request, tmp_path_factory):
    if request.param == "AVX2":
        return NativeElementwise(compiled_for_avx2(SOURCE, tmp_path_factory.mktemp("avx2")))
    return NativeElementwise()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_are_the_readable_form_s(native, dtype, width, offset):
    x, residual, weight = (
        drawn(7, width, dtype=dtype),
        drawn(7, width, dtype=dtype, seed=1),
        drawn(width, dtype=dtype, seed=2),
    )

    alone = native.rms_norm(apart(x), weight, 1e-6, offset)
    normed, total = native.add_rms_norm(apart(x), apart(residual), weight, 1e-6, offset)

    torch.testing.assert_close(alone, READABLE.rms_norm(x, weight, 1e-6, offset), **NEAR[dtype])
    torch.testing.assert_close(normed, READABLE.rms_norm(x + residual, weight, 1e-6, offset), **NEAR[dtype])
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["silu", "gelu_new"])
def test_activations_and_gates_are_the_readable_form_s(native, dtype, width, name):
    act, x = get_activation(name), drawn(7, 2 * width, dtype=dtype)

    gated, plain = native.gated_act(apart(x), act), native.act(apart(x), act)

    torch.testing.assert_close(gated, READABLE.gated_act(x, act), **NEAR[dtype])
    # Rounded before the product, as the readable form is: in 16 bit nearly all are equal to the bit.
    assert dtype is torch.float32 or name != "silu" or (gated == READABLE.gated_act(x, act)).float().mean() > 0.95
    torch.testing.assert_close(plain, READABLE.act(x, act), **NEAR[dtype])


@pytest.mark.parametrize("name", ["silu", "gelu_new"])
def test_an_activation_is_exact_over_all_that_float32_holds(native, name):
    size = torch.logspace(-30, 38, 5000)
    x = torch.cat([-size, torch.zeros(1), size])[None]

    found = native.act(x, get_activation(name))[0].double()

    wide = x[0].double()
    # 0.5 (1 + tanh u) is the sigmoid of 2u, which keeps the tail near -1.
    inside = wide if name == "silu" else 2 * 0.7978845608028654 * (wide + 0.044715 * wide**3)
    exact = wide * torch.sigmoid(inside)
    # What the exponential reads was rounded to float32; where it leaves float32, results are too small for its bits.
    near = 2e-6 + 3e-7 * inside.abs().clamp(max=104)
    assert ((found - exact).abs() <= near * exact.abs() + 1e-36).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch_with_any_threads(native, dtype):
    x, residual, weight = drawn(300, 224, dtype=dtype), drawn(300, 224, dtype=dtype, seed=1), drawn(224, dtype=dtype)
    act = get_activation("silu")

    def computed(rows):
        normed, total = native.add_rms_norm(x[rows], residual[rows], weight, 1e-6)
        return torch.cat([normed, total, native.gated_act(x[rows], act), native.act(x[rows], act)], -1)

    together = computed(slice(None))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = torch.cat([computed(slice(row, row + 1)) for row in range(300)])
    finally:
        torch.set_num_threads(threads)

    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu", "gelu_new"])
def test_what_is_no_number_stays_none(native, dtype, name):
    x = torch.ones(1, 40, dtype=dtype)
    x[0, 3], x[0, 39], x[0, 5] = float("nan"), float("nan"), float("inf")
    weight = torch.ones(40, dtype=dtype)

    found = native.act(x, get_activation(name))
    normed = native.rms_norm(x, weight, 1e-6)

    assert found.isnan().nonzero()[:, 1].tolist() == [3, 39]
    assert found[0, 5] == float("inf")
    assert normed.isnan().all()


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_is_computed_by_one_form_or_the_other(native, name):
    act, x = get_activation(name), drawn(3, 64, dtype=torch.float32)

    found = native.act(x, act)

    assert torch.allclose(found, act(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(found, act(x)) or act.name in ACTS


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(4, 16, dtype=torch.float16), torch.ones(16, dtype=torch.float16)),
        (torch.ones(16, 4).t(), torch.ones(16)),
        (torch.ones(2, 4, 16), torch.ones(16)),
        (torch.ones(4, 16), torch.arange(32.0)[::2]),
    ],
    ids=["float16", "columns side by side", "three dimensions", "a weight that lies apart"],
)
def test_what_the_source_does_not_read_the_readable_form_computes(native, x, weight):
    act = get_activation("silu")

    assert torch.equal(native.rms_norm(x, weight, 1e-6), READABLE.rms_norm(x, weight, 1e-6))
    assert torch.equal(native.add_rms_norm(x, x, weight, 1e-6)[0], READABLE.add_rms_norm(x, x, weight, 1e-6)[0])
    assert torch.allclose(native.act(x, act), act(x))
    assert torch.allclose(native.gated_act(x, act), READABLE.gated_act(x, act))


@pytest.mark.parametrize(
    "residual",
    [torch.arange(16.0), torch.arange(64.0).view(16, 4).t(), torch.arange(64, dtype=torch.float64).view(4, 16)],
    ids=["one row", "columns side by side", "another dtype"],
)
def test_a_residual_that_is_not_like_the_rows_is_added_by_the_readable_form(native, residual):
    x, weight = drawn(4, 16, dtype=torch.float32), torch.ones(16)

    normed, total = native.add_rms_norm(x, residual, weight, 1e-6)

    assert torch.equal(total, x + residual)
    assert torch.allclose(normed, READABLE.add_rms_norm(x, residual, weight, 1e-6)[0])


def test_a_gate_of_an_odd_width_is_no_gate(native):
    with pytest.raises(RuntimeError):
        native.gated_act(torch.ones(3, 7), get_activation("silu"))


def test_a_feed_forward_layer_asks_its_form_for_its_activation():
    class Doubled(NativeElementwise):
        def act(self, x, act):
            return 2 * super().act(x, act)

    class Rows:
        adapters = type("None_", (), {"start": lambda *_: None, "apply": lambda self, site, x, y: y})()

    mlp = MLP(16, 32, "gelu_new")
    for parameter in mlp.parameters():
        parameter.copy_(drawn(*parameter.shape, dtype=torch.float32))
    mlp.down_proj.bias.zero_()
    x = drawn(3, 16, dtype=torch.float32)
    before = mlp(x, Rows())
    mlp.elementwise = Doubled()

    assert torch.allclose(mlp(x, Rows()), 2 * before, rtol=1e-4, atol=1e-4)


def test_a_library_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setenv("LORAX_NATIVE", "0")

    assert not Settings.from_env().native
    with pytest.raises(RuntimeError, match="LORAX_NATIVE"):
        NativeElementwise()
