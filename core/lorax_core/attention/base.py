"""What an attention backend is.

Decides the interface between layers, engine and kernels: which cache a backend needs, how it prepares a step, and what a
layer calls. Knows nothing of models, schedules or the memory of the cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lorax_core.kernels.elementwise import Angles, Elementwise
from lorax_core.untrusted import is_number


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The shape and masking of one attention layer.

    `window` counts the keys that a query sees, itself included, and where it is not causal as many on the other side; None is
    all. Scores are `q k^T head_dim^-0.5`, then
    `soft_cap * tanh(scores / soft_cap)` when a cap is given. Raises ValueError for sizes that no layer can have.
    """

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        sizes = (self.heads, self.kv_heads, self.head_dim)
        if not all(type(size) is int for size in sizes) or min(sizes) < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads!r} query heads over {self.kv_heads!r} key heads of {self.head_dim!r}: query heads are a "
                "multiple of key heads, all at least 1"
            )
        if self.window is not None and not (type(self.window) is int and self.window >= 1):
            raise ValueError(f"a window of {self.window!r} keys; the least is 1, the query's own, and None is all")
        if self.soft_cap is not None and not (is_number(self.soft_cap) and self.soft_cap > 0):
            raise ValueError(f"a soft cap of {self.soft_cap!r}; it is a number above 0, or None for no cap")


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How a backend wants keys and values stored.

    Pages of `page_size` tokens in `dtype`, all in one tensor `[layers, 2, pages, page, kv_heads, dim]`; page 0 is scratch.
    """

    page_size: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.page_size < 1 or not self.dtype.is_floating_point:
            raise ValueError(
                f"a cache of pages of {self.page_size} tokens in {self.dtype}; pages hold tokens in a float dtype"
            )


class HostAndDevice(NamedTuple):
    """The same int32 numbers in host memory and on the device; on a CPU both are one tensor."""

    host: Tensor
    device: Tensor


class AttentionLayer(Protocol):
    """What a backend reads off a layer."""

    @property
    def index(self) -> int:
        """The layer's place in the cache."""

    @property
    def spec(self) -> AttentionSpec: ...

    @property
    def elementwise(self) -> Elementwise:
        """What rotates its rows, and stores them in a cache that keeps numbers as they are."""


