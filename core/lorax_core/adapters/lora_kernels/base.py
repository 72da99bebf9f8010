"""The interface of the kernels that compute low-rank products.

Decides what a kernel is given and when: the segments of a step once, ahead of the forward pass, then the rows of one site
after the other. Knows nothing of any kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorax_core.adapters.deltas import LowRank


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Updates:
    """The low-rank update of one adapter at each site path. Kernels may keep what they derive of it as long as it lives."""

    by_site: Mapping[str, LowRank]


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start:stop` of a set of rows, all of one adapter."""

    start: int
    stop: int
    updates: Updates

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.stop - self.start


class LoraPlan(ABC):
    """The products of one set of rows, at every site."""

    def start(self, site: str, x: Tensor) -> None:  # noqa: B027  # most plans launch everything in `add`
        """`add` comes next, for the same x: what needs no y may be launched now. By default nothing is."""

    @abstractmethod
    def add(self, site: str, x: Tensor, y: Tensor) -> None:
        """Add the products at a site path to y `[rows, out]` for x `[rows, in]`, in place."""


class GraphLora(LoraPlan):
    """Products of captured steps: `add` launches the same kernels at every site, whichever adapters there are."""

    @abstractmethod
    def fits(self, segments: Sequence[Segment]) -> str | None:
        """None when these segments can be replayed, else the reason why not."""

    @abstractmethod
    def set(self, segments: Sequence[Segment]) -> None:
        """Bring the segments of the next replay into the memory that was captured. Never captured itself."""


class LoraKernel(ABC):
    """A way to compute low-rank products."""

    name: ClassVar[str]

    @abstractmethod
    def supports(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """None when it computes in `dtype` on `device`, else the reason why not."""

    @abstractmethod
    def plan(self, segments: Sequence[Segment]) -> LoraPlan:
        """Prepare every table that the products of these segments need, so that `add` makes none."""

    def plan_graph(self, rows: int, sites: Mapping[str, tuple[int, int]]) -> GraphLora | str:
        """Prepare steps of so many rows for capture, at sites `{path: (in, out)}`; else the reason why not."""
        return f"the LoRA kernel {self.name!r} cannot be captured"
