from __future__ import annotations

import gc
import random
import weakref
from typing import NamedTuple

import pytest
import torch
from gpu.doubles.streams import Cuda
from gpu.doubles.triton_driver import pretend_gpu
from gpu.kernel_checks import (
    CPU,
    DTYPES,
    Work,
    check_far_rows,
    check_lora,
    check_lora_split,
    check_lora_unaligned,
)

from lorax_core.adapters.deltas import LowRank, RankBlock
from lorax_core.adapters.lora_kernels.base import Segment, Updates
from lorax_core.adapters.lora_kernels.select import wrong_numbers
from lorax_core.adapters.lora_kernels.triton import CAPTURED_RANKS, TritonKernel
from lorax_core.kernels.gpu import Branch

SITES = {"other": (96, 144), "here": (96, 144)}


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def gpu(request):
    with pretend_gpu(request.param) as made:
        yield made


def random_runs(seed, rows):
    """Runs that make so many rows: ranks of 1 to 100, parts left alone, rows of no adapter."""
    drawn, runs = random.Random(seed), []
    while rows:
        count = min(rows, drawn.choice((1, 2, 15, 16, 17, 40, 100)))
        ranks = [drawn.choice((0, 1, 4, 8, 16, 33, 100)) for _ in range(3)]
        runs.append((count, tuple(ranks) if any(ranks) and drawn.random() < 0.8 else None))
        rows -= count
    return [*runs, (1, (1, 0, 0))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 31, 100])
