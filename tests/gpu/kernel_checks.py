"""What the Triton kernels are held to: one function a promise, which raises where the promise is broken.

`test_triton_*` call them over many cases, `test_planted_kernels` over kernels with a mistake in them.
"""

from __future__ import annotations

import mmap

import numpy as np
import torch
from gpu.doubles.sanitizer import watched
from torch import Tensor

from lorax_core.adapters.deltas import LowRank, RankBlock
from lorax_core.adapters.lora_kernels.base import LoraPlan, Segment, Updates
from lorax_core.adapters.lora_kernels.triton import TritonKernel
from lorax_core.kernels.elementwise import READABLE, Angles
from lorax_core.kernels.triton.elementwise import TritonElementwise
from lorax_core.modeling.activation import get_activation

CPU = torch.device("cpu")
NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest number of the result: sums in another order, or the rounding of h and of y.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def fenced(tensor: Tensor, *, pad: int = 0) -> Tensor:
    """The same numbers between others that are NaN: before, behind, and `pad` of them after each row."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    width = tensor.shape[-1] + pad
    memory = torch.full((len(rows) * width + 128,), NAN, dtype=tensor.dtype)
    if pad:
        view = memory[64 : 64 + len(rows) * width].view(len(rows), width)[:, : tensor.shape[-1]]
    else:
        view = memory[64 : 64 + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


# --- low-rank products ---


class Work:
    """Rows of a site, some of them of adapters; `runs` are `(rows, ranks of each part)`, ranks None being no adapter."""

    def __init__(self, dtype, runs, *, inputs=96, parts=(64, 32, 48), seed=0, pad=0) -> None:
        self.dtype, self.inputs, self.parts = dtype, inputs, parts
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = sum(rows for rows, _ in runs)
        self.x = fenced(self.drawn(self.rows, inputs), pad=pad)
        self.y = fenced(self.drawn(self.rows, sum(parts)), pad=pad)
        self.before = self.y.clone()
        self.segments = self.segmented(runs)

    def drawn(self, *shape) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def update(self, ranks) -> LowRank:
        """An update with so many ranks for each part; 0 leaves a part alone."""
        starts = np.cumsum([0, *ranks])
        columns = np.cumsum([0, *self.parts])
        blocks = [
            RankBlock(slice(int(start), int(start) + rank), int(column), fenced(self.drawn(rank, width)))
            for start, rank, column, width in zip(starts[:-1], ranks, columns[:-1], self.parts, strict=True)
            if rank
        ]
        return LowRank(fenced(self.drawn(sum(ranks), self.inputs) / self.inputs**0.5), tuple(blocks))

    def segmented(self, runs) -> list[Segment]:
        segments, start = [], 0
        for rows, ranks in runs:
            if ranks is not None:
                # Of one part, so that sites of an adapter differ in their number of blocks.
                other = self.update((sum(ranks), 0, 0))
                made = Updates({"other": other, "here": self.update(ranks)})
                segments.append(Segment(start, start + rows, made))
            start += rows
        return segments

    def add(self, plan: LoraPlan) -> None:
        """The products at the site, by a plan whose scratch is full of NaN, touching nothing but what is theirs."""
        launch = plan.launch
        launch.scratch.fill_(NAN)
        held = [tensor for table in plan.tables for tensor in (table.table, *table.held)]
        with watched(self.x, self.y, launch.tiles, launch.scratch, *held):
            plan.add("here", self.x, self.y)

    def check(self, segments) -> None:
        """y is what it was and the products of these segments, in 64 bit."""
        expected = self.before.double()
        ours = torch.zeros(self.rows, dtype=torch.bool)
        for segment in segments:
            rows, update = slice(segment.start, segment.stop), segment.updates.by_site["here"]
            ours[rows] = True
            for block in update.blocks:
                h = self.x[rows].double() @ update.a[block.ranks].double().t()
                expected[rows, block.columns] += h @ block.b.double()
        error = float((self.y.double() - expected).abs().max() / expected.abs().max())
        assert error < BOUND[self.dtype], f"off by {error:.1e}"
        assert torch.equal(self.y[~ours], self.before[~ours]), "rows of no adapter were changed"


def check_lora(dtype=torch.bfloat16, runs=((3, (5, 0, 7)), (2, None), (20, (33, 2, 1))), **options) -> None:
    """Ragged ranks, several blocks, rows of no adapter, NaN in all memory that is nobody's."""
    work = Work(dtype, runs, **options)
    work.add(TritonKernel(CPU).plan(work.segments))
    work.check(work.segments)


