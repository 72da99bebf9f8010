"""Adding adapters to the rows of a batch.

Decides which rows belong to which adapter and how their products are computed. The batcher puts rows of one adapter side by
side, so a batch has as many products as it has adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorax_core.adapters.base import Adapter, LowRank
from lorax_core.modeling.batch import AdapterRows, NoAdapters
from lorax_core.modeling.site import Site


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start:stop` of a set of rows, all of one adapter."""

    start: int
    stop: int
    adapter: Adapter


class SegmentedAdapters:
    """One low-rank product for each segment at each site that its adapter changes; other rows are left alone."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self._at: dict[str, list[tuple[slice, LowRank]]] = {}

    def apply(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        for rows, delta in self._products(site.path):
            y[rows].addmm_(x[rows] @ delta.a.t(), delta.b.t())
        return y

    def _products(self, path: str) -> list[tuple[slice, LowRank]]:
        found = self._at.get(path)
        if found is None:
            found = self._at[path] = [
                (slice(segment.start, segment.stop), delta)
                for segment in self.segments
                if (delta := segment.adapter.deltas.get(path)) is not None
            ]
        return found


def adapter_rows(counts: Sequence[int], adapters: Sequence[Adapter | None]) -> AdapterRows:
    """The adapters of rows given as runs: `counts[i]` rows of `adapters[i]`, None being the base."""
    segments: list[Segment] = []
    start = 0
    for count, adapter in zip(counts, adapters, strict=True):
        stop = start + count
        if adapter is not None and count:
            if segments and segments[-1].adapter is adapter and segments[-1].stop == start:
                segments[-1] = Segment(segments[-1].start, stop, adapter)
            else:
                segments.append(Segment(start, stop, adapter))
        start = stop
    return SegmentedAdapters(segments) if segments else NoAdapters()
