"""The compiled attention gives what the torch backend gives, leaves the same cache behind, and reads nothing else."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention_cases import FP8, SPEC, Case, With, check, drawn_cases, off
from compiled import compiled_for_avx2, only_on_x86

from lorax_core.attention.native import NativeBackend
from lorax_core.attention.torch import TorchBackend
from lorax_core.kernels.native.attention import SOURCE, make_jobs, scratch_size


@pytest.mark.parametrize("case", list(drawn_cases()), ids=lambda case: str(case.seed))
def test_steps_of_any_kind_are_the_torch_backends(case):
    check(case, NativeBackend())


@pytest.fixture(scope="module")
def on_avx2(tmp_path_factory):
    return With(compiled_for_avx2(SOURCE, tmp_path_factory.mktemp("avx2")))


@only_on_x86
@pytest.mark.parametrize("case", list(drawn_cases())[::3], ids=lambda case: str(case.seed))
def test_on_a_processor_with_avx2_alone_steps_are_the_torch_backends_too(on_avx2, case):
    check(case, on_avx2)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_number_of_threads_gives_the_same_answers(threads):
    case = Case(sequences=((4000, 1), (3, 1), (1000, 4)))
    expected, _ = case.compute(TorchBackend())
    before = torch.get_num_threads()

    torch.set_num_threads(threads)
    try:
        found, _ = case.compute(NativeBackend())
        again, _ = case.compute(NativeBackend())
    finally:
        torch.set_num_threads(before)

    assert off(found, expected) < 1e-5
    assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_with_and_without_a_long_prompt_beside_it(dtype):
    case = Case(sequences=((40, 1), (0, 30)), dtype=dtype)

    beside, cache = case.compute(NativeBackend())
    together, same_cache = case.compute(NativeBackend(few_rows=30))

    assert torch.equal(beside[0], together[0])
    assert torch.equal(cache, same_cache)


def test_pages_behind_the_window_are_not_read():
    case = Case(replace(SPEC, window=20), ((100, 1), (64, 3)))
    backend = NativeBackend()
    expected, _ = case.compute(backend)

    class Poisoned(NativeBackend):
        def plan(self, rows):
            for row, length, new in zip(rows.page_table.host, rows.kv_lengths.host, (1, 3), strict=True):
                behind = (int(length) - new + 1 - 20) // 16
                # A page that was given back is page 0 in the table, and holds whatever padding rows left there.
                row[:behind] = 0
            self.cache.data[:, :, 0] = float("nan")
            return super().plan(rows)

    found, _ = case.compute(Poisoned())

    assert torch.equal(found, expected)


@pytest.mark.parametrize("keys", [2, slice(None)], ids=["a key", "a page"])
def test_a_number_that_is_none_stays_none(keys):
    class Broken(NativeBackend):
        def plan(self, rows):
            self.cache.data[1, 0, int(rows.page_table.host[3, 0]), keys] = float("nan")
            return super().plan(rows)

    found, _ = Case().compute(Broken())

    assert found[3].isnan().all()
    assert not found[[0, 1, 2, 4, 5, 6, 7, 8]].isnan().any()


def test_keys_are_shared_out_by_the_shapes_of_the_step():
    table = torch.zeros(3, 400, dtype=torch.int32)

    jobs = make_jobs(table, [(0, 0, 1), (2, 1, 4)], [100, 6000], None, 2)

    assert jobs["parts"].tolist() == [1, 8]
    assert jobs["at"].tolist() == [0, 1]
    assert jobs["pages"].tolist() == [table.data_ptr(), table[2].data_ptr()]


@pytest.mark.parametrize(
    ("spec", "dtype", "kv_dtype", "device", "told"),
    [
        (SPEC, torch.float16, torch.float16, "cpu", "computes in float32 and bfloat16, not in float16"),
        (SPEC, torch.float32, torch.bfloat16, "cpu", "a cache of float32 or float8_e4m3fn, not of bfloat16"),
        (
            replace(SPEC, head_dim=40),
            torch.float32,
            torch.float32,
            "cpu",
            "a multiple of 16 wide and at most 256, not 40",
        ),
        (replace(SPEC, head_dim=272), torch.float32, torch.float32, "cpu", "not 272"),
        (replace(SPEC, causal=False), torch.float32, torch.float32, "cpu", "causal layers alone"),
        (SPEC, torch.float32, torch.float32, "cuda", "on a CPU, not on 'cuda'"),
    ],
)
def test_what_it_cannot_compute_is_refused_with_the_reason(spec, dtype, kv_dtype, device, told):
    layout = NativeBackend().layout([spec], dtype, kv_dtype, device)

    assert isinstance(layout, str)
    assert told in layout


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("LORAX_NATIVE", "0")

    assert NativeBackend.is_available() == (False, "LORAX_NATIVE is off")


def test_without_a_compiler_it_is_not_available(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    available, why = NativeBackend.is_available()

    assert not available
    assert "compiler" in why


@pytest.mark.parametrize("kv_dtype", [None, FP8])
@pytest.mark.parametrize("at", [2, 3900])
def test_a_number_that_is_none_stays_none_in_whichever_part_it_is(kv_dtype, at):
    class Broken(NativeBackend):
        def plan(self, rows):
            page = self.cache.data[1, 0, int(rows.page_table.host[0, at // 16])]
            if kv_dtype is FP8:
                page.view(torch.uint8)[at % 16] = 0x7F
            else:
                page[at % 16] = torch.nan
            return super().plan(rows)

    found, _ = Case(sequences=((4000, 1), (3, 1)), kv_dtype=kv_dtype).compute(Broken())

    assert found[0].isnan().all()
    assert not found[1].isnan().any()


@pytest.mark.parametrize("heads", [2, 8])
def test_layers_of_one_window_share_memory_that_is_enough_for_the_largest(heads):
    class Beside(NativeBackend):
        def bind(self, specs, dtype, cache):
            super().bind([replace(SPEC, heads=heads), *specs], dtype, cache)

        def plan(self, rows):
            step = super().plan(rows)
            work = step._work[None]
            needed = scratch_size(work.jobs, max(heads, SPEC.heads), SPEC.head_dim)
            assert work.scratch.numel() >= needed  # before it is written past its end
            return step

    found, _ = Case().compute(Beside())

    assert torch.equal(found, Case().compute(NativeBackend())[0])


def test_a_backend_that_is_bound_anew_knows_nothing_of_the_cache_before():
    backend = NativeBackend()
    Case(page=16).compute(backend)

    again, _ = Case(page=8).compute(backend)

    assert torch.equal(again, Case(page=8).compute(NativeBackend())[0])


def test_each_layer_has_scales_of_its_own():
    backend = NativeBackend()
    Case(kv_dtype=FP8).compute(backend)

    shapes = [backend.shape(SimpleNamespace(index=index, spec=SPEC)) for index in (0, 1)]

    assert [(shape.k_scale, shape.v_scale) for shape in shapes] == [(1.0, 1.0), (0.5, 2.0)]
