"""The compiled attention gives what the torch backend gives, leaves the same cache behind, and reads nothing else."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorax_core.attention.base import AttentionSpec, CacheLayout, HostAndDevice
from lorax_core.attention.native import FEW_ROWS, NativeBackend
from lorax_core.attention.torch import TorchBackend
from lorax_core.kernels.elementwise import READABLE, Angles
from lorax_core.kernels.native.attention import make_jobs, scratch_size
from lorax_core.kvcache.pool import KVPool

FP8 = torch.float8_e4m3fn
SPEC = AttentionSpec(heads=6, kv_heads=2, head_dim=64, causal=True)


@dataclass(frozen=True)
class Case:
    """A step over a cache whose pages are strewn about."""

    spec: AttentionSpec = SPEC
    sequences: tuple[tuple[int, int], ...] = ((0, 1), (15, 1), (16, 1), (300, 1), (40, 5))  # (cached, new)
    page: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    rotary: int = 64
    seed: int = 0

    def compute(self, backend: Any, *, exact: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The step's answers, and the cache after it; in float32 throughout with `exact`."""
        generator = torch.Generator().manual_seed(self.seed)
        spec, dtype = self.spec, torch.float32 if exact else self.dtype
        kv_dtype = self.kv_dtype or dtype
        counts = [-(-(past + new) // self.page) for past, new in self.sequences]
        ids = list(range(1, sum(counts) + 1))
        random.Random(self.seed).shuffle(ids)
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, count in zip(table, counts, strict=True):
            row[:count] = torch.tensor([ids.pop() for _ in range(count)])
        shape = {"pages": sum(counts) + 1, "page_size": self.page, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim}
        pool = KVPool(layers=2, dtype=kv_dtype, device="cpu", scales=[(1.0, 1.0), (0.5, 2.0)], **shape)
        old = torch.arange(self.page, (sum(counts) + 1) * self.page)
        tokens = sum(new for _, new in self.sequences)

        def drawn(rows: int, heads: int) -> torch.Tensor:
            return torch.randn(rows, heads, spec.head_dim, generator=generator).to(self.dtype).to(dtype)

        pool.write(1, drawn(len(old), spec.kv_heads), drawn(len(old), spec.kv_heads), old)
        q, k, v = torch.split(
            drawn(tokens, spec.heads + 2 * spec.kv_heads), [spec.heads, spec.kv_heads, spec.kv_heads], 1
        )
        turns = torch.rand(tokens, 1, self.rotary // 2, generator=generator) * 6
        angles = Angles(turns.cos().to(self.dtype).to(dtype), turns.sin().to(self.dtype).to(dtype))
        slots = [
            int(row[at // self.page]) * self.page + at % self.page
            for row, (past, new) in zip(table, self.sequences, strict=True)
            for at in range(past, past + new)
        ]
        starts = [0, *itertools.accumulate(new for _, new in self.sequences)]
        rows = SimpleNamespace(
            query_starts=int32(starts),
            kv_lengths=int32([past + new for past, new in self.sequences]),
            page_table=HostAndDevice(table, table),
            slots=torch.tensor(slots),
        )
        assert isinstance(backend.layout([spec], dtype, kv_dtype, "cpu", self.page), CacheLayout)
        backend.bind([spec], dtype, pool)
        layer = SimpleNamespace(index=1, spec=spec, elementwise=READABLE)
        answers = backend.plan(rows).forward(layer, q, k, v, angles if self.rotary else None)
        return answers, pool.data.view(torch.uint8)


def int32(values):
    tensor = torch.tensor(values, dtype=torch.int32)
    return HostAndDevice(tensor, tensor)


def drawn_cases():
    chosen = random.Random(7)
    for seed in range(80):
        dtype = chosen.choice([torch.float32, torch.bfloat16])
        dim, kv_heads, group = (
            chosen.choice([16, 48, 64, 128, 256]),
            chosen.choice([1, 2, 3]),
            chosen.choice([1, 2, 7, 9, 17]),
        )
        yield Case(
            AttentionSpec(
                kv_heads * group,
                kv_heads,
                dim,
                causal=True,
                window=chosen.choice([None, None, 1, 5, 17, 40]),
                soft_cap=chosen.choice([None, None, 2.0]),
            ),
            tuple(
                (
                    chosen.choice([0, 1, 15, 16, 17, 100, 700, 1500]),
                    chosen.choice([1, 1, 1, 2, 5, FEW_ROWS, FEW_ROWS + 1, 30]),
                )
                for _ in range(chosen.randint(1, 6))
            ),
            page=chosen.choice([1, 3, 8, 16, 32, 48]),
            dtype=dtype,
            kv_dtype=chosen.choice([None, None, FP8]),
            rotary=chosen.choice([0, dim, dim // 4 // 2 * 2]),
            seed=seed,
        )


def off(found, expected):
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@pytest.mark.parametrize("case", list(drawn_cases()), ids=lambda case: str(case.seed))
def test_steps_of_any_kind_are_the_torch_backends(case):
    expected, cache = case.compute(TorchBackend())

    found, written = case.compute(NativeBackend())

    assert torch.equal(written, cache)
    if case.dtype is torch.float32:
        assert off(found, expected) < 1e-5
    else:
        exact, _ = case.compute(TorchBackend(), exact=True)
        # Both round their answers; the compiled one keeps weights in float32.
        assert off(found, exact) <= 1.5 * off(expected, exact) + 2**-9


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
