from __future__ import annotations

import gc
import weakref

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorax_core.adapters.apply import AdapterRowsMaker
from lorax_core.adapters.base import Bound
from lorax_core.adapters.deltas import LowRank, TokenLogits
from lorax_core.modeling import Linear
from lorax_core.modeling.site import NoAdapters


def make_bound(seed, rank, paths=("here",)):
    """An adapter of random numbers that changes the layers called so."""
    generator = torch.Generator().manual_seed(seed)
    return Bound(
        {
            path: (LowRank.whole(torch.randn(rank, 5, generator=generator), torch.randn(3, rank, generator=generator)),)
            for path in paths
        }
    )


ADAPTERS = [None, make_bound(1, rank=2), make_bound(2, rank=1), make_bound(3, rank=4, paths=("elsewhere",))]


def make_site(path="here"):
    site = Linear(5, 3)
    site.path = path
    return site


def changed_row_by_row(counts, adapters, x, y, path):
    """The oracle: each row by itself."""
    rows = [adapter for count, adapter in zip(counts, adapters, strict=True) for _ in range(count)]
    expected = y.clone()
    for at, adapter in enumerate(rows):
        if adapter is not None and path in adapter.deltas:
            (delta,) = adapter.deltas[path]
            expected[at] += delta.blocks[0].b.t() @ (delta.a @ x[at])
    return expected


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, len(ADAPTERS) - 1)), max_size=6),
    st.sampled_from(["here", "elsewhere", "nowhere"]),
)
def test_every_row_gets_its_own_adapter_and_no_other(runs, path):
    counts, adapters = [count for count, _ in runs], [ADAPTERS[at] for _, at in runs]
    x, y = torch.randn(sum(counts), 5), torch.randn(sum(counts), 3)
    expected = changed_row_by_row(counts, adapters, x, y, path)

    changed = AdapterRowsMaker().rows(counts, adapters).apply(make_site(path), x, y.clone())

    torch.testing.assert_close(changed, expected)


def test_runs_of_one_adapter_are_one_product():
    one, other = ADAPTERS[1], ADAPTERS[2]

    rows = AdapterRowsMaker().rows([2, 3, 1, 0, 4], [one, one, other, None, other])

    assert [(run.start, run.stop, run.bound) for run in rows.runs] == [
        (0, 5, one),
        (5, 10, other),
    ]


def test_the_base_alone_pays_nothing():
    y = torch.randn(4, 3)

    rows = AdapterRowsMaker().rows([4], [None])

    assert isinstance(rows, NoAdapters)
    assert rows.apply(make_site(), torch.randn(4, 5), y) is y


def test_a_layer_that_no_adapter_changes_is_left_alone():
    y = torch.randn(2, 3)

    assert AdapterRowsMaker().rows([2], [ADAPTERS[3]]).apply(make_site(), torch.randn(2, 5), y) is y


def test_new_rows_of_a_head_keep_its_bias():
    site, x = make_site(), torch.randn(4, 5)
    site.bias = torch.nn.Parameter(torch.tensor([10.0, 20.0, 30.0]), requires_grad=False)
    ids, rows, y = torch.tensor([0, 2]), torch.randn(2, 5), torch.zeros(4, 3)

    TokenLogits(ids, rows).apply(site, x, y)

    expected = torch.zeros(4, 3)
    expected[:, 0], expected[:, 2] = x @ rows[0] + 10, x @ rows[1] + 30
    torch.testing.assert_close(y, expected)


def test_steps_alike_share_their_rows_until_an_adapter_comes_back_with_other_numbers():
    maker, (_, one, other, _) = AdapterRowsMaker(), ADAPTERS
    first = maker.rows([2, 1], [one, other])
    maker.start_step()
    assert maker.rows([2, 1], [one, other]) is first
    assert maker.rows([1, 2], [one, other]) is not first

    maker.start_step()
    again = make_bound(1, rank=2)  # it was evicted and bound again
    assert maker.rows([2, 1], [again, other]) is not first
    assert maker.rows([2, 1], [again, other]).apply(make_site(), torch.ones(3, 5), torch.zeros(3, 3)).isfinite().all()


def test_an_adapter_that_was_unbound_is_freed_after_a_step_without_it():
    maker, bound = AdapterRowsMaker(), make_bound(5, rank=2)
    maker.rows([2], [bound])
    gone = weakref.ref(bound)

    del bound
    for _ in range(2):
        maker.start_step()
        maker.rows([2], [ADAPTERS[1]])
    gc.collect()

    assert gone() is None
