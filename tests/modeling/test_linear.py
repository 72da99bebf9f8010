from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from lorax_core.kernels import onednn
from lorax_core.kernels.elementwise import READABLE
from lorax_core.modeling import GateUpLinear, Linear, QKVLinear
from lorax_core.modeling.batch import NoAdapters
from lorax_core.modeling.linear import prepare_linears
from lorax_core.modeling.site import AdapterRows

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@dataclass
class Rows:
    """All that a layer asks of a batch."""

    adapters: object = field(default_factory=NoAdapters)


class AddOne(AdapterRows):
    """An adapter that shows where it was asked: one is added to every result, and the question is kept."""

    def __init__(self):
        self.asked = []

    def apply(self, site, x, y):
        self.asked.append((site, x))
        return y + 1


def make_filled(layer, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for tensor in layer.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator).to(dtype)
    return layer


def make_x(rows=5, size=24, dtype=torch.float32):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_linear_is_torchs(bias):
    layer = make_filled(Linear(24, 10, bias))
    x = make_x()

    y = layer(x, Rows())

    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_packing_changes_no_result(dtype, bias, rows):
    layer = make_filled(Linear(24, 10, bias), dtype)
    x = make_x(rows, dtype=dtype)
    plain = layer(x, Rows())

    prepare_linears(layer)

    assert (layer.kernel.method == "onednn") is onednn.works(dtype)  # not every processor packs bfloat16
    torch.testing.assert_close(layer(x, Rows()), plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 10), (7, 3), (64, 320)])
def test_the_dense_weight_survives_packing(dtype, shape):
    layer = make_filled(Linear(*shape), dtype)
    before = layer.weight.detach().clone()

    prepare_linears(layer)
    prepare_linears(layer)  # once more does no harm

    assert layer.dense_weight().dtype is dtype
    assert torch.equal(layer.dense_weight(), before)


def test_a_dtype_that_cannot_be_packed_stays_plain():
    layer = make_filled(Linear(24, 10), torch.float64)

    prepare_linears(layer)

    x = make_x(dtype=torch.float64)
    assert layer.kernel.method == "plain"
    assert torch.equal(layer(x, Rows()), F.linear(x, layer.dense_weight(), layer.bias))


@pytest.mark.parametrize("prepared", [False, True])
def test_adapters_see_the_input_and_change_the_result(prepared):
    layer = make_filled(Linear(24, 10))
    if prepared:
        prepare_linears(layer)
    x, adapters = make_x(), AddOne()

    y = layer(x, Rows(adapters))

    torch.testing.assert_close(y, layer(x, Rows()) + 1)
    assert adapters.asked == [(layer, x)]


def test_a_fused_projection_gives_queries_keys_and_values_of_each_head():
    layer = make_filled(QKVLinear(24, heads=4, kv_heads=2, head_dim=3))
    x = make_x()

    q, k, v = layer.project(x, Rows())

    assert layer.parts == (12, 6, 6)
    rows = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(q, rows[:, :12].view(5, 4, 3))
    assert torch.equal(k, rows[:, 12:18].view(5, 2, 3))
    assert torch.equal(v, rows[:, 18:].view(5, 2, 3))


def test_a_gated_projection_gives_the_gate_first():
    layer = make_filled(GateUpLinear(24, intermediate=7))
    x = make_x()

    gate_up = layer(x, Rows())

    assert layer.parts == (7, 7)
    assert layer.bias is None
    rows = F.linear(x, layer.weight)
    assert torch.equal(READABLE.gated_act(gate_up, F.silu), F.silu(rows[:, :7]) * rows[:, 7:])


def test_a_plain_layer_is_one_part():
    assert Linear(24, 10).parts == (10,)
