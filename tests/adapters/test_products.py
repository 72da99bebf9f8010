from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_core.adapters.deltas import Block, LowRank
from lorax_core.adapters.lora_kernels.base import Compiled, OneByOne, Products, Updates
from lorax_core.kernels.native.low_rank import load_native, native_status

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler is installed")


def make_update(generator, inputs, outputs, ranks, dtype):
    """Blocks side by side, one for each rank; a rank of 0 leaves its columns alone."""
    width = outputs // len(ranks)
    starts = [sum(ranks[:at]) for at in range(len(ranks))]
    return LowRank(
        torch.randn(sum(ranks), inputs, generator=generator).to(dtype),
        tuple(
            Block(slice(start, start + rank), at * width, torch.randn(rank, width, generator=generator).to(dtype))
            for at, (start, rank) in enumerate(zip(starts, ranks, strict=True))
            if rank
        ),
    )


def make_work(seed, inputs, outputs, runs, dtype):
    """x, y, and updates of runs `(rows, ranks)`; every second run has none."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(rows for rows, _ in runs)
    x = torch.randn(total, inputs + 3, generator=generator).to(dtype)[:, 1:-2]  # rows that lie apart
    y = torch.randn(total, outputs + 5, generator=generator).to(dtype)[:, 2:-3]
    found, start = [], 0
    for number, (rows, ranks) in enumerate(runs):
        if number % 2 == 0:
            found.append(((start, start + rows), make_update(generator, inputs, outputs, ranks, dtype)))
        start += rows
    return x, y, Updates([run for run, _ in found], [update for _, update in found])


def expected(x, y, updates):
    """The definition, in 64 bit."""
    result = y.double().clone()
    for (start, stop), update in zip(updates.runs, updates.updates, strict=True):
        for block in update.blocks:
            added = x[start:stop].double() @ update.a[block.ranks].double().t() @ block.b.double()
            result[start:stop, block.column : block.column + block.b.shape[1]] += added
    return result


@needs_compiler
def test_where_there_is_a_compiler_the_product_is_compiled():
    assert load_native() is not None


@pytest.mark.parametrize("form", ["one by one", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    inputs=st.sampled_from([1, 7, 64, 130]),
    outputs=st.sampled_from([6, 48, 1200]),
    runs=st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from([(1,), (3, 0), (8, 4), (16,), (5, 1, 2)])), min_size=1, max_size=7
    ),
)
def test_every_form_computes_the_definition(form, dtype, seed, inputs, outputs, runs):
    if form == "compiled" and not HAS_COMPILER:
        pytest.skip("no C++ compiler is installed")
    made = Compiled(load_native()) if form == "compiled" else OneByOne()
    x, y, updates = make_work(seed, inputs, outputs, runs, dtype)
    wanted = expected(x, y, updates)

    made.add(x, y, updates)

    off = (y.double() - wanted).abs().max() / wanted.abs().max()
    # In 16 bit the plain form rounds between its two products and the compiled one only at the end.
    assert off < (2e-6 if dtype is torch.float32 else 2e-2)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(dtype, number):
    x, y, updates = make_work(1, 64, 48, [(2, (8,))], dtype)
    x[1, 5] = number

    Compiled(load_native()).add(x, y, updates)

    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


class Counted:
    """A form that takes a known time on the clock of the test."""

    def __init__(self, clock, seconds, dtypes=(torch.float32,)):
        self.clock, self.seconds, self.dtypes, self.calls = clock, seconds, dtypes, 0

    def takes(self, x, y):
        return x.dtype in self.dtypes

    def add(self, x, y, updates):
        self.calls += 1
        self.clock.now += self.seconds(updates)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_faster_form_does_the_work_of_each_kind():
    clock = Clock()
    steady, growing = Counted(clock, lambda updates: 10), Counted(clock, lambda updates: updates.rows)
    products = Products([steady, growing], clock)
    small, large = (make_work(1, 4, 6, [(rows, (2,))], torch.float32) for rows in (2, 100))

    for work in (small, large):
        for _ in range(20):
            products.add(*work)

    # Each is tried three times on each kind of work.
    assert (steady.calls, growing.calls) == (3 + 17, 17 + 3)


def test_a_form_that_cannot_is_not_tried():
    clock = Clock()
    every, some = Counted(clock, lambda _: 5, (torch.float32, torch.float16)), Counted(clock, lambda _: 1)
    products = Products([every, some], clock)

    for _ in range(9):
        products.add(*make_work(1, 4, 6, [(2, (2,))], torch.float16))

    assert (every.calls, some.calls) == (9, 0)


def test_without_a_compiler_or_when_told_not_to_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path))
    monkeypatch.setenv("LORAX_NATIVE", "0")
    assert native_status.__wrapped__()[0] is None

    monkeypatch.setenv("LORAX_NATIVE", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native_status.__wrapped__()[0] is None


@needs_compiler
def test_a_library_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path))

    first = native_status.__wrapped__()[0]
    (made,) = (tmp_path / "native").glob("*.so")
    before = made.stat().st_mtime_ns
    second = native_status.__wrapped__()[0]

    assert first is not None
    assert second is not None
    assert made.stat().st_mtime_ns == before
    assert list((tmp_path / "native").iterdir()) == [made]


def test_an_engine_without_adapters_compiles_nothing(qwen2, tmp_path):
    code = (
        "import lorax_core, sys\n"
        "with lorax_core.load(sys.argv[1]) as engine:\n"
        "    engine.generate([1, 2, 3], max_tokens=2)\n"
    )
    environment = {**os.environ, "LORAX_CACHE": str(tmp_path / "cache")}

    subprocess.run([sys.executable, "-c", code, str(qwen2)], env=environment, check=True, timeout=120)

    assert not (tmp_path / "cache").exists()
