"""Mistakes that a backend could make, planted one by one: each is refused by a double or found by the comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gpu.doubles.backends import FlashAttnOnCpu, FlashInferOnCpu, VarlenDouble, VarlenOnCpu, backends_on_cpu
from gpu.doubles.launch import Misuse
from gpu.steps import Step, graph_of

from lorax_core.attention.base import AttentionSpec
from lorax_core.attention.flash_attn import FlashAttnPackage

SIZES = [(0, 7), (5, 1), (9, 4), (20, 1), (0, 1), (15, 17), (31, 1)]
FULL = AttentionSpec(4, 2, 64, causal=True)
WINDOW, CAP = replace(FULL, window=6), replace(FULL, soft_cap=1.5)
TWO_SIDED = replace(FULL, causal=False, window=3)


@pytest.fixture(scope="module", autouse=True)
def _on_cpu() -> Iterator[None]:
    with backends_on_cpu():
        yield


class Flash(FlashInferOnCpu):
    """Mistakes in what FlashInfer is told: `planted` changes the arguments of a plan."""

    @staticmethod
    def planted(spec, starts, indptr, pages, last, keys):
        return spec, starts, indptr, pages, last, keys

    def _plan_paged(self, spec, wrapper, *tables):
        spec, *tables = self.planted(spec, *tables)
        super()._plan_paged(spec, wrapper, *tables)


def telling(change):
    """FlashInfer, told what `change` makes of the arguments."""
    return type("Planted", (Flash,), {"planted": staticmethod(change)})


class NotShifted(FlashInferOnCpu):
    """Pages behind a window are not cut from the front of the table; as many are from its end."""

    def _table(self, rows, window):
        indptr, _, last, keys = super()._table(rows, window)
        held = [rows.page_table.host[i, :count] for i, count in enumerate(indptr.diff().tolist())]
        return indptr, torch.cat(held), last, keys


class NotCut(FlashInferOnCpu):
    """Pages behind a window are counted as cut, and all of them are given."""

    def _table(self, rows, window):
        _, _, _, keys = super()._table(rows, window)
        indptr, pages, last, _ = super()._table(rows, None)
        return indptr, pages, last, keys


class NotReplanned(FlashInferOnCpu):
    """Of several kinds of layer only the first is planned again."""

    def prepare(self, wrappers, rows):
        first = next(iter(wrappers))
        done = wrappers[first]._plan_info is not None
        super().prepare({first: wrappers[first]} if done else wrappers, rows)


def last_key_wrong(spec, starts, indptr, pages, last, keys):
    return spec, starts, indptr, pages, last % 16, keys


PLANS = {
    "a window of one key more": (
        telling(lambda spec, *rest: (replace(spec, window=spec.window + 1), *rest)),
        [WINDOW],
    ),
    "a window of one key less": (
        telling(lambda spec, *rest: (replace(spec, window=spec.window - 1), *rest)),
        [WINDOW],
    ),
    "a window forgotten": (telling(lambda spec, *rest: (replace(spec, window=None), *rest)), [WINDOW]),
    "a cap forgotten": (telling(lambda spec, *rest: (replace(spec, soft_cap=None), *rest)), [CAP]),
    "last_page_len 0 for a full page": (telling(last_key_wrong), [FULL]),
    "a table that is not shifted": (NotShifted, [WINDOW]),
    "a table that is not cut": (NotCut, [WINDOW]),
    "lengths of int64": (telling(lambda spec, starts, *rest: (spec, starts.long(), *rest)), [FULL]),
    "pages of int64": (telling(lambda spec, s, i, pages, *rest: (spec, s, i, pages.long(), *rest)), [FULL]),
    "heads the other way round": (telling(lambda spec, *rest: (replace(spec, kv_heads=4), *rest)), [FULL]),
    "lengths before the step": (
        telling(lambda spec, s, i, p, last, keys: (spec, s, i, p, (last - 1).clamp(min=1), keys)),
        [FULL],
    ),
}


@pytest.mark.parametrize(("backend", "specs"), PLANS.values(), ids=PLANS)
def test_a_mistake_in_what_flashinfer_is_told_is_found(backend, specs):
    step = Step(specs, SIZES)
    step.insist(step.by(FlashInferOnCpu()))

    with pytest.raises(AssertionError):
        step.insist(step.by(backend()))


def unscaled(step):
    """The scales of an 8-bit cache are forgotten."""
    cache = step.cache
    step._cache = SimpleNamespace(quantized=True, write=cache.write, layer=cache.layer, scales=[(1.0, 1.0)] * 2)


def only_keys_scaled(step):
    cache = step.cache
    scales = [(k, 1.0) for k, _ in cache.scales]
    step._cache = SimpleNamespace(quantized=True, write=cache.write, layer=cache.layer, scales=scales)


def scales_of_the_next_layer(step):
    cache = step.cache
    step._cache = SimpleNamespace(quantized=True, write=cache.write, layer=cache.layer, scales=cache.scales[::-1])


@pytest.mark.parametrize("plant", [unscaled, only_keys_scaled, scales_of_the_next_layer])
def test_scales_that_are_forgotten_are_found(plant):
    scales = [(0.03, 0.02), (0.05, 0.07)]
    step = Step([FULL, FULL], SIZES, kv_dtype=torch.float8_e4m3fn, scales=scales)

    with pytest.raises(AssertionError):
        step.insist(step.by(FlashInferOnCpu(), plant))


@pytest.mark.parametrize("other", [WINDOW, CAP, replace(WINDOW, window=7)], ids=["window", "cap", "another window"])
def test_the_plan_of_another_kind_of_layer_is_found(other):
    one = WINDOW if other.window == 7 else FULL
    step = Step([one, other], SIZES)

    def swapped(planned):
        planned._wrappers = {one: planned._wrappers[other], other: planned._wrappers[one]}

    with pytest.raises(AssertionError):
        step.insist(step.by(FlashInferOnCpu(), swapped))


def test_one_wrapper_for_two_kinds_of_layer_is_found():
    step = Step([FULL, WINDOW], SIZES)

    class Shared(FlashInferOnCpu):
        def _wrapper(self, spec, device, graph=None):
            return next(iter(self._wrappers.values()), None) or super()._wrapper(spec, device, graph)

    with pytest.raises(AssertionError):
        step.insist(step.by(Shared()))


def test_a_cache_of_unlike_strides_is_refused():
    step = Step([FULL], SIZES)
    pool = step.pool(step.dtype)
    planned = step.bound(FlashInferOnCpu(), pool).plan(step.rows)
    k, v = pool.layer(0)

    with pytest.raises(Misuse, match="differ in their strides"):
        planned._wrappers[FULL].run(step.q[0], (k, torch.cat([v, v], 2)[:, :, :2]))


def decode(sizes, seed):
    return Step([FULL, WINDOW], sizes, width=4, seed=seed)


def replayed(backend, plan=lambda graph, rows: graph.replan(rows)):
    """Capture one decoding step, then replay another one."""
    first, second = decode([(3, 1), (17, 1)], 1), decode([(40, 1), (15, 1)], 2)
    pool = first.pool(first.dtype)
    graph = graph_of(first.bound(backend, pool), first)
    pool.data.copy_(second.pool(second.dtype).data)
    for ours, new in zip(
        (first.rows.kv_lengths, first.rows.page_table), (second.rows.kv_lengths, second.rows.page_table), strict=True
    ):
        ours.device.copy_(new.device)
    first.rows.slots.copy_(second.rows.slots)
    plan(graph, second.rows)
    second.insist(second.run(graph))


def test_a_graph_that_is_planned_once_is_found():
    replayed(FlashInferOnCpu())
    with pytest.raises(AssertionError):
        replayed(FlashInferOnCpu(), plan=lambda graph, rows: None)


def test_a_graph_of_which_one_window_is_not_planned_again_is_found():
    with pytest.raises(AssertionError):
        replayed(NotReplanned())


class NoSplitCount(VarlenDouble):
    """torch chooses how often keys are split."""

    def paged(self, spec, q, k, v, part):
        varlen = self._varlen
        self._varlen = lambda *args, num_splits, **options: varlen(*args, **options)
        try:
            return super().paged(spec, q, k, v, part)
        finally:
            self._varlen = varlen


class WindowOff(VarlenDouble):
    """The window of varlen_attn is taken for a number of keys, the row's own among them."""

    def paged(self, spec, q, k, v, part):
        return super().paged(replace(spec, window=spec.window + 1), q, k, v, part)


