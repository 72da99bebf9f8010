from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from lorax_core.errors import RequestError
from lorax_core.kernels import onednn
from lorax_core.linear_methods.base import LinearMethod
from lorax_core.linear_methods.plain import Plain, PlainKernel
from lorax_core.linear_methods.select import METHODS, LinearPolicy, choose
from lorax_core.modeling import Embedding, Linear
from lorax_core.modeling.batch import NoAdapters
from lorax_core.modeling.linear import LinearPreparer, prepare_linears

_sizes = itertools.count(17)  # verdicts are kept by shape, so every test has shapes of its own


class Rows:
    adapters = NoAdapters()


class Doubled(LinearMethod):
    """Gives twice the numbers that it should."""

    name = "doubled"

    def supports(self, shape, dtype, device):
        return None

    def prepare(self, weight, bias, *, rows=False):
        return PlainKernel(2 * weight, bias)


class Crashes(Doubled):
    """Cannot be made at all."""

    name = "crashes"

    def prepare(self, weight, bias, *, rows=False):
        raise RuntimeError("no such instruction")


class Halved(LinearMethod):
    """Refuses to be used."""

    name = "halved"

    def supports(self, shape, dtype, device):
        return f"not for {list(shape)}"

    def prepare(self, weight, bias, *, rows=False):
        raise AssertionError("prepared although it supports nothing")


def make_weight(out=None, width=12, dtype=torch.float32):
    out = out or next(_sizes)
    return torch.randn(out, width, generator=torch.Generator().manual_seed(out)).to(dtype)


def make_layer(out, width=12, bias=True):
    layer = Linear(width, out, bias)
    layer.weight.data = make_weight(out, width)
    if bias:
        layer.bias.data = torch.linspace(-1, 1, out)
    return layer


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (Doubled(), "gives other numbers than the plain product"),
        (Crashes(), "failed when it was tried: no such instruction"),
        (Halved(), "not for"),
    ],
)
def test_a_method_that_is_wrong_fails_or_refuses_is_passed_over_with_the_reason(method, reason):
    weight = make_weight()

    first, why = choose(weight, (method, Plain()))
    again, why_again = choose(weight, (method, Plain()))

    assert first.method == again.method == "plain"
    assert reason in why[method.name]
    assert why_again == why
    assert torch.equal(first.dense(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_gets_a_method_and_a_reason_for_each_passed_over(dtype):
    kernel, passed_over = choose(make_weight(dtype=dtype), METHODS)

    names = [method.name for method in METHODS]
    assert [*passed_over, kernel.method] == names[: len(passed_over) + 1]


def test_a_policy_picks_a_method_by_the_path_of_a_layer():
    layers = torch.nn.ModuleDict({"up": make_layer(9), "down": make_layer(10)})

    report = prepare_linears(layers, LinearPolicy({"up": "plain"}))

    assert [choice.path for choice in report.choices] == ["up", "down"]
    assert report.choices[0].method == "plain"
    assert sum(report.methods.values()) == 2
    assert report.choices[1].method == ("onednn" if onednn.works(torch.float32) else "plain")


def test_a_method_that_is_not_there_is_refused_with_the_nearest_name():
    with pytest.raises(RequestError, match="no linear method 'plian'") as caught:
        prepare_linears(make_layer(9), LinearPolicy({"*": "plian"}))

    assert "'plain'" in caught.value.hint


@pytest.mark.parametrize("bias", [True, False])
def test_a_prepared_layer_keeps_its_numbers_and_lets_its_parameter_go(bias):
    layer = make_layer(next(_sizes), bias=bias)
    weight, x = layer.weight.detach().clone(), make_weight(3)
    expected = F.linear(x, weight, layer.bias)

    prepare_linears(layer)
    prepare_linears(layer)  # once more changes nothing

    torch.testing.assert_close(layer(x, Rows()), expected)
    assert layer.weight is None
    assert torch.equal(layer.dense_weight(), weight)


def make_tied(vocab, dim, dtype=torch.float32):
    table, head = Embedding(vocab, dim), Linear(dim, vocab, bias=False)
    table.weight = torch.nn.Parameter(make_weight(vocab, dim, dtype), requires_grad=False)
    head.weight = table.weight
    return torch.nn.ModuleDict({"table": table, "head": head})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(131, 64), (256, 128), (5, 8), (1030, 96), (200, 7)])
