"""Adding adapters to the rows of a batch.

Decides which rows belong to which adapter and what happens to them at a site. The batcher puts rows of one adapter side by
side, so a batch has as many products as it has adapters; how they are computed is for `products` to decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorax_core.adapters.base import Bound, Delta
from lorax_core.adapters.deltas import LowRank
from lorax_core.adapters.lora_kernels.base import Products, Updates
from lorax_core.modeling.site import AdapterRows, NoAdapters, Site


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start:stop` of a set of rows, all of one adapter, and what it does where."""

    start: int
    stop: int
    adapter: Bound
    deltas: Mapping[str, Sequence[Delta]]


@dataclass(frozen=True, slots=True)
class _Changes:
    """What is done at one site: products that can be computed together, then everything else in order."""

    updates: Updates | None
    others: tuple[tuple[slice, Sequence[Delta]], ...]


class SegmentedAdapters:
    """The deltas of each segment's adapter at each site that it changes; other rows are left alone."""

    def __init__(self, segments: Sequence[Segment], products: Products) -> None:
        self.segments = tuple(segments)
        self._products = products
        self._at: dict[str, _Changes] = {}

    def apply(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        changes = self._changes(site.path)
        if changes.updates is not None:
            self._products.add(x, y, changes.updates)
        for rows, deltas in changes.others:
            for delta in deltas:
                delta.apply(site, x[rows], y[rows])
        return y

    def _changes(self, path: str) -> _Changes:
        found = self._at.get(path)
        if found is None:
            found = self._at[path] = self._sorted(path)
        return found

    def _sorted(self, path: str) -> _Changes:
        runs: list[tuple[int, int]] = []
        updates: list[LowRank] = []
        others: list[tuple[slice, Sequence[Delta]]] = []
        for segment in self.segments:
            deltas = segment.deltas.get(path, ())
            if len(deltas) == 1 and isinstance(deltas[0], LowRank) and deltas[0].bias is None:
                runs.append((segment.start, segment.stop))
                updates.append(deltas[0])
            elif deltas:
                others.append((slice(segment.start, segment.stop), deltas))
        return _Changes(Updates(runs, updates) if updates else None, tuple(others))


class AdapterRowsMaker:
    """Makes the adapters of sets of rows. Steps that follow each other often have the same, which are then made once."""

    def __init__(self, products: Products | None = None) -> None:
        self._products = products or Products()
        self._last: dict[tuple[tuple[int, int, int], ...], SegmentedAdapters] = {}
        self._used: dict[tuple[tuple[int, int, int], ...], SegmentedAdapters] = {}

    def start_step(self) -> None:
        """What the step before did not use is forgotten, so that adapters which left do not linger."""
        self._last, self._used = self._used, {}

    def rows(self, counts: Sequence[int], adapters: Sequence[Bound | None]) -> AdapterRows:
        """The adapters of rows given as runs: `counts[i]` rows of `adapters[i]`, None being the base."""
        segments = _segments(counts, adapters)
        if not segments:
            return NoAdapters()
        # By the deltas and not by the adapter: one that left the device and came back has others.
        key = tuple((segment.start, segment.stop, id(segment.deltas)) for segment in segments)
        made = self._last.get(key) or SegmentedAdapters(segments, self._products)
        self._used[key] = made
        return made


def _segments(counts: Sequence[int], adapters: Sequence[Bound | None]) -> list[Segment]:
    segments: list[Segment] = []
    start = 0
    for count, adapter in zip(counts, adapters, strict=True):
        stop = start + count
        if adapter is not None and count:
            if segments and segments[-1].adapter is adapter and segments[-1].stop == start:
                segments[-1] = Segment(segments[-1].start, stop, adapter, segments[-1].deltas)
            else:
                segments.append(Segment(start, stop, adapter, adapter.deltas))
        start = stop
    return segments