class KVCache(Protocol):
    """What backends ask of the cache. A slot is `page * page_size + offset`."""

    @property
    def page_size(self) -> int: ...

    @property
    def quantized(self) -> bool:
        """Whether numbers are stored divided by `scales`, so that they are not what was written."""

    @property
    def scales(self) -> Sequence[tuple[float, float]]:
        """What the stored K and V of each layer are multiplied by; 1 where nothing is scaled."""

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store k and v `[tokens, kv_heads, dim]` of one layer at `slots` `[tokens]`."""

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer as they are stored, each `[pages, page, kv_heads, dim]`, to read."""

    def gather(self, layer: int, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V of some pages in `dtype`: each `[*pages.shape, page, kv_heads, dim]`."""


class AttentionRows(Protocol):
    """What a backend must know of the rows of a step. Models without a cache have no `page_table` and no `slots`."""

    @property
    def query_starts(self) -> HostAndDevice:
        """First row of each sequence and, last, the number of rows: `[seqs + 1]`."""

    @property
    def kv_lengths(self) -> HostAndDevice:
        """Keys of each sequence once this step is written: `[seqs]`."""

    @property
    def page_table(self) -> HostAndDevice | None:
        """Pages of each sequence in order, filled up with page 0: `[seqs, most pages]`."""

    @property
    def slots(self) -> Tensor | None:
        """Where the new keys and values go: `[tokens]` int64."""


class CacheRows(NamedTuple):
    """Where rows go that are stored as they are: a layer's K and V `[pages, page, kv_heads, dim]`, and slots `[tokens]`."""

    k: Tensor
    v: Tensor
    slots: Tensor


class StepAttention(ABC):
    """Attention of one step: made by `AttentionBackend.plan`, carried on the batch, called by every attention layer.

    The base class rotates and writes to the cache, in one call where `cache_rows` says where to, and then attends; a backend
    with a kernel that does all of these at once overrides `forward`.
    """

    def forward(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, angles: Angles | None = None) -> Tensor:
        """q `[tokens, heads, dim]`, k and v `[tokens, kv_heads, dim]` to q's shape; rotated first where there are angles."""
        to = self.cache_rows(layer) if layer.spec.causal else None
        if to is not None:
            q = layer.elementwise.rotate_and_store(q, k, v, angles, *to)
            return self.attend(layer, q)
        if angles is not None:
            q, k = layer.elementwise.rotate(q, k, angles)
        if not layer.spec.causal:
            return self.encode(layer, q, k, v)
        # Written first: attend() reads the step's own keys from the cache.
        self.write(layer, k, v)
        return self.attend(layer, q)

    def cache_rows(self, layer: AttentionLayer) -> CacheRows | None:
        """Where the step's keys and values go; None where only `write` can store them, as in a quantised cache."""
        return None

    @abstractmethod
    def write(self, layer: AttentionLayer, k: Tensor, v: Tensor) -> None:
        """Store the step's keys and values in the cache."""

    @abstractmethod
    def attend(self, layer: AttentionLayer, q: Tensor) -> Tensor:
        """Causal attention over the cache, which holds the step's own keys already."""

    @abstractmethod
    def encode(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Bidirectional attention inside each sequence, without a cache."""


class PagedStep(StepAttention):
    """Attention of a step that stores keys and values as the cache itself lays them out: what core's backends share.

    Bidirectional models have no cache and no slots.
    """

    def __init__(self, cache: KVCache | None, slots: Tensor | None) -> None:
        self._cache = cache
        self._slots = slots

    @property
    def cache(self) -> KVCache:
        """The cache, for causal layers."""
        assert self._cache is not None, "a causal layer was planned without a cache"
        return self._cache

    @property
    def slots(self) -> Tensor:
        """Where the new keys and values go."""
        assert self._slots is not None, "a causal layer's rows have no slots"
        return self._slots

    def cache_rows(self, layer: AttentionLayer) -> CacheRows | None:
        return None if self.cache.quantized else CacheRows(*self.cache.layer(layer.index), self.slots)

    def write(self, layer: AttentionLayer, k: Tensor, v: Tensor) -> None:
        self.cache.write(layer.index, k, v, self.slots)


class GraphAttention(StepAttention):
    """Attention of a step that is captured once and replayed with other numbers.

    Its layers launch the same kernels on the same memory each time; what changes from step to step is in that memory.
    """

    @abstractmethod
    def replan(self, rows: AttentionRows) -> None:
        """Prepare the memory for these rows, as many as were captured. Called before every replay, and never captured."""


class AttentionBackend(ABC):
    """One implementation of attention over packed batches; one object serves one engine.

    In this order: `layout` says which cache the backend needs, or why it cannot serve the model; `bind` gives it that cache;
    `plan` is called once a step.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def is_available(cls) -> tuple[bool, str]:
        """Whether this process can use the backend, and why not. Imports are probed, nothing is compiled."""

    @abstractmethod
    def layout(
        self,
        specs: Sequence[AttentionSpec],
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: str,
        page_size: int | None = None,
    ) -> CacheLayout | str:
        """The cache for layers of these kinds, computed in `dtype` and stored in `kv_dtype`; else the reason why not.

        `page_size` is the caller's wish; a backend that cannot have it says so.
        """

    @abstractmethod
    def bind(self, specs: Sequence[AttentionSpec], dtype: torch.dtype, cache: KVCache | None) -> None:
        """Serve a model with these kinds of layers, computed in `dtype`; bidirectional models have no cache."""

    @abstractmethod
    def plan(self, rows: AttentionRows) -> StepAttention:
        """Prepare a step for all layers. Everything that needs numbers on the host happens here, nothing in the layers."""

    def plan_graph(self, rows: AttentionRows) -> GraphAttention | str:
        """Prepare decoding steps, one row a sequence, for capture; else the reason why not.

        The device tensors of `rows` and its `slots` stay where they are: later steps bring other numbers in the same memory,
        padded with rows of one key on the scratch page. Its page table is as wide as any step's can be.
        """
        return f"the backend {self.name!r} cannot be captured"
