"""Random steps, computed by a backend in 16 bit and by the torch backend in float32."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorax_core.attention.base import AttentionBackend, AttentionSpec, GraphAttention, HostAndDevice, StepAttention
from lorax_core.attention.torch import TorchBackend
from lorax_core.kernels.elementwise import READABLE, Elementwise
from lorax_core.kvcache.pool import KVPool


@dataclass
class Rows:
    """What a backend must know of the rows of a step."""

    query_starts: HostAndDevice
    kv_lengths: HostAndDevice
    page_table: HostAndDevice | None
    slots: Tensor | None


@dataclass(frozen=True)
class Layer:
    """One layer of a model."""

    index: int
    spec: AttentionSpec
    elementwise: Elementwise = READABLE


def both(numbers: Tensor) -> HostAndDevice:
    """Numbers on the host, and a copy that stands for the device's."""
    return HostAndDevice(numbers, numbers.clone())


class Step:
    """Sequences `(tokens in the cache, new tokens)` of random numbers, their pages strewn over a cache of others' numbers.

    One layer of each spec; all share the key heads and the size of heads.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        sizes: Sequence[tuple[int, int]],
        *,
        page_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        kv_dtype: torch.dtype | None = None,
        scales: Sequence[tuple[float, float]] | None = None,
        pages: int = 64,
        width: int | None = None,
        seed: int = 0,
    ) -> None:
        self.layers = [Layer(i, spec) for i, spec in enumerate(specs)]
        self.sizes, self.page_size, self.dtype, self.kv_dtype = list(sizes), page_size, dtype, kv_dtype or dtype
        self.scales, self.pages = scales, pages
        numbers = torch.Generator().manual_seed(seed)
        spec, rows = specs[0], sum(new for _, new in sizes)

        def some(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=numbers).to(dtype)

        self.q = [some(rows, one.heads, one.head_dim) for one in specs]
        self.k, self.v = ([some(rows, spec.kv_heads, spec.head_dim) for _ in specs] for _ in range(2))
        self.past = [[[some(past, spec.kv_heads, spec.head_dim) for _ in range(2)] for past, _ in sizes] for _ in specs]
        self.rows = self._rows(seed, width)

    @property
    def causal(self) -> bool:
        return self.layers[0].spec.causal

    def _rows(self, seed: int, width: int | None) -> Rows:
        starts = torch.tensor([0, *itertools.accumulate(new for _, new in self.sizes)], dtype=torch.int32)
        totals = [past + new for past, new in self.sizes]
        lengths = torch.tensor(totals, dtype=torch.int32)
        self.held: list[list[int]] = []
        if not self.causal:
            return Rows(both(starts), both(lengths), None, None)
        free = random.Random(seed).sample(range(1, self.pages), self.pages - 1)
        for total in totals:
            self.held.append([free.pop() for _ in range(-(-total // self.page_size))])
        most = width or max(map(len, self.held))
        table = torch.tensor([[*held, *[0] * (most - len(held))] for held in self.held], dtype=torch.int32)
        slots = [self.slot(i, at) for i, (past, new) in enumerate(self.sizes) for at in range(past, past + new)]
        return Rows(both(starts), both(lengths), both(table), torch.tensor(slots))

    def slot(self, sequence: int, at: int) -> int:
        return self.held[sequence][at // self.page_size] * self.page_size + at % self.page_size

    def pool(self, dtype: torch.dtype) -> KVPool | None:
        """The cache as it is before the step."""
        if not self.causal:
            return None
        spec = self.layers[0].spec
        sizes = {"layers": len(self.layers), "pages": self.pages, "page_size": self.page_size}
        heads = {"kv_heads": spec.kv_heads, "head_dim": spec.head_dim}
        pool = KVPool(**sizes, **heads, dtype=dtype, device="cpu", scales=self.scales)
        pool.data.fill_(40.0)  # whoever reads it gives an answer that is far off
        pool.data.view(torch.uint8 if dtype.itemsize == 1 else dtype)[:, :, 0] = 0
        self.fill(pool)
        return pool

    def fill(self, pool: KVPool) -> None:
        """Write what the sequences have in the cache already."""
        for layer, past in zip(self.layers, self.past, strict=True):
            for sequence, (k, v) in enumerate(past):
                pool.write(layer.index, k, v, torch.tensor([self.slot(sequence, at) for at in range(len(k))]).long())

    def bound(self, backend: AttentionBackend, pool: KVPool | None) -> AttentionBackend:
        backend.bind([layer.spec for layer in self.layers], self.dtype, pool)
        return backend

    def run(self, step: StepAttention) -> list[Tensor]:
        """What each layer answers."""
        return [
            step.forward(layer, *numbers) for layer, *numbers in zip(self.layers, self.q, self.k, self.v, strict=True)
        ]

    def by(self, backend: AttentionBackend, plan: Callable[[StepAttention], None] = lambda step: None) -> list[Tensor]:
        """What the layers answer by a backend. `plan` may change the planned step before it runs."""
        step = self.bound(backend, self.pool(self.kv_dtype)).plan(self.rows)
        plan(step)
        return self.run(step)

    def expected(self) -> list[Tensor]:
        """What they answer by the torch backend in float32."""
        backend = TorchBackend()
        pool = self.pool(self.kv_dtype if self.kv_dtype.itemsize == 1 else torch.float32)
        backend.bind([layer.spec for layer in self.layers], torch.float32, pool)
        step = backend.plan(self.rows)
        return [
            step.forward(layer, *(one.float() for one in numbers))
            for layer, *numbers in zip(self.layers, self.q, self.k, self.v, strict=True)
        ]

    def insist(self, answers: Sequence[Tensor], rows: slice = slice(None)) -> None:
        """Raise AssertionError where an answer is further from the expected one than 16 bit explain."""
        for ours, theirs in zip(answers, self.expected(), strict=True):
            assert ours.dtype is self.dtype
            torch.testing.assert_close(ours[rows].float(), theirs[rows], rtol=2e-2, atol=1e-2)


def graph_of(backend: AttentionBackend, step: Step) -> GraphAttention:
    """A planned graph for steps of this shape; raises AssertionError with the reason when there is none."""
    planned = backend.plan_graph(step.rows)
    assert isinstance(planned, GraphAttention), planned
    return planned
