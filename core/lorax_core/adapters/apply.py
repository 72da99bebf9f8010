"""Adding adapters to the rows of a batch.

Decides which rows belong to which adapter and how their products are computed. The batcher puts rows of one adapter side by
side, so a batch has as many products as it has adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorax_core.adapters.base import Adapter, Delta
from lorax_core.modeling.batch import AdapterRows, NoAdapters
from lorax_core.modeling.site import Site


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start:stop` of a set of rows, all of one adapter."""

    start: int
    stop: int
    adapter: Adapter


class SegmentedAdapters:
    """The deltas of each segment's adapter at each site that it changes; other rows are left alone."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self._at: dict[str, list[tuple[slice, Sequence[Delta]]]] = {}

    def apply(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        for rows, deltas in self._changes(site.path):
            for delta in deltas:
                delta.apply(site, x[rows], y[rows])
        return y

    def _changes(self, path: str) -> list[tuple[slice, Sequence[Delta]]]:
        found = self._at.get(path)
        if found is None:
            found = self._at[path] = [
                (slice(segment.start, segment.stop), deltas)
                for segment in self.segments
                if (deltas := segment.adapter.deltas.get(path)) is not None
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
