"""Low-rank products of all adapters in one native call for each site.

Decides which segments are worth it: short ones. Long ones are left to torch's matrix products, which reuse each weight for
many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorax_core.adapters.lora_kernels.base import LoraKernel, LoraPlan, Segment, Updates
from lorax_core.adapters.lora_kernels.torch import TorchPlan
from lorax_core.kernels.native.low_rank import Jobs, LowRankProduct, LowRankWork, load_low_rank
from lorax_core.settings import Settings

WORTH = 256
"""A segment is computed natively while its rows times its rank are at most so many for each segment, up to four, of the step.

Measured on 2 cores (torch's seconds over native's; widths 896 to 4864; float32 / bfloat16), rows of a segment x rank:
    one segment:   64: 1.4 to 2.4 / 2.5 to 6.6    256: 0.9 to 1.6 / 1.1 to 2.6    1024: 0.5 to 0.8 / 0.4 to 1.2
    four segments: 64: 3.5 to 6.1 / 4.8 to 17     256: 1.5 to 3.4 / 1.8 to 7.7    1024: 1.1 to 1.7 / 1.0 to 2.0
One segment is computed by one thread, several by as many as there are, and torch's price of a call is paid for each.
"""


@dataclass(frozen=True, slots=True)
class _Table:
    """The jobs of one adapter over all sites, the number of each job's site, and the largest rank among them."""

    jobs: Jobs
    sites: NDArray[np.int64]
    rank: int


class NativePlan(LoraPlan):
    """One table of jobs, site after site."""

    def __init__(
        self, product: LowRankProduct, segments: Sequence[tuple[Segment, _Table]], names: Sequence[str]
    ) -> None:
        self._product = product
        self._segments = segments  # whose tensors the jobs point into
        dtypes = {update.a.dtype for segment, _ in segments for update in segment.updates.by_site.values()}
        self._dtype = dtypes.pop() if len(dtypes) == 1 else None
        jobs = np.concatenate([table.jobs for _, table in segments])
        sites = np.concatenate([table.sites for _, table in segments])
        counts = [len(table.jobs) for _, table in segments]
        jobs["row"] = np.repeat([segment.start for segment, _ in segments], counts)
        jobs["rows"] = np.repeat([segment.rows for segment, _ in segments], counts)
        # The largest jobs of a site first, so that its threads end together.
        order = np.lexsort((-jobs["rows"] * jobs["rank"] * jobs["width"], sites))
        jobs, sites = jobs[order], sites[order]
        scratch = jobs["rows"] * jobs["rank"]  # numbers of x A^T that each job keeps
        ends = np.cumsum(scratch)
        # Sorted by site, so the jobs of one site are one slice; `add` slices nothing.
        found, starts = np.unique(sites, return_index=True)
        stops = [*starts[1:], len(sites)]
        self._at: dict[str, LowRankWork] = {}
        largest = 0
        for site, start, stop in zip(found, starts, stops, strict=True):
            # Offsets start from 0 at each site: sites run one after the other and share one scratch memory.
            before = ends[start] - scratch[start]
            jobs["at"][start:stop] = ends[start:stop] - scratch[start:stop] - before
            largest = max(largest, int(ends[stop - 1] - before))
            self._at[names[site]] = LowRankWork(jobs[start:stop])
        self._scratch = torch.empty(largest)

    def add(self, site: str, x: Tensor, y: Tensor) -> None:
        work = self._at.get(site)
        if work is not None:
            if self._dtype is not x.dtype:  # addresses say nothing of what lies there
                raise RuntimeError(f"{site} computes in {x.dtype}, its adapters in {self._dtype or 'several dtypes'}")
            self._product.add(x, y, work, self._scratch)


class _Both(LoraPlan):
    def __init__(self, plans: Sequence[LoraPlan]) -> None:
        self._plans = plans

    def add(self, site: str, x: Tensor, y: Tensor) -> None:
        for plan in self._plans:
            plan.add(site, x, y)


class NativeKernel(LoraKernel):
    """Short segments in one call, long ones through torch: which is which depends on the shapes of the step alone."""

    name = "native"

    def __init__(self, product: LowRankProduct, worth: int = WORTH) -> None:
        self._product = product
        self._worth = worth
        self._numbers: dict[str, int] = {}  # of site paths
        self._tables: WeakKeyDictionary[Updates, _Table] = WeakKeyDictionary()

    def supports(self, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return _not_here(device)
        if dtype not in self._product.dtypes:
            return f"it computes in float32 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
        return None

    def plan(self, segments: Sequence[Segment]) -> LoraPlan:
        limit = self._worth * min(len(segments), 4)
        short: list[tuple[Segment, _Table]] = []
        long: list[Segment] = []
        for segment in segments:
            table = self._table(segment.updates)
            if segment.rows * table.rank <= limit:
                short.append((segment, table))
            else:
                long.append(segment)
        plans: list[LoraPlan] = []
        if short:
            plans.append(NativePlan(self._product, short, list(self._numbers)))
        if long:
            plans.append(TorchPlan(long))
        return plans[0] if len(plans) == 1 else _Both(plans)

    def _table(self, updates: Updates) -> _Table:
        found = self._tables.get(updates)
        if found is not None:
            return found
        sites: list[int] = []
        pairs: list[tuple[Tensor, Tensor, int]] = []
        for path, update in updates.by_site.items():
            number = self._numbers.setdefault(path, len(self._numbers))
            # One job a block: parts of a fused layer have ranks and columns of their own.
            for block in update.blocks:
                sites.append(number)
                pairs.append((update.a[block.ranks], block.b, block.column))
        jobs = self._product.jobs(pairs)
        made = self._tables[updates] = _Table(jobs, np.array(sites, np.int64), int(jobs["rank"].max(initial=0)))
        return made


def _not_here(device: torch.device) -> str:
    return f"it computes on the CPU, not on {device}"


def load_native_kernel(settings: Settings, device: torch.device) -> tuple[NativeKernel | None, str]:
    """The kernel, compiled at its first use, and where it is; or None, and why it cannot be."""
    if device.type != "cpu":  # asked first, since compiling takes seconds
        return None, _not_here(device)
    product, reason = load_low_rank(settings)
    return (NativeKernel(product) if product is not None else None), reason
