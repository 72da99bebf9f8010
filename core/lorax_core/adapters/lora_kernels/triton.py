"""Low-rank products of all adapters in two Triton launches a site, on NVIDIA GPUs.

Decides what a step's tables say. An adapter's table is made once and stays on the device; a step brings its tiles alone, in
one copy. Captured steps read tiles from memory of their own, so adapters come and go without a new capture, and launch the
first product beside that of the base layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorax_core.adapters.deltas import LowRank
from lorax_core.adapters.lora_kernels.base import GraphLora, LoraKernel, LoraPlan, Segment, Updates
from lorax_core.kernels.gpu import Branch
from lorax_core.kernels.triton.available import unavailable
from lorax_core.settings import Settings

if TYPE_CHECKING:
    from lorax_core.kernels.triton.lora import Form

CAPTURED_RANKS: Final = 1024
"""Ranks that a captured step has memory for, those of a fused layer's parts counted together."""

RANKS_AT_ONCE: Final = 64
"""Ranks that a captured step has programs for, which walk on to all others: programs for all would mostly have no work."""


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """What an adapter does at each site by number, on the device, and what the host must know of it."""

    table: Tensor  # [sites, length] int64, as `kernels.triton.lora` reads it
    ranks: NDArray[np.int64]  # [sites]; 0 where a site is not changed
    aligned: NDArray[np.bool_]  # [sites]
    dtypes: frozenset[torch.dtype]
    held: tuple[Tensor, ...]  # whose addresses the table has


class TritonPlan(LoraPlan):
    """The tiles of one set of rows."""

    def __init__(self, kernel: TritonKernel, segments: Sequence[Segment]) -> None:
        from lorax_core.kernels.triton import lora

        self._sites = kernel.sites
        self.tables = [kernel.table(segment.updates) for segment in segments]  # held while their addresses are in use
        self._dtypes = frozenset().union(*(table.dtypes for table in self.tables))
        self._ranks, self._aligned = _over_sites(self.tables)
        rows, ranks = max(segment.stop for segment in segments), _rounded(int(self._ranks.max(initial=1)))
        form = lora.form(sum(segment.rows for segment in segments))
        tiles = _on_device(_tiles(segments, self.tables, form), kernel.device)
        self.launch = lora.Launch(tiles, lora.scratch(rows, ranks, form, kernel.device), rows, ranks, form)

    def add(self, site: str, x: Tensor, y: Tensor) -> None:
        number = self._sites.get(site, -1)
        if 0 <= number < len(self._ranks) and self._ranks[number]:
            _refuse_other_dtypes(site, x, self._dtypes)
            with _changed(y) as into:
                rank, aligned = int(self._ranks[number]), bool(self._aligned[number])
                self.launch.add(number, rank, _end_to_end(x), into, aligned=aligned)


