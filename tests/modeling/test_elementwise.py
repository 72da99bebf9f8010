"""The seam of elementwise kernels: which layers call which method, and that models do not share their kernels."""

from __future__ import annotations

import pytest
import torch
from rigs import make_loaded

from lorax_core.attention.base import HostAndDevice
from lorax_core.attention.torch import TorchBackend
from lorax_core.kernels.elementwise import READABLE, Elementwise
from lorax_core.kvcache.pool import KVPool
from lorax_core.modeling import GatedMLP, LayerNorm, RMSNorm
from lorax_core.modeling.attention import Attention
from lorax_core.modeling.batch import Batch, HeadRows
from lorax_core.types import Task

X, RESIDUAL = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Counted(Elementwise):
    """The readable form, which notes its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattribute__(self, name):
        if name in {*vars(Elementwise)} and not name.startswith("_") and name != "name":
            self.calls.append(name)
        return super().__getattribute__(name)


def make_rows():
    return HeadRows(Task.EMBED, (), (), torch.zeros(0, dtype=torch.int64))


def filled(layer):
    generator = torch.Generator().manual_seed(1)
    for tensor in layer.parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return layer


def test_a_model_is_given_its_own_kernels(qwen2, host):
    first, second = make_loaded(qwen2, host).model, make_loaded(qwen2, host).model
    kernels = Counted()

    first.use_elementwise(kernels)

    layer = first.backbone.layers[0]
    holders = [layer.input_layernorm, layer.mlp, layer.self_attn.attention, first.backbone.norm]
    assert all(holder.elementwise is kernels for holder in holders)
    assert second.backbone.norm.elementwise is READABLE
    assert RMSNorm(16, 1e-6).elementwise is READABLE


@pytest.mark.parametrize(
    ("make", "called"),
    [(lambda: LayerNorm(16, 1e-5), "add_layer_norm"), (lambda: RMSNorm(16, 1e-6, offset=1.0), "add_rms_norm")],
    ids=["layer norm", "rms norm"],
)
def test_a_sum_and_its_norm_are_one_call(make, called):
    norm = filled(make())
    norm.elementwise = kernels = Counted()

    normed, total = norm.add(X, RESIDUAL, make_rows())

    assert kernels.calls[0] == called
    assert torch.equal(total, X + RESIDUAL)
    assert torch.equal(normed, norm(total, make_rows()))


class Doubled(RMSNorm):
    """A norm with other arithmetic."""

    def compute(self, x, weight, bias):
        return 2 * super().compute(x, weight, bias)


class Shifted(LayerNorm):
    """Another one."""

    def compute(self, x, weight, bias):
        return 1 + super().compute(x, weight, bias)


@pytest.mark.parametrize("make", [lambda: Doubled(16, 1e-6), lambda: Shifted(16, 1e-5)], ids=["rms norm", "layer norm"])
def test_a_norm_of_other_arithmetic_is_not_computed_by_the_fused_form(make):
    norm = filled(make())

    normed, total = norm.add(X, RESIDUAL, make_rows())

    assert torch.equal(normed, norm(total, make_rows()))


def test_arithmetic_that_one_layer_was_given_is_not_replaced_by_the_fused_form():
    norm = filled(RMSNorm(16, 1e-6))
    norm.compute = lambda x, weight, bias: x * weight

    normed, total = norm.add(X, RESIDUAL, make_rows())

    assert torch.equal(normed, total * norm.weight)


def test_a_gated_layer_names_its_activation():
    class Named(Elementwise):
        def gated_act(self, gate_up, act):
            names.append(act.name)
            return super().gated_act(gate_up, act)

    names = []
    layers = [GatedMLP(16, 8, act) for act in ("swish", "gelu_pytorch_tanh", "gelu_new", "relu")]
    for layer in layers:
        filled(layer).elementwise = Named()
        layer(X, make_rows())

    assert names == ["silu", "gelu_tanh", "gelu_tanh", "relu"]


def make_step(cache_dtype):
    """A causal layer of two rows after nothing, its kernels counted, and its cache."""
    starts = torch.tensor([0, 2], dtype=torch.int32)
    ids, ends = torch.zeros(2, dtype=torch.int64), torch.tensor([2], dtype=torch.int32)
    table = torch.tensor([[1]], dtype=torch.int32)
    batch = Batch(ids, ids, ids, HostAndDevice(starts, starts), HostAndDevice(ends, ends))
    batch.page_table, batch.slots = HostAndDevice(table, table), torch.tensor([4, 5])
    pool = KVPool(layers=1, pages=2, page_size=4, kv_heads=1, head_dim=8, dtype=cache_dtype, device="cpu")
    layer = Attention(2, 1, 8, causal=True)
    layer.elementwise = Counted()
    backend = TorchBackend()
    backend.bind([layer.spec], torch.float32, pool)
    batch.attention = backend.plan(batch)
    return layer, batch, pool


@pytest.mark.parametrize(
    ("cache_dtype", "called"),
    [(torch.float32, "rotate_and_store"), (torch.bfloat16, "rotate_and_store"), (torch.float8_e4m3fn, "rotate")],
)
def test_rotation_and_storage_are_one_call_unless_the_cache_is_quantised(cache_dtype, called):
    layer, batch, pool = make_step(cache_dtype)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, heads, 8, generator=generator) for heads in (2, 1, 1))
    angles = torch.randn(2, 2, 1, 4, generator=generator).unbind()
    _, turned = READABLE.rotate(q, k, angles)

    layer(q, k, v, batch, angles)

    assert layer.elementwise.calls[0] == called
    stored = pool.data[0, :, 1].float()  # [2, page, kv_heads, dim]
    expected = torch.stack((turned, v)).to(cache_dtype).float()
    assert torch.equal(stored[:, :2], expected)
    assert not stored[:, 2:].any()
    assert not pool.data[0, :, 0].float().any()


def test_a_cache_that_cannot_be_seen_as_one_row_of_tokens_is_refused_not_copied():
    cache = torch.zeros(3, 4, 1, 8).transpose(0, 1)
    rows = torch.ones(1, 1, 8)

    with pytest.raises(RuntimeError, match="view"):
        READABLE.rotate_and_store(rows, rows, rows, None, cache, cache, torch.tensor([1]))
