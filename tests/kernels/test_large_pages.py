"""Memory for weights: pieces of it that belong to one owner each, in large pages where the system has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorax_core.kernels.large_pages import large_pages

SIZES = [1, 63, 64, 65, 5_000_000, 31 * 2**20, 33 * 2**20 + 7, 100]


def flags_of(address):
    """The flags of the mapping that has an address, as the system keeps them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(one, 16) for one in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return rest.split()
    raise AssertionError("no such mapping")


def test_bytes_have_one_owner_and_begin_a_line_of_the_cache():
    found = [large_pages(size) for size in SIZES]
    for at, one in enumerate(found):
        one.fill_(at)

    assert [len(one) for one in found] == SIZES
    assert all(bool((one == at).all()) for at, one in enumerate(found))
    assert all(one.data_ptr() % 64 == 0 for one in found)


def test_small_ones_lie_end_to_end():
    large_pages(31 * 2**20)  # what is left of a piece is too little for the next
    first, second = large_pages(3_000_000), large_pages(3_000_000)

    assert 0 <= second.data_ptr() - first.data_ptr() - 3_000_000 < 64


@pytest.mark.parametrize("size", [3_000_000, 40_000_000])
def test_the_system_is_asked_for_large_pages(size):
    found = large_pages(size)

    flags = flags_of(found.data_ptr() + size // 2)

    assert ("hg" in flags) == Path("/sys/kernel/mm/transparent_hugepage").exists()


def test_what_was_asked_for_in_inference_mode_or_beside_another_device_may_be_changed_elsewhere():
    with torch.inference_mode(), torch.device("meta"):
        large_pages(31 * 2**20)
        large_pages(2 * 2**20)  # begins a piece
    after = large_pages(10)

    after.fill_(1)

    assert after.sum() == 10
    assert not after.is_inference()
