"""Low-rank products adapter by adapter, through torch's matrix products: readable, for every device and dtype.

Decides nothing but the order. It is what other kernels are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorax_core.adapters.deltas import LowRank
from lorax_core.adapters.lora_kernels.base import LoraKernel, LoraPlan, Segment


class TorchPlan(LoraPlan):
    """For each site, the rows and the update of each segment that changes it."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._at: dict[str, list[tuple[slice, LowRank]]] = {}
        for segment in segments:
            rows = slice(segment.start, segment.stop)
            for site, update in segment.updates.by_site.items():
                self._at.setdefault(site, []).append((rows, update))

    def add(self, site: str, x: Tensor, y: Tensor) -> None:
        for rows, update in self._at.get(site, ()):
            # Slices are views, so this changes y itself.
            update.add(x[rows], y[rows])


class TorchKernel(LoraKernel):
    """One pair of matrix products for each segment at each site."""

    name = "torch"

    def supports(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def plan(self, segments: Sequence[Segment]) -> LoraPlan:
        return TorchPlan(segments)
