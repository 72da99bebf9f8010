from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from lorax_core.kvcache.pool import KVPool


def make_pool(**changes):
    sizes = {
        "layers": 3,
        "pages": 5,
        "page_size": 4,
        "kv_heads": 2,
        "head_dim": 6,
        "dtype": torch.float32,
        "device": "cpu",
    }
    return KVPool(**{**sizes, **changes})


def held_bytes():
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()


def make_rows(count, seed):
    return torch.randn(count, 2, 6, generator=torch.Generator().manual_seed(seed))


def test_what_is_written_at_a_slot_is_read_at_its_page_and_offset():
    pool = make_pool()
    k, v = make_rows(3, 1), make_rows(3, 2)

    pool.write(1, k, v, torch.tensor([4 * 3 + 2, 0, 4 * 4 + 3]))

    keys, values = pool.layer(1)
    assert torch.equal(torch.stack([keys[3, 2], keys[0, 0], keys[4, 3]]), k)
    assert torch.equal(torch.stack([values[3, 2], values[0, 0], values[4, 3]]), v)


def test_a_write_touches_its_slots_alone():
    pool = make_pool()

    pool.write(2, make_rows(1, 1), make_rows(1, 2), torch.tensor([7]))

    assert pool.data.count_nonzero() == 2 * 2 * 6
    assert pool.layer(0)[0].count_nonzero() == 0


def test_rows_of_another_dtype_are_stored_in_the_caches():
    pool = make_pool(dtype=torch.bfloat16)
    k = make_rows(1, 1)

    pool.write(0, k, k, torch.tensor([5]))

    assert torch.equal(pool.layer(0)[0][1, 1], k[0].bfloat16())


def test_the_layout_is_that_of_the_design_and_told_in_bytes():
    pool = make_pool()

    assert pool.data.shape == (3, 2, 5, 4, 2, 6)
    assert pool.nbytes == 3 * 2 * 5 * 4 * 2 * 6 * 4


def test_pages_are_copied_whole_in_every_layer():
    pool = make_pool()
    pool.data.normal_(generator=torch.Generator().manual_seed(0))
    before = pool.data.clone()

    pool.copy([(1, 3), (4, 2)])

    assert torch.equal(pool.data[:, :, [3, 2]], before[:, :, [1, 4]])
    assert torch.equal(pool.data[:, :, [0, 1, 4]], before[:, :, [0, 1, 4]])


def test_a_page_that_is_cleared_holds_nothing_and_others_hold_on():
    pool = make_pool()
    pool.data.fill_(torch.nan)

    pool.zero([1, 4])

    assert pool.data[:, :, [1, 4]].count_nonzero() == 0
    assert pool.data[:, :, [0, 2, 3]].isnan().all()


def test_an_8_bit_cache_gives_back_what_its_type_can_hold():
    pool = make_pool(dtype=torch.float8_e4m3fn, scales=[(1.0, 1.0), (0.5, 4.0), (1.0, 1.0)])
    k, v = make_rows(2, 1), make_rows(2, 2) * 100
    v[0, 0, 0] = 1e6  # more than 448 * 4, where the type ends

    pool.write(1, k, v, torch.tensor([5, 9]))
    keys, values = pool.gather(1, torch.tensor([1, 2]), torch.float32)

    torch.testing.assert_close(torch.stack([keys[0, 1], keys[1, 1]]), k, rtol=0.07, atol=0.01)
    torch.testing.assert_close(torch.stack([values[0, 1], values[1, 1]]), v.clamp(max=448 * 4), rtol=0.07, atol=0.1)
    assert pool.nbytes == 3 * 2 * 5 * 4 * 2 * 6


def test_gathered_pages_are_those_asked_for_in_that_order():
    pool = make_pool()
    pool.data.normal_(generator=torch.Generator().manual_seed(0))
    pages = torch.tensor([[3, 1], [1, 0]])

    keys, values = pool.gather(2, pages, torch.float32)

    assert torch.equal(keys, pool.data[2, 0][pages])
    assert torch.equal(values, pool.data[2, 1][pages])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how much memory a process holds")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_pool_takes_memory_when_it_is_written(dtype):
    before = held_bytes()

    pool = make_pool(pages=200_000, dtype=dtype)

    taken = held_bytes() - before
    assert pool.nbytes > 50e6
    assert taken < pool.nbytes / 5
    assert pool.data.data_ptr() % 64 == 0
    assert not pool.gather(2, torch.tensor([[199_999]]), torch.float32)[0].any()