class OneSided(VarlenDouble):
    """An encoder's window ends on the left alone."""

    def encode(self, spec, q, k, v, part):
        window = (spec.window - 1, -1)
        bounds = (part.starts, part.starts, part.most_rows, part.most_rows)
        return self._varlen(q, k, v, *bounds, window_size=window, enable_gqa=True)


class LongTables(FlashAttnPackage):
    """Pages and lengths in int64."""

    def paged(self, spec, q, k, v, part):
        return super().paged(spec, q, k, v, replace(part, pages=part.pages.long()))


class CapForgotten(FlashAttnPackage):
    def paged(self, spec, q, k, v, part):
        return super().paged(replace(spec, soft_cap=None), q, k, v, part)


class LengthsOfRows(FlashAttnPackage):
    """Each sequence has as many keys as rows: the cached ones are forgotten."""

    def paged(self, spec, q, k, v, part):
        return super().paged(spec, q, k, v, replace(part, lengths=part.starts.diff(), ends=part.starts))


class ShortBound(VarlenDouble):
    """The most rows are those of the first sequence."""

    def paged(self, spec, q, k, v, part):
        return super().paged(spec, q, k, v, replace(part, most_rows=int(part.starts[1])))


FLASH = {
    "num_splits automatic": (VarlenOnCpu, NoSplitCount, FULL),
    "a window of one key more": (VarlenOnCpu, WindowOff, WINDOW),
    "an encoder's window on one side": (VarlenOnCpu, OneSided, TWO_SIDED),
    "too few rows stated": (VarlenOnCpu, ShortBound, FULL),
    "tables of int64": (FlashAttnOnCpu, LongTables, FULL),
    "a cap forgotten": (FlashAttnOnCpu, CapForgotten, CAP),
    "cached keys forgotten": (FlashAttnOnCpu, LengthsOfRows, FULL),
}


@pytest.mark.parametrize(("right", "packaging", "spec"), FLASH.values(), ids=FLASH)
def test_a_mistake_in_what_flash_attention_is_told_is_found(right, packaging, spec):
    sizes = SIZES if spec.causal else [(0, 9), (0, 4)]
    step = Step([spec], sizes, page_size=256)
    step.insist(step.by(right()))
    planted = type("Planted", (right,), {"packagings": (packaging,)})

    with pytest.raises(AssertionError):
        step.insist(step.by(planted()))
