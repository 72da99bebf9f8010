"""Attention of our own on a CPU: sequences that bring few rows are computed straight off the pages, in one call for a layer.

Decides which sequences those are, by their number of rows; long prompts are left to the torch backend, whose products reuse
each key for many rows. Bits do not depend on what else is in a step, except for how keys are shared among threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lorax_core.attention.base import (
    AttentionBackend,
    AttentionLayer,
    AttentionRows,
    AttentionSpec,
    CacheLayout,
    CacheRows,
    KVCache,
    PagedStep,
    StepAttention,
)
from lorax_core.attention.torch import PAGE_SIZE, TorchBackend
from lorax_core.kernels.elementwise import Angles
from lorax_core.kernels.native.attention import (
    AttentionWork,
    PagedAttention,
    Shape,
    load_attention,
    make_jobs,
    scratch_size,
)
from lorax_core.kernels.native.compiler import find_compiler
from lorax_core.settings import Settings

FEW_ROWS = 8
"""Sequences with at most so many rows in a step are computed natively: decoding rows with their drafts, and short chunks."""


class NativeStep(PagedStep):
    """One step of `NativeBackend`; `rest` computes the sequences with many rows, None when there are none."""

    def __init__(
        self,
        backend: NativeBackend,
        rows: AttentionRows,
        work: dict[int | None, AttentionWork],
        rest: StepAttention | None,
    ) -> None:
        super().__init__(backend.cache, rows.slots)
        self._backend = backend
        self._table = rows.page_table  # kept: jobs point into it; not the rows, which hold this step
        self._work = work
        self._rest = rest

    def forward(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, angles: Angles | None = None) -> Tensor:
        to = self.cache_rows(layer) if layer.spec.causal else None
        if to is None or q.dtype is not k.dtype or q.dtype is not to.k.dtype:
            return super().forward(layer, q, k, v, angles)
        shape, product = self._backend.shape(layer), self._backend.product
        if self._rest is not None:
            return self.attend(layer, product.append(shape, q, k, v, angles, (to.k, to.v), to.slots))
        work = self._work[layer.spec.window]
        return product.append_and_attend(shape, q, k, v, angles, (to.k, to.v), to.slots, work)

    def cache_rows(self, layer: AttentionLayer) -> CacheRows | None:
        return None if self.cache.quantized else CacheRows(*self._backend.stored(layer.index), self.slots)

    def attend(self, layer: AttentionLayer, q: Tensor) -> Tensor:
        out = self._rest.attend(layer, q) if self._rest is not None else torch.empty(q.shape, dtype=q.dtype)
        if self._work:
            work = self._work[layer.spec.window]
            stored = self._backend.stored(layer.index)
            self._backend.product.attend(self._backend.shape(layer), q, stored, work, out)
        return out

    def encode(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError("the backend 'native' serves causal layers alone")


class NativeBackend(AttentionBackend):
    """Paged attention in C++ for causal models on a CPU, in float32 and bfloat16."""

    name = "native"

    def __init__(self, few_rows: int = FEW_ROWS) -> None:
        self._few_rows = few_rows
        self._torch = TorchBackend()
        self._windows: tuple[int | None, ...] = ()
        self._largest: dict[int | None, AttentionSpec] = {}
        self._shapes: dict[tuple[int, AttentionSpec], Shape] = {}
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._cache: KVCache | None = None
        self._product: PagedAttention | None = None

    @property
    def cache(self) -> KVCache:
        """What `bind` gave."""
        assert self._cache is not None, "bind() comes before plan()"
        return self._cache

    @property
    def product(self) -> PagedAttention:
        """What `layout` loaded."""
        assert self._product is not None, "layout() comes before bind()"
        return self._product

    @classmethod
    def is_available(cls) -> tuple[bool, str]:
        if not Settings.from_env().native:
            return False, "LORAX_NATIVE is off"
        try:
            return True, f"compiled at its first use by {find_compiler(os.geteuid()).program}"
        except RuntimeError as error:
            return False, str(error)

    def layout(
        self,
        specs: Sequence[AttentionSpec],
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: str,
        page_size: int | None = None,
    ) -> CacheLayout | str:
        if device != "cpu":
            return f"it computes on a CPU, not on {device!r}"
        if not all(spec.causal for spec in specs):
            return "it serves causal layers alone"
        self._product, reason = load_attention(Settings.from_env())
        if self._product is None:
            return reason
        for spec in specs:
            problem = self._product.supports(spec.head_dim, dtype, kv_dtype)
            if problem is not None:
                return problem
        return CacheLayout(page_size or PAGE_SIZE, kv_dtype)

    def bind(self, specs: Sequence[AttentionSpec], dtype: torch.dtype, cache: KVCache | None) -> None:
        assert cache is not None, "a causal model without a cache"
        self._torch.bind(specs, dtype, cache)
        self._cache = cache
        self._shapes.clear()
        self._stored.clear()
        self._windows = tuple(dict.fromkeys(spec.window for spec in specs))
        # The scratch of a window serves all its layers, whatever heads they have.
        self._largest = {
            window: max((spec for spec in specs if spec.window == window), key=_memory) for window in self._windows
        }

    def plan(self, rows: AttentionRows) -> StepAttention:
        assert rows.page_table is not None, "a causal model's rows have no page table"
        starts: list[int] = rows.query_starts.host.tolist()
        lengths: list[int] = rows.kv_lengths.host.tolist()
        runs = [(at, start, stop - start) for at, (start, stop) in enumerate(pairwise(starts))]
        few = [run for run in runs if run[2] <= self._few_rows]
        many = [at for at, _, count in runs if count > self._few_rows]
        work: dict[int | None, AttentionWork] = {}
        if few:
            keys = [lengths[at] for at, _, _ in few]
            for window in self._windows:
                jobs = make_jobs(rows.page_table.host, few, keys, window, torch.get_num_threads())
                spec = self._largest[window]
                work[window] = AttentionWork(jobs, torch.empty(scratch_size(jobs, spec.heads, spec.head_dim)))
        return NativeStep(self, rows, work, self._torch.plan_some(rows, many) if many else None)

    def stored(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer, where they lie: looked up once, since views take longer to make than a row to be stored."""
        found = self._stored.get(index)
        if found is None:
            found = self._stored[index] = self.cache.layer(index)
        return found

    def shape(self, layer: AttentionLayer) -> Shape:
        """What the kernel must know of a layer, made when it first asks."""
        key = layer.index, layer.spec
        found = self._shapes.get(key)
        if found is None:
            spec, (k, _) = layer.spec, self.cache.layer(layer.index)
            k_scale, v_scale = self.cache.scales[layer.index] if self.cache.quantized else (1.0, 1.0)
            found = self._shapes[key] = Shape(
                heads=spec.heads,
                kv_heads=spec.kv_heads,
                dim=spec.head_dim,
                page_size=k.shape[1],
                page_stride=k.stride(0),
                token_stride=k.stride(1),
                head_stride=k.stride(2),
                cap=spec.soft_cap or 0.0,
                k_scale=k_scale,
                v_scale=v_scale,
                window=spec.window or 0,
            )
        return found


def _memory(spec: AttentionSpec) -> int:
    """By which layers of one window differ in the scratch that they need."""
    return spec.heads * (spec.head_dim + 2)
