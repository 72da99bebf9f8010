"""What holds for every layer with parameters: one way to override arithmetic, which adapters' numbers go through as well."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorax_core.adapters.deltas import EmbeddingLowRank, Replacement, TokenRows
from lorax_core.modeling import Embedding, LayerNorm, Linear, RMSNorm
from lorax_core.modeling.batch import NoAdapters
from lorax_core.modeling.linear import prepare_linears
from lorax_core.modeling.site import AdapterRows

SIZE = 6


class Rows(AdapterRows):
    def __init__(self, delta=None):
        self.adapters = self if delta is not None else NoAdapters()
        self.delta = delta

    def apply(self, site, x, y):
        self.delta.apply(site, x, y)
        return y


class ScaledLinear(Linear):
    def compute(self, x, kernel):
        return 3 * super().compute(x, kernel)


class ScaledEmbedding(Embedding):
    def compute(self, x, kernel):
        return 3 * super().compute(x, kernel)


class ScaledLayerNorm(LayerNorm):
    def compute(self, x, weight, bias):
        return 3 * super().compute(x, weight, bias)


class ScaledRMSNorm(RMSNorm):
    def compute(self, x, weight, bias):
        return 3 * super().compute(x, weight, bias)


MADE = {
    ScaledLinear: lambda kind: kind(SIZE, SIZE),
    ScaledEmbedding: lambda kind: kind(SIZE, SIZE),
    ScaledLayerNorm: lambda kind: kind(SIZE, 1e-5),
    ScaledRMSNorm: lambda kind: kind(SIZE, 1e-5),
}


def make_site(kind, make, seed):
    site = make(kind)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in list(site.named_parameters()):
        setattr(site, name, nn.Parameter(torch.randn(tensor.shape, generator=generator), requires_grad=False))
    return site


def make_x(kind):
    return torch.tensor([5, 0, 2]) if issubclass(kind, Embedding) else torch.randn(3, SIZE).cos()


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", MADE)
def test_other_arithmetic_holds_for_the_base_and_for_the_numbers_of_adapters(kind, prepared):
    usual, site = (make_site(one, MADE[kind], seed=1) for one in (kind.__base__, kind))
    replaced = make_site(kind.__base__, MADE[kind], seed=2)
    x, delta = make_x(kind), Replacement(replaced.weight, replaced.bias)
    expected_base, expected_replaced = 3 * usual(x, Rows()), 3 * replaced(x, Rows())
    if prepared:
        prepare_linears(site)

    base, adapted = site(x, Rows()), site(x, Rows(delta))

    torch.testing.assert_close(base, expected_base)
    torch.testing.assert_close(adapted, expected_replaced)


@pytest.mark.parametrize("kind", [ScaledLayerNorm, ScaledRMSNorm])
def test_other_arithmetic_of_a_norm_holds_where_a_residual_is_added(kind):
    site, usual = make_site(kind, MADE[kind], 1), make_site(kind.__base__, MADE[kind], 1)
    x, residual = torch.ones(2, SIZE).cumsum(1), torch.ones(2, SIZE)

    normed, total = site.add(x, residual, Rows())

    assert torch.equal(total, x + residual)
    assert torch.equal(normed, 3 * usual(total, Rows()))


@pytest.mark.parametrize("name", ["forward", "__call__"])
@pytest.mark.parametrize("base", [Linear, Embedding, LayerNorm, RMSNorm, ScaledLinear])
def test_a_layer_that_would_bypass_its_adapters_cannot_be_defined(base, name):
    with pytest.raises(TypeError, match=f"Bypass defines '{name}'.*override 'compute' instead"):
        type("Bypass", (base,), {name: lambda self, x, batch: x})


@pytest.mark.parametrize("base", [Linear, Embedding, LayerNorm, RMSNorm])
def test_a_forward_that_is_mixed_in_is_refused_too(base):
    mixin = type("Mixin", (), {"forward": lambda self, x, batch: x})

    with pytest.raises(TypeError, match="Bypass defines 'forward'"):
        type("Bypass", (mixin, base), {})


@pytest.mark.parametrize(("base", "name"), [(LayerNorm, "add"), (RMSNorm, "computed_with"), (Linear, "computed_with")])
def test_other_final_methods_cannot_be_overridden(base, name):
    with pytest.raises(TypeError, match=f"Bypass defines '{name}'"):
        type("Bypass", (base,), {name: lambda self, *numbers: None})


def test_other_arithmetic_of_an_embedding_holds_for_trained_tokens_and_low_rank_updates():
    site = make_site(ScaledEmbedding, MADE[ScaledEmbedding], seed=1)
    x, rows = make_x(ScaledEmbedding), torch.randn(1, SIZE).cos()
    a, b = torch.randn(SIZE, 2).cos(), torch.randn(SIZE, 2).sin()
    trained, updated = site.weight.clone(), site.weight + a @ b.t()
    trained[2] = rows[0]

    tokens = site(x, Rows(TokenRows(torch.tensor([2]), rows)))
    low_rank = site(x, Rows(EmbeddingLowRank(a, b)))

    torch.testing.assert_close(tokens, 3 * trained[x])
    torch.testing.assert_close(low_rank, 3 * updated[x])


@pytest.mark.parametrize("name", ["forward", "_call_impl"])
def test_a_layer_that_is_given_another_forward_keeps_its_adapters(name):
    layer = Linear(SIZE, SIZE)

    with pytest.raises(TypeError, match=f"cannot be given another '{name}'"):
        setattr(layer, name, lambda x, batch: x)

    layer.bias = None  # everything else is set as in any module
    assert layer.bias is None


class Told(Rows):
    """Tells what it was asked, beside what the site itself did."""

    def __init__(self, told):
        super().__init__(delta=self)
        self.told = told

    def start(self, site, x):
        self.told.append(("start", site, x))

    def apply(self, site, x, y):
        self.told.append(("apply", site, x))
        return y


def test_adapters_may_start_before_the_base_layer():
    told = []

    class Watched(Linear):
        def compute(self, x, kernel):
            told.append("base")
            return super().compute(x, kernel)

    layer, x = make_site(Watched, lambda kind: kind(SIZE, SIZE), 0), torch.ones(2, SIZE)
    layer(x, Told(told))

    assert told == [("start", layer, x), "base", ("apply", layer, x)]
