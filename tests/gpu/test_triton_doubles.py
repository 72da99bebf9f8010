"""The doubles themselves: they compile, they compute as a GPU rounds, and they see what they are there to see."""

# ruff: noqa: N803  constants of kernels are written large

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from gpu.doubles import triton_driver
from gpu.doubles.sanitizer import NotDivisible, OutOfBounds, Race, watched
from gpu.doubles.triton_driver import pretend_gpu


@triton.jit
def product(x, y, out, N: tl.constexpr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)).to(out.dtype.element_ty))


@triton.jit
def copied(x, out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < count, other=0.0), mask=i < count)


@triton.jit
def shifted(x, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i + 1, tl.load(x + i))


@triton.jit
def read_by_others(x, WRITER: tl.constexpr):
    i = tl.arange(0, 16)
    if tl.program_id(0) == WRITER:
        tl.store(x + i, i)
    else:
        tl.load(x + i)


@triton.jit
def promised(x, OFFSET: tl.constexpr):
    i = tl.multiple_of(x + OFFSET, 16) + tl.arange(0, 16)
    tl.store(i, tl.load(i))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_and_roundings_are_those_of_a_gpu(arch, dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 16, 16, generator=generator).to(dtype)
    out = torch.empty_like(x)

    with pretend_gpu(arch) as gpu:
        product[(1,)](x, y, out, N=16)

    expected = (x.double() @ y.double()).to(dtype)
    torch.testing.assert_close(out, expected, rtol=1e-6 if dtype is torch.float32 else 2**-8, atol=1e-6)
    assert gpu.launches == ["product"]


def test_float32_is_rounded_to_the_nearest_bfloat16():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    out = torch.empty(64, dtype=torch.bfloat16)

    with pretend_gpu():
        copied[(1,)](x, out, 64, BLOCK=64)

    assert torch.equal(out, x.bfloat16())


def test_each_kernel_is_compiled_once_and_launches_are_those_of_the_gpu_of_now():
    x = torch.zeros(64)
    with pretend_gpu(80):
        copied[(1,)](x, x.clone(), 48, BLOCK=32)
    with pretend_gpu(80) as gpu:
        copied[(2,)](x, x.clone(), 48, BLOCK=32)

    assert gpu.compiled == []
    assert gpu.launches == ["copied"]


def test_a_read_or_write_past_a_tensor_is_seen():
    x, out = torch.zeros(64), torch.zeros(128)
    with pretend_gpu():
        with watched(x[:40], out), pytest.raises(OutOfBounds, match="a read of 8 numbers"):
            copied[(1,)](x, out, 48, BLOCK=64)
        with watched(x, out[:40]), pytest.raises(OutOfBounds, match="a write of 8 numbers"):
            copied[(1,)](x, out, 48, BLOCK=64)
        with watched(x, out):
            copied[(1,)](x, out, 48, BLOCK=64)


def test_programs_that_touch_what_another_writes_are_seen():
    x = torch.zeros(64)
    with pretend_gpu(), watched(x):
        with pytest.raises(Race, match=r"a read of program \(1, 0, 0\) where program \(0, 0, 0\) writes"):
            shifted[(2,)](x, BLOCK=16)
        shifted[(1,)](x, BLOCK=16)


@pytest.mark.parametrize(("programs", "readers"), [(2, r"\(0, 0, 0\)"), (3, r"\('several programs',\)")])
def test_a_write_where_other_programs_read_is_seen(programs, readers):
    x = torch.zeros(16)
    with pretend_gpu(), watched(x), pytest.raises(Race, match=f"where {readers} read"):
        read_by_others[(programs,)](x, WRITER=programs - 1)


def test_a_divisor_that_an_address_does_not_have_is_seen():
    x = torch.zeros(64)
    with pretend_gpu(), watched(x):
        promised[(1,)](x, OFFSET=4)
        with pytest.raises(NotDivisible, match="is no multiple of 16"):
            promised[(1,)](x, OFFSET=3)


def test_another_triton_than_those_that_it_was_made_for_is_refused(monkeypatch):
    monkeypatch.setattr(triton_driver.triton, "__version__", "4.0.0")

    with pytest.raises(AssertionError, match=r"not for 4\.0\.0"), pretend_gpu():
        pass
