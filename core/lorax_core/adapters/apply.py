"""Adding adapters to the rows of a batch.

Decides which rows belong to which adapter and what happens to them at a site. The batcher puts rows of one adapter side by
side; how low-rank products are computed is for the kernel to decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor

from lorax_core.adapters.base import Bound, Delta
from lorax_core.adapters.deltas import LowRank
from lorax_core.adapters.lora_kernels.base import LoraKernel, Segment, Updates
from lorax_core.adapters.lora_kernels.torch import TorchKernel
from lorax_core.modeling.site import AdapterRows, NoAdapters, Site


@dataclass(frozen=True, slots=True)
class Run:
    """Rows `start:stop` of a set of rows, all of one adapter."""

    start: int
    stop: int
    bound: Bound


_Split = tuple[Updates, Mapping[str, tuple[Delta, ...]]]
"""What an adapter does, by site: products that a kernel computes, and everything else."""


class SegmentedAdapters:
    """The deltas of each run's adapter at each site that it changes; other rows are left alone."""

    def __init__(self, runs: Sequence[Run], splits: Sequence[_Split], kernel: LoraKernel) -> None:
        self.runs = tuple(runs)
        segments = [
            Segment(run.start, run.stop, updates)
            for run, (updates, _) in zip(runs, splits, strict=True)
            if updates.by_site
        ]
        self._plan = kernel.plan(segments) if segments else None
        self._others: dict[str, list[tuple[slice, tuple[Delta, ...]]]] = {}
        for run, (_, others) in zip(runs, splits, strict=True):
            for path, deltas in others.items():
                self._others.setdefault(path, []).append((slice(run.start, run.stop), deltas))

    def start(self, site: Site, x: Tensor) -> None:
        if self._plan is not None:
            self._plan.start(site.path, x)

    def apply(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        if self._plan is not None:
            self._plan.add(site.path, x, y)
        for rows, deltas in self._others.get(site.path, ()):
            for delta in deltas:
                # Slices are views: y changes in place.
                delta.apply(site, x[rows], y[rows])
        return y


class AdapterRowsMaker:
    """Makes the adapters of sets of rows. Steps that follow each other often have the same, which are then made once."""

    def __init__(self, kernel: LoraKernel | None = None) -> None:
        self._kernel = kernel or TorchKernel()
        self._splits: WeakKeyDictionary[Bound, _Split] = WeakKeyDictionary()
        self._last: dict[tuple[tuple[int, int, int], ...], SegmentedAdapters] = {}
        self._used: dict[tuple[tuple[int, int, int], ...], SegmentedAdapters] = {}

    def start_step(self) -> None:
        """Drop what the step before did not use, so that adapters which were unbound are freed."""
        self._last, self._used = self._used, {}

    def rows(self, counts: Sequence[int], bounds: Sequence[Bound | None]) -> AdapterRows:
        """The adapters of rows given as runs: `counts[i]` rows of `bounds[i]`, None being the base."""
        runs = _runs(counts, bounds)
        if not runs:
            return NoAdapters()
        # What was made holds its adapters, so their ids are not given to others while it is kept.
        key = tuple((run.start, run.stop, id(run.bound)) for run in runs)
        made = self._last.get(key) or self._used.get(key)
        if made is None:
            made = SegmentedAdapters(runs, [self._split(run.bound) for run in runs], self._kernel)
        self._used[key] = made
        return made

    def segments(self, counts: Sequence[int], bounds: Sequence[Bound | None]) -> list[Segment] | None:
        """The same rows as segments for a kernel; None where an adapter does more than a kernel computes."""
        runs = [(run, *self._split(run.bound)) for run in _runs(counts, bounds)]
        if any(others for _, _, others in runs):
            return None
        return [Segment(run.start, run.stop, updates) for run, updates, _ in runs if updates.by_site]

    def _split(self, bound: Bound) -> _Split:
        found = self._splits.get(bound)
        if found is None:
            updates: dict[str, LowRank] = {}
            others: dict[str, tuple[Delta, ...]] = {}
            for path, deltas in bound.deltas.items():
                # Several deltas at one site depend on their order, which a kernel does not keep.
                if len(deltas) == 1 and isinstance(deltas[0], LowRank) and deltas[0].bias is None:
                    updates[path] = deltas[0]
                else:
                    others[path] = deltas
            found = self._splits[bound] = (Updates(updates), others)
        return found


def _runs(counts: Sequence[int], bounds: Sequence[Bound | None]) -> list[Run]:
    runs: list[Run] = []
    start = 0
    for count, bound in zip(counts, bounds, strict=True):
        stop = start + count
        if bound is not None and count:
            # Longer runs make fewer, larger products; `is`, since equal content bound twice has two memories.
            if runs and runs[-1].bound is bound and runs[-1].stop == start:
                runs[-1] = Run(runs[-1].start, stop, bound)
            else:
                runs.append(Run(start, stop, bound))
        start = stop
    return runs