class TritonGraph(GraphLora):
    """The tiles of captured steps, in memory that stays where it is."""

    def __init__(self, kernel: TritonKernel, rows: int, sites: Mapping[str, tuple[int, int]]) -> None:
        from lorax_core.kernels.triton import lora

        self._kernel = kernel
        self._rows = rows
        self._numbers = {site: kernel.number(site) for site in sites}
        # Part of what is compiled, so settled at capture: an adapter that cannot be loaded so wide does not fit.
        self._aligned = {self._numbers[site]: out % lora.ALIGNED_TO == 0 for site, (_, out) in sites.items()}
        self._form: Form = lora.form(rows)
        # Every tile has a row at least, so there are never more tiles than rows.
        tiles = torch.zeros(rows, lora.TILE_FIELDS, dtype=torch.int64, device=kernel.device)
        scratch = lora.scratch(rows, CAPTURED_RANKS, self._form, kernel.device)
        self.launch = lora.Launch(tiles, scratch, rows, CAPTURED_RANKS, self._form)
        self._dtypes: frozenset[torch.dtype] = frozenset()  # of the rows that were captured
        self._started: str | None = None  # the site whose first product is launched
        self._reads: Tensor | None = None  # what that product reads: not freed before it is joined
        self._problems: WeakKeyDictionary[Updates, tuple[str | None]] = WeakKeyDictionary()  # of adapters seen before
        self._segments: tuple[Segment, ...] = ()  # what the tiles say
        self.tables: list[AdapterTable] = []

    def fits(self, segments: Sequence[Segment]) -> str | None:
        for segment in segments:
            if segment.stop > self._rows:
                return "more rows with adapters than were captured"
            known = self._problems.get(segment.updates)
            if known is None:
                known = self._problems[segment.updates] = (self._misfit(self._kernel.table(segment.updates)),)
            (problem,) = known
            if problem is not None:
                return problem
        return None

    def set(self, segments: Sequence[Segment]) -> None:
        segments = tuple(segments)
        if segments == self._segments:
            return
        problem = self.fits(segments)
        if problem is not None:  # replayed all the same, it would read and write memory of others
            raise RuntimeError(f"adapters that captured steps cannot replay: {problem}")
        tables = [self._kernel.table(segment.updates) for segment in segments]
        tiles = _tiles(segments, tables, self._form, length=self._rows)
        self.launch.tiles.copy_(_pinned(tiles, self._kernel.device), non_blocking=True)
        # The tables of the step before are dropped only now: on the stream, their memory is free when that step is through.
        self.tables, self._segments = tables, segments

    def start(self, site: str, x: Tensor) -> None:
        number = self._numbers.get(site)
        if number is None:  # `fits` refuses adapters that change others
            return
        if x.dtype not in self._dtypes:  # while it is captured
            self._dtypes |= {x.dtype}
            self._problems.clear()
        self._reads = _end_to_end(x)
        with self._kernel.beside():
            self.launch.shrink(number, RANKS_AT_ONCE, self._reads, aligned=self._aligned[number])
        self._started = site

    def add(self, site: str, x: Tensor, y: Tensor) -> None:
        number = self._numbers.get(site)
        if number is None:
            return
        if self._started != site:
            self.start(site, x)
        self._kernel.join()
        self._started = self._reads = None
        with _changed(y) as into:
            self.launch.expand(number, x, into, aligned=self._aligned[number])

    def _misfit(self, table: AdapterTable) -> str | None:
        # Steps are counted by these reasons, so they name no layer and no size of an adapter.
        for number in np.flatnonzero(table.ranks).tolist():
            if number not in self._aligned:
                return "an adapter of a layer that was not captured"
            if table.ranks[number] > CAPTURED_RANKS:
                return f"an adapter of a rank above {CAPTURED_RANKS}, the most that captured steps hold"
            if self._aligned[number] and not table.aligned[number]:
                return "an adapter whose memory is not aligned, as captured steps load it"
        if self._dtypes and not table.dtypes <= self._dtypes:
            return f"an adapter in {_listed(table.dtypes)}, where {_listed(self._dtypes)} was captured"
        return None