def check_lora_split() -> None:
    """Sums over K that are split between programs."""
    check_lora(torch.float32, ((2, (4, 3, 20)), (1, (0, 0, 1))), inputs=2176)


def check_lora_unaligned() -> None:
    """Widths, columns and addresses that no wide load may touch."""
    check_lora(torch.float16, ((3, (5, 1, 7)), (1, None)), inputs=33, parts=(7, 13, 5))


# --- elementwise ---

X_ROWS, X_WIDTH = 7, 896


def drawn(*shape, dtype, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(found: Tensor, expected: Tensor) -> float:
    """How far apart, of the size of the expected."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(difference)


def check_norms(dtype=torch.bfloat16, width=X_WIDTH, rows=X_ROWS) -> None:
    """The sum equals the readable one to the bit; the norm but for one rounding in a thousand, when 16 bit."""
    kernels = TritonElementwise()
    x, residual = (fenced(t, pad=8) for t in drawn(2, rows, width, dtype=dtype))
    weight, bias = (fenced(t) for t in drawn(2, width, dtype=dtype, seed=1))
    calls = [
        ("add_rms_norm", (weight, 1e-6)),
        ("add_rms_norm", (weight, 1e-6, 1.0)),
        ("add_layer_norm", (weight, bias, 1e-5)),
        ("add_layer_norm", (weight, None, 1e-5)),
        ("add_layer_norm", (None, None, 1e-5)),
    ]
    for name, rest in calls:
        with watched(x, residual, weight, bias):
            normed, total = getattr(kernels, name)(x, residual, *rest)
        expected, expected_total = getattr(READABLE, name)(x, residual, *rest)
        assert torch.equal(total, expected_total), f"{name}: another sum"
        _same_but_for_roundings(name, normed, expected)
        alone = getattr(kernels, name.removeprefix("add_"))(total, *rest)
        assert torch.equal(alone, normed), f"{name}: another norm without the sum"


def _same_but_for_roundings(name: str, found: Tensor, expected: Tensor) -> None:
    if found.dtype is torch.float32:
        assert off(found, expected) < 2e-7, f"{name} is off by {off(found, expected):.1e}"
        return
    others = float((found != expected).float().mean())
    # Where a sum in another order rounds the other way, it is by one unit: 2^-8 of bfloat16, 2^-11 of float16.
    furthest = float(((found.double() - expected.double()).abs() / expected.double().abs().clamp_min(1e-3)).max())
    assert others < 5e-3, f"{name}: {others:.1e} of the numbers are others"
    assert furthest <= 2 * torch.finfo(found.dtype).eps, f"{name}: a number is off by {furthest:.1e}"


def check_rotation(dtype=torch.bfloat16, heads=6, kv_heads=2, dim=24, half=8, rows=5) -> None:
    """Equal to the readable form to the bit, in the cache too; other pages stay as they were."""
    kernels = TritonElementwise()
    qkv = fenced(drawn(rows, (heads + 2 * kv_heads) * dim, dtype=dtype), pad=16).unflatten(1, (-1, dim))
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    angles = Angles(*(fenced(t) for t in drawn(2, rows, 1, half, dtype=dtype, seed=1))) if half else None
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(2))[:rows]
    caches, expected = ([drawn(5, 4, kv_heads, dim, dtype=dtype, seed=3 + n) for n in (0, 1)] for _ in range(2))
    with watched(qkv, *(angles or ()), slots, *caches):
        turned = kernels.rotate_and_store(q, k, v, angles, *caches, slots)

    assert torch.equal(turned, READABLE.rotate_and_store(q, k, v, angles, *expected, slots)), "other queries"
    assert all(torch.equal(cache, other) for cache, other in zip(caches, expected, strict=True)), "another cache"
    if angles is not None:
        with watched(qkv, *angles):
            found = kernels.rotate(q, k, angles)
        assert all(map(torch.equal, found, READABLE.rotate(q, k, angles))), "another rotation without a cache"


def check_no_slot() -> None:
    """A row whose slot is below 0 is stored nowhere."""
    q, k, v = drawn(3, 3, 1, 8, dtype=torch.bfloat16)
    caches = torch.zeros(2, 2, 4, 1, 8, dtype=torch.bfloat16)
    angles = Angles(*drawn(2, 3, 1, 4, dtype=torch.bfloat16))
    slots = torch.tensor([2, -1, 5])
    with watched(q, k, v, *angles, slots, *caches):
        TritonElementwise().rotate_and_store(q, k, v, angles, *caches, slots)

    assert caches.flatten(1, 2)[:, [0, 1, 3, 4, 6, 7]].count_nonzero() == 0
    assert caches.flatten(1, 2)[:, [2, 5]].count_nonzero() > 0


def check_gate(dtype=torch.bfloat16, act="silu", width=300, rows=5) -> None:
    """Equal to the readable form to the bit where `act` is SiLU or ReLU in bfloat16; near it else."""
    gate_up = fenced(4 * drawn(rows, 2 * width, dtype=dtype), pad=4)
    act = get_activation(act)
    with watched(gate_up):
        found = TritonElementwise().gated_act(gate_up, act)
    expected = READABLE.gated_act(gate_up, act)

    if act.name == "relu" or (act.name == "silu" and dtype is torch.bfloat16):
        assert torch.equal(found, expected)
    assert off(found, expected) < {torch.float32: 1e-7, torch.bfloat16: 1e-5, torch.float16: 1e-5}[dtype]


# --- offsets past 2^31 ---


def sparse(numbers: int, dtype: torch.dtype) -> Tensor:
    """So many zeros, of which memory holds those that are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, numbers * dtype.itemsize, flags), dtype=dtype)