def test_products_are_those_of_64_bits_whatever_the_ranks_and_rows(gpu, dtype, rows):
    check_lora(dtype, random_runs(rows, rows), seed=rows, pad=16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_many_rows_has_a_form_of_its_own(dtype):
    with pretend_gpu(90):
        check_lora(dtype, [(150, (8, 100, 0)), (7, None), (143, (1, 2, 3))])


def test_sums_that_programs_share_are_added_up_again(gpu):
    check_lora_split()


def test_widths_that_are_no_multiple_of_anything_are_computed_too(gpu):
    check_lora_unaligned()


def test_rows_past_two_to_the_31_numbers_are_found(gpu):
    check_far_rows()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_house_s_own_trial_of_kernels_finds_nothing(gpu, dtype):
    assert wrong_numbers(TritonKernel(CPU), dtype, CPU) is None


def test_the_same_step_gives_the_same_bits_and_a_row_those_that_it_has_alone(gpu):
    work = Work(torch.bfloat16, ((5, (9, 0, 3)), (4, (8, 8, 8))), inputs=2176)
    kernel = TritonKernel(CPU)
    segments = work.segments
    work.add(kernel.plan(segments))
    first, work.y = work.y.clone(), work.before.clone()
    work.add(kernel.plan(segments))
    again = work.y.clone()
    alone = work.before[6:7].clone()

    kernel.plan([Segment(0, 1, segments[1].updates)]).add("here", work.x[6:7], alone)

    assert torch.equal(first, again)
    assert torch.equal(alone[0], first[6])


def test_rows_of_another_dtype_than_the_adapters_are_refused(gpu):
    work = Work(torch.bfloat16, ((2, (4, 4, 4)),))
    plan = TritonKernel(CPU).plan(work.segments)

    with pytest.raises(RuntimeError, match=r"here computes in torch.float32, its adapters in torch.bfloat16"):
        plan.add("here", work.x.float(), work.y.float())


def test_a_site_that_no_adapter_of_the_step_changes_costs_no_launch(gpu):
    work = Work(torch.bfloat16, ((2, (4, 4, 4)),))
    kernel = TritonKernel(CPU)
    kernel.number("never seen")

    plan = kernel.plan(work.segments)
    plan.add("never seen", work.x, work.y)
    plan.add("unheard of", work.x, work.y)

    assert gpu.launches == []
    assert torch.equal(work.y, work.before)


def test_an_adapter_of_fewer_sites_is_left_alone_at_others(gpu):
    work = Work(torch.bfloat16, ((2, (4, 4, 4)), (3, (2, 0, 0))))
    poor = Updates({"other": work.segments[0].updates.by_site["other"]})

    # The number of "here" is past the end of its table.
    work.add(TritonKernel(CPU).plan([Segment(0, 2, poor), work.segments[1]]))

    work.check(work.segments[1:])


@pytest.mark.parametrize("column_major", ["x", "y"])
def test_rows_that_lie_column_by_column_are_computed_too(gpu, column_major):
    work = Work(torch.bfloat16, ((2, (4, 4, 4)), (1, None)))
    turned = getattr(work, column_major).t().contiguous().t()
    setattr(work, column_major, turned)

    TritonKernel(CPU).plan(work.segments).add("here", work.x, work.y)

    work.check(work.segments)


def test_nothing_is_compiled_when_adapters_ranks_and_rows_change(gpu):
    kernel = TritonKernel(CPU)
    for runs in (((4, (8, 8, 8)),), ((300, (8, 8, 8)),)):  # each form once
        work = Work(torch.bfloat16, runs)
        work.add(kernel.plan(work.segments))
    gpu.compiled.clear()

    for seed, rows in enumerate((1, 2, 15, 16, 17, 257, 300)):
        runs = random_runs(seed, rows)
        work = Work(torch.bfloat16, runs, seed=seed)
        for number in range(17):  # sites by numbers that triton likes to specialise on: 0, 1, 16
            kernel.number(f"site {seed}.{number}")
        plan = kernel.plan(work.segments)
        plan.add("other", work.x, work.y.clone())
        work.add(plan)

    assert gpu.compiled == []


# --- captured steps ---


def make_graph(kernel, work, rows=24):
    graph = kernel.plan_graph(rows, SITES)
    graph.launch.scratch.fill_(float("nan"))
    return graph


def test_adapters_come_and_go_in_memory_that_stays_where_it_is(gpu):
    steps = [
        ((3, (5, 0, 7)), (2, None), (19, (33, 2, 1))),
        ((24, None),),
        ((1, (100, 100, 100)), (1, (1, 0, 0)), (1, None), (1, (8, 8, 8))),
        ((24, (16, 16, 16)),),
    ]
    kernel = TritonKernel(CPU)
    work = Work(torch.bfloat16, ((24, None),))
    graph = make_graph(kernel, work)
    graph.set([])
    work.add(graph)
    captured = graph.launch.tiles.data_ptr(), graph.launch.scratch.data_ptr()
    gpu.compiled.clear()

    for runs in steps:
        segments = work.segmented(runs)
        assert graph.fits(segments) is None
        graph.set(segments)
        work.y.copy_(work.before)
        work.add(graph)
        work.check(segments)

    assert gpu.compiled == []
    assert len(gpu.launches) == 2 * (1 + len(steps))
    assert (graph.launch.tiles.data_ptr(), graph.launch.scratch.data_ptr()) == captured


def test_adapters_live_as_long_as_tiles_point_to_them():
    work = Work(torch.bfloat16, ((3, (4, 4, 4)),))
    kernel = TritonKernel(CPU)
    graph, plan = make_graph(kernel, work), kernel.plan(work.segments)
    graph.set(work.segments)
    lives = weakref.ref(work.segments[0].updates.by_site["here"].a)
    work.segments.clear()

    del plan
    gc.collect()
    assert lives() is not None
    graph.set([])
    gc.collect()
    assert lives() is None


def unaligned(update, what="B"):
    """The same update, its A or B one number off."""

    def moved(tensor):
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return memory[1:].view(tensor.shape).copy_(tensor)

    if what == "A":
        return LowRank(moved(update.a), update.blocks)
    return LowRank(update.a, tuple(RankBlock(block.ranks, block.column, moved(block.b)) for block in update.blocks))


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("rows", "more rows with adapters than were captured"),
        ("site", "an adapter of a layer that was not captured"),
        ("rank", f"an adapter of a rank above {CAPTURED_RANKS}, the most that captured steps hold"),
        ("alignment of A", "an adapter whose memory is not aligned, as captured steps load it"),
        ("alignment of B", "an adapter whose memory is not aligned, as captured steps load it"),
        ("dtype", "an adapter in torch.float32, where torch.bfloat16 was captured"),
    ],
)
def test_what_captured_steps_have_no_room_for_does_not_fit_and_says_why(case, told):
    work = Work(torch.bfloat16, ((3, (4, 4, 4)),))
    kernel = TritonKernel(CPU)
    graph = make_graph(kernel, work)
    with pretend_gpu(90):
        graph.add("here", torch.zeros(24, 96, dtype=torch.bfloat16), torch.zeros(24, 144, dtype=torch.bfloat16))
    by_site = dict(work.segments[0].updates.by_site)
    changes = {
        "site": lambda: by_site | {"elsewhere": by_site["here"]},
        "rank": lambda: by_site | {"here": work.update((400, 400, 400))},
        "alignment of A": lambda: by_site | {"here": unaligned(by_site["here"], "A")},
        "alignment of B": lambda: by_site | {"here": unaligned(by_site["here"], "B")},
        "dtype": lambda: dict(Work(torch.float32, ((3, (4, 4, 4)),)).segments[0].updates.by_site),
    }
    updates = Updates(changes[case]() if case in changes else by_site)
    start = 22 if case == "rows" else 0
    segments = [Segment(start, start + 3, updates)]

    # The whole reason: steps are counted by it, so no path and no size of an adapter may be in it.
    assert graph.fits(segments) == told
    with pytest.raises(RuntimeError, match="captured steps cannot replay"):
        graph.set(segments)