class TritonKernel(LoraKernel):
    """Any number of adapters, of any ranks, on one CUDA device."""

    name = "triton"

    def __init__(self, device: torch.device, branch: Branch | None = None) -> None:
        self.device = device
        self._branch = branch
        self.sites: dict[str, int] = {}
        """The number of each site path, by which tables are read; given at first sight, and kept."""
        self._tables: WeakKeyDictionary[Updates, AdapterTable] = WeakKeyDictionary()

    def supports(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return unavailable(dtype, device)

    def plan(self, segments: Sequence[Segment]) -> LoraPlan:
        return TritonPlan(self, segments)

    def plan_graph(self, rows: int, sites: Mapping[str, tuple[int, int]]) -> GraphLora | str:
        return TritonGraph(self, rows, sites)

    def beside(self) -> AbstractContextManager[None]:
        """What is launched in this block may be computed beside what follows it, until `join`."""
        return nullcontext() if self._branch is None else self._branch.fork()

    def join(self) -> None:
        """What follows comes after what was launched beside it."""
        if self._branch is not None:
            self._branch.join()

    def number(self, site: str) -> int:
        """The number of a site path."""
        return self.sites.setdefault(site, len(self.sites))

    def table(self, updates: Updates) -> AdapterTable:
        """The table of an adapter, made when it is first asked for."""
        found = self._tables.get(updates)
        if found is None:
            entries = {self.number(path): update for path, update in updates.by_site.items()}
            found = self._tables[updates] = _table(entries, self.device)
        return found


def load_triton_kernel(_: Settings, device: torch.device) -> tuple[TritonKernel | None, str]:
    """The kernel for a CUDA device, which triton compiles at its first use; or None, and why it cannot be."""
    problem = unavailable(torch.float32, device)
    if problem is not None:
        return None, problem
    branch = Branch(device) if torch.cuda.is_available() else None
    return TritonKernel(device, branch), f"compiled by triton for {device}"


def _table(entries: Mapping[int, LowRank], device: torch.device) -> AdapterTable:
    from lorax_core.kernels.triton import lora

    sites = max(entries, default=-1) + 1
    most_blocks = max((len(update.blocks) for update in entries.values()), default=1)
    rows = np.zeros((sites, lora.ENTRY_FIELDS + lora.BLOCK_FIELDS * max(most_blocks, 1)), np.int64)
    aligned = np.ones(sites, np.bool_)
    held: list[Tensor] = []
    for site, update in entries.items():
        a = update.a.contiguous()
        held.append(a)
        entry = [a.data_ptr(), a.shape[0], len(update.blocks)]
        sizes: list[int] = []
        for block in update.blocks:
            b = block.b.contiguous()
            held.append(b)
            entry += [b.data_ptr(), block.ranks.start, b.shape[0], block.column, b.shape[1]]
            sizes += [block.column, b.shape[1]]
        rows[site, : len(entry)] = entry
        at_16 = all(tensor.data_ptr() % 16 == 0 for tensor in held[-1 - len(update.blocks) :])
        aligned[site] = at_16 and all(size % lora.ALIGNED_TO == 0 for size in sizes)
    dtypes = frozenset(tensor.dtype for tensor in held)
    return AdapterTable(_on_device(rows, device), rows[:, 1].copy(), aligned, dtypes, tuple(held))


def _tiles(
    segments: Sequence[Segment], tables: Sequence[AdapterTable], form: Form, length: int | None = None
) -> NDArray[np.int64]:
    """Tiles of rows, as `kernels.triton.lora` reads them; filled up to `length` with tiles of no adapter."""
    from lorax_core.kernels.triton import lora

    tiles = [
        (first, min(form.tile_rows, segment.stop - first), table.table.data_ptr(), *table.table.shape)
        for segment, table in zip(segments, tables, strict=True)
        for first in range(segment.start, segment.stop, form.tile_rows)
    ]
    made = np.zeros((len(tiles) if length is None else length, lora.TILE_FIELDS), np.int64)
    made[: len(tiles)] = np.array(tiles, np.int64).reshape(-1, lora.TILE_FIELDS)
    return made


def _over_sites(tables: Sequence[AdapterTable]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The largest rank of each site, and whether all tables are aligned there."""
    sites = max(len(table.ranks) for table in tables)
    ranks, aligned = np.zeros(sites, np.int64), np.ones(sites, np.bool_)
    for table in tables:
        known = len(table.ranks)
        np.maximum(ranks[:known], table.ranks, out=ranks[:known])
        aligned[:known] &= table.aligned
    return ranks, aligned


def _end_to_end(x: Tensor) -> Tensor:
    """x with the numbers of a row side by side, as kernels read them."""
    return x if x.stride(1) == 1 else x.contiguous()


@contextmanager
def _changed(y: Tensor) -> Iterator[Tensor]:
    """The memory in which a kernel changes y."""
    into = _end_to_end(y)
    yield into
    if into is not y:
        y.copy_(into)


def _refuse_other_dtypes(site: str, x: Tensor, dtypes: frozenset[torch.dtype]) -> None:
    if dtypes != {x.dtype}:  # addresses say nothing of what lies there
        raise RuntimeError(f"{site} computes in {x.dtype}, its adapters in {_listed(dtypes)}")


def _listed(dtypes: frozenset[torch.dtype]) -> str:
    return ", ".join(sorted(map(str, dtypes)))


def _rounded(ranks: int) -> int:
    return -(-ranks // 16) * 16


def _pinned(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    host = torch.from_numpy(numbers)
    # Each copy has pinned memory of its own, which torch keeps until the copy is through.
    return host.pin_memory() if device.type == "cuda" else host


def _on_device(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    return _pinned(numbers, device).to(device, non_blocking=True)