def test_a_tied_embedding_reads_the_bits_of_the_weight_that_the_head_prepared(shape, dtype):
    tied = make_tied(*shape, dtype)
    weight = tied["table"].weight.detach().clone()
    ids = torch.tensor([shape[0] - 1, 0, 1, shape[0] // 2, 0])

    prepare_linears(tied)

    assert torch.equal(tied["table"](ids, Rows()), weight[ids])
    assert torch.equal(tied["table"].dense_weight(), weight)
    assert torch.equal(tied["head"].dense_weight(), weight)


@pytest.mark.skipif(not onednn.works(torch.float32), reason="this build of torch packs nothing")
def test_where_the_layout_is_not_recognised_the_embedding_keeps_its_weight_and_the_report_says_so(monkeypatch):
    tied = make_tied(131, 64)
    weight = tied["table"].weight.detach().clone()
    monkeypatch.setattr(onednn, "_ROWS_IN_A_BLOCK", (7,))

    report = prepare_linears(tied)

    assert torch.equal(tied["table"].weight, weight)
    assert torch.equal(tied["table"](torch.tensor([130, 0]), Rows()), weight[[130, 0]])
    assert any("head: a second, plain weight" in reason for reason in report.reasons)


def test_a_weight_that_is_not_finite_does_not_speak_against_a_method():
    weight = make_weight()
    broken = weight.clone()
    broken[0, 0] = float("nan")

    methods = [choose(one, METHODS)[0].method for one in (broken, weight)]

    assert methods[0] == methods[1]
    assert choose(make_weight(), METHODS)[0].method == methods[0]


class WrongAlone(Doubled):
    """Gives wrong numbers for exactly one row."""

    name = "wrong-alone"

    def prepare(self, weight, bias, *, rows=False):
        return WrongAloneKernel(weight, bias)


class WrongAloneKernel(PlainKernel):
    def __call__(self, x):
        return super().__call__(x) * (2 if len(x) == 1 else 1)


def test_a_method_that_is_wrong_for_exactly_one_row_is_passed_over():
    kernel, passed_over = choose(make_weight(), (WrongAlone(), Plain()))

    assert kernel.method == "plain"
    assert "gives other numbers" in passed_over["wrong-alone"]


class Counted(Doubled):
    """Counts how often it is prepared."""

    name = "counted"
    prepared = 0

    def prepare(self, weight, bias, *, rows=False):
        self.prepared += 1
        return super().prepare(weight, bias, rows=rows)


def test_a_method_that_was_refused_is_not_prepared_again_for_the_same_shape():
    method, weight = Counted(), make_weight()

    for _ in range(3):
        choose(weight, (method, Plain()))

    assert method.prepared == 1


class Rounded(Doubled):
    """Rounds its weight, and says how far that may take it."""

    name = "rounded"

    def prepare(self, weight, bias, *, rows=False):
        return PlainKernel((weight * 16).round() / 16, bias)

    def tolerance(self, dtype):
        return 0.1


def test_a_method_that_rounds_weights_is_measured_by_its_own_tolerance():
    kernel, passed_over = choose(make_weight(), (Rounded(), Plain()))

    assert passed_over == {}
    assert not torch.equal(kernel.dense(), make_weight(len(kernel.dense())))


@pytest.mark.skipif(not onednn.works(torch.float32), reason="this build of torch packs nothing")
@pytest.mark.parametrize("size", [1e-22, 1e-24, 1e-30, 1e-38, 0.0])
def test_dead_rows_say_nothing_of_a_method(size):
    weight = make_weight(out=next(_sizes), width=64)
    weight[5:] *= size

    kernel, passed_over = choose(weight, METHODS)

    assert passed_over == {}
    assert kernel.method == METHODS[0].name
    assert choose(make_weight(out=len(weight), width=64), METHODS)[0].method == METHODS[0].name


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_weights_that_are_hard_to_round_are_rounded_all_the_same(name):
    weight = torch.full((next(_sizes), 96), 0.045)
    weight[:, ::32] = 1.0  # an outlier in each group

    kernel, passed_over = choose(weight, LinearPolicy(quantize=name).candidates("layer"))

    assert (kernel.method, passed_over) == (name, {})


@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_product_in_float16_is_that_in_float32(bias):
    weight = make_weight(width=64)
    added = torch.linspace(-1, 1, len(weight)) if bias else None
    x = make_weight(7, 64)

    wide, narrow = (
        choose(weight.to(dtype), LinearPolicy(quantize="int8").candidates("layer"))[0].with_bias(
            None if added is None else added.to(dtype)
        )(x.to(dtype))
        for dtype in (torch.float32, torch.float16)
    )

    assert narrow.dtype is torch.float16
    # Codes near a half go the other way for some of the rounded numbers.
    assert float((narrow.float() - wide).norm() / wide.norm()) < 0.01


class LastRow(Doubled):
    """Is wrong in the last row of a weight alone."""

    name = "last row"

    def prepare(self, weight, bias, *, rows=False):
        wrong = weight.clone()
        wrong[-1] *= 2
        return PlainKernel(wrong, bias)


@pytest.mark.parametrize("out", [3_000, 20_001])
def test_what_is_wrong_at_the_end_of_a_large_weight_is_seen(out):
    kernel, passed_over = choose(make_weight(out), [LastRow(), Plain()])

    assert kernel.method == "plain"
    assert "gives other numbers" in passed_over["last row"]


@pytest.mark.parametrize("out", [1, 2_048, 2_049, 151_936])
def test_rows_that_stand_for_a_weight_are_few_and_from_all_over(out):
    rows = onednn.spread(out)

    assert len(rows) == len(set(rows.tolist())) <= 2_048 + 2
    assert rows[0] == 0
    assert rows[-1] == out - 1
    assert rows.diff().numel() == 0 or 0 < rows.diff().min() <= rows.diff().max() <= max(out // 512, 1)


def test_memory_that_is_only_lent_is_not_computed_with():
    layer, lent = Linear(24, next(_sizes), bias=False), make_weight(16, 24)
    preparer = LinearPreparer(layer, LinearPolicy({"*": "plain"}))
    numbers = lent.clone()

    preparer.prepare(layer.weight, lent, lent=True)
    lent.zero_()

    assert torch.equal(layer.dense_weight(), numbers)


def test_a_tied_table_shares_the_copy_of_lent_numbers():
    table, head = Embedding(16, 24), Linear(24, 16, bias=False)
    head.weight = table.weight
    both = torch.nn.ModuleDict({"table": table, "head": head})
    lent = make_weight(16, 24)
    numbers = lent.clone()

    LinearPreparer(both, LinearPolicy({"head": "plain"})).prepare(head.weight, lent, lent=True)
    lent.zero_()

    assert torch.equal(table.dense_weight(), numbers)
    assert table.kernel.dense().data_ptr() == head.kernel.dense().data_ptr()