@pytest.mark.parametrize("what", ["A", "B"])
def test_an_update_that_is_not_aligned_is_computed_outside_captured_steps(gpu, what):
    work = Work(torch.bfloat16, ((3, (4, 4, 4)),))
    moved = Updates({"here": unaligned(work.segments[0].updates.by_site["here"], what)})
    work.segments = [Segment(0, 3, moved)]

    work.add(TritonKernel(CPU).plan(work.segments))

    work.check(work.segments)


@pytest.mark.parametrize("first", [0, 1], ids=["before", "behind"])
def test_one_update_that_is_not_aligned_ends_wide_loads_for_its_step(gpu, first):
    work = Work(torch.bfloat16, ((3, (4, 4, 4)), (2, (8, 8, 8))))
    segments = work.segments
    moved = Updates({"here": unaligned(segments[first].updates.by_site["here"])})
    segments[first] = Segment(segments[first].start, segments[first].stop, moved)

    work.add(TritonKernel(CPU).plan(segments))

    work.check(segments)


class Launched(NamedTuple):
    """Stands for the two launches of a site: words on the current stream of a double of `torch.cuda`."""

    cuda: Cuda

    def shrink(self, site, rank, x, *, aligned):
        self.cuda.launch(f"shrink {site}")

    def expand(self, site, x, y, *, aligned):
        self.cuda.launch(f"expand {site}")


def test_captured_steps_launch_the_first_product_beside_the_base_layer_and_the_second_after_both():
    cuda = Cuda()
    kernel = TritonKernel(CPU, Branch(CPU, cuda))
    plan = kernel.plan_graph(4, {"first": (8, 8), "second": (8, 8)})
    plan.launch = Launched(cuda)
    x = torch.zeros(4, 8)
    main = cuda.current

    cuda.launch("norm")
    plan.start("first", x)
    beside = kernel._branch._stream
    assert (beside.before, main.before) == (["norm", "shrink 0"], ["norm"])
    cuda.launch("base")
    plan.add("first", x, x)
    assert main.before[-1] == "expand 0"
    assert {"base", "shrink 0"} < set(main.before[:-1])
    plan.add("second", x, x)  # one that nobody started

    # h is one memory for all sites: the second site's is written when the first site's was read.
    assert beside.before.index("expand 0") < beside.before.index("shrink 1")
    assert main.before.index("shrink 1") < main.before.index("expand 1")


def test_captured_steps_take_the_adapters_of_each_step(gpu):
    work = Work(torch.bfloat16, ((2, (8, 8, 8)), (2, (4, 0, 16))))
    one, other = (segment.updates for segment in work.segments)
    kernel = TritonKernel(CPU)
    plan = kernel.plan_graph(8, SITES)
    rows = [
        [Segment(0, 2, one), Segment(2, 4, other)],
        [Segment(0, 2, one), Segment(2, 4, one)],  # the same rows, of another adapter
        [Segment(0, 2, other), Segment(2, 4, one)],
        [Segment(0, 1, other), Segment(2, 4, one)],
    ]

    for segments in rows:
        plan.set(segments)
        x, y = torch.ones(8, 96, dtype=torch.bfloat16), torch.zeros(8, 144, dtype=torch.bfloat16)
        plan.add("here", x, y)

        expected = torch.zeros(8, 144, dtype=torch.bfloat16)
        kernel.plan(segments).add("here", x, expected)
        assert torch.equal(y, expected), segments


def test_what_captured_steps_read_beside_the_base_layer_is_held_until_it_was_read(gpu):
    kernel = TritonKernel(CPU)
    plan = kernel.plan_graph(4, {"here": (96, 144)})
    x = torch.ones(96, 4, dtype=torch.bfloat16).t()  # its rows are copied first

    plan.start("here", x)
    copied = weakref.ref(plan._reads)

    assert copied().is_contiguous()
    plan.add("here", x, torch.zeros(4, 144, dtype=torch.bfloat16))
    gc.collect()
    assert copied() is None