FAR = 2**30 + 16  # the third row of this stride begins past 2^31


def far_rows(rows: Tensor) -> Tensor:
    """The same three rows, far apart."""
    far = sparse(2 * FAR + rows.shape[1], rows.dtype).as_strided(rows.shape, (FAR, 1))
    return far.copy_(rows)


def check_far_rows() -> None:
    """Rows of x and y, of a norm and of a gate, that lie past 2^31 numbers."""
    work = Work(torch.bfloat16, ((3, (4, 4, 4)),))
    work.x, work.y = far_rows(work.x), far_rows(work.y)
    work.add(TritonKernel(CPU).plan(work.segments))
    work.check(work.segments)
    kernels = TritonElementwise()
    x = far_rows(drawn(3, 64, dtype=torch.bfloat16))
    with watched(x):
        found = kernels.add_layer_norm(x, x, None, None, 1e-5), kernels.gated_act(x, get_activation("silu"))
    assert torch.equal(found[0][1], 2 * x)
    assert torch.equal(found[1], READABLE.gated_act(x, get_activation("silu")))


def check_far_slots() -> None:
    """Slots of a cache that lie past 2^31 numbers."""
    pages = 2**31 // (4 * 2 * 64) + 1
    caches = [sparse(pages * 4 * 2 * 64, torch.bfloat16).view(pages, 4, 2, 64) for _ in range(2)]
    q, k, v = drawn(3, 1, 2, 64, dtype=torch.bfloat16)
    slots = torch.tensor([4 * pages - 2])
    with watched(q, k, v, slots, *caches):
        TritonElementwise().rotate_and_store(q, k, v, None, *caches, slots)

    assert torch.equal(caches[0].view(-1, 2, 64)[-2], k[0])
    assert torch.equal(caches[1].view(-1, 2, 64)[-2], v[0])
