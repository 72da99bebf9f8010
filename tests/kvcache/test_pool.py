from __future__ import annotations

import torch

from lorax_core.kvcache.pool import KVPool


def make_pool(**changes):
    sizes = {"layers": 3, "pages": 5, "page_size": 4, "kv_heads": 2, "head_dim": 6, "dtype": torch.float32, "device": "cpu"}
    return KVPool(**{**sizes, **changes})


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
