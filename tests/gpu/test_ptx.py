"""What the kernels compile to: no spills, little shared memory, wide loads, no TF32, 64-bit offsets."""

from __future__ import annotations

import re

import pytest
import torch
from gpu.ptx import compiled


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def table(request):
    return list(compiled(request.param))


def named(lines):
    return [f"{line.kernel} of {line.case}, {line.dtype}: {line}"[:300] for line in lines]


def test_every_kernel_is_in_the_table_in_every_dtype(table):
    assert {line.kernel for line in table} == {"shrink", "expand", "normalise_rows", "gate_rows", "turn_rows"}
    assert len({(line.kernel, line.dtype) for line in table}) == 15


def test_nothing_is_spilled_and_at_least_two_programs_fit_a_multiprocessor(table):
    assert named(line for line in table if line.local or line.registers > 168) == []


def test_shared_memory_stays_below_what_every_gpu_gives_without_asking(table):
    assert named(line for line in table if line.shared > 48 << 10) == []


def test_no_product_in_float32_is_rounded_to_tf32(table):
    assert named(line for line in table if line.tf32) == []


def test_products_in_16_bit_use_tensor_cores_by_small_tiles_alone(table):
    lora = [line for line in table if line.kernel in ("shrink", "expand")]

    assert named(line for line in lora if bool(line.tensor_cores) == (line.dtype is torch.float32)) == []


def test_loads_are_of_16_bytes_where_memory_is_aligned(table):
    aligned = [line for line in table if "unaligned" not in line.case]

    assert named(line for line in aligned if not line.wide) == []
    assert named(line for line in aligned if line.kernel in ("shrink", "expand") and line.narrow) == []


def test_rows_and_ranks_are_multiplied_with_strides_in_64_bits(table):
    # In triton's own language before anything is optimised: a stride is an argument, and its products are i64.
    for line in table:
        if line.kernel in ("shrink", "expand"):
            products = re.findall(r"arith\.muli (\S+), (\S+) : (\S+)", line.ttir)
            assert products
            tensors = [kind for _, _, kind in products if kind.startswith("tensor")]
            assert tensors
            assert all("i64" in kind for kind in tensors), (line.kernel, line.case, products)
