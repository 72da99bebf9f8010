"""The products of many adapters at one site.

Decides in which form they are computed: adapter by adapter through the library's matrix products, or all of them in one call
of the compiled one. Which is faster hangs on the machine, the shapes and the number of adapters, so both are timed on the work
itself, a few times for each kind of work, and the faster one does the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lorax_core.adapters.deltas import LowRank
from lorax_core.kernels.native.low_rank import PIECE, NativeProduct, load_native

_TRIALS = 3
"""How often each form is timed; the fastest counts, for others may use the machine too."""


class Updates:
    """Low-rank updates of runs of rows at one site: run `i` is rows `runs[i][0]` to `runs[i][1]`, its update `updates[i]`."""

    def __init__(self, runs: Sequence[tuple[int, int]], updates: Sequence[LowRank]) -> None:
        self.runs = tuple(runs)
        self.updates = tuple(updates)
        self.rows = sum(stop - start for start, stop in self.runs)
        self.rank = max(len(update.a) for update in self.updates)
        self._pieces: tuple[NDArray[np.void], int] | None = None

    def pieces(self) -> tuple[NDArray[np.void], int]:
        """The work as the compiled product takes it, and the scratch that it needs. Addresses hold while `updates` do."""
        if self._pieces is None:
            found: list[tuple[int, ...]] = []
            at = 0
            for (start, stop), update in zip(self.runs, self.updates, strict=True):
                for block in update.blocks:
                    a = update.a[block.ranks]
                    rank, width = block.b.shape
                    found.append((a.data_ptr(), block.b.data_ptr(), start, stop - start, rank, block.column, width, at))
                    at += (stop - start) * rank
            found.sort(key=lambda piece: piece[3] * piece[4] * piece[6], reverse=True)  # so that threads end together
            self._pieces = np.array(found, PIECE), at
        return self._pieces


class Form(Protocol):
    """A way to compute them."""

    def takes(self, x: Tensor, y: Tensor) -> bool:
        """Whether it can, for tensors like these."""

    def add(self, x: Tensor, y: Tensor, updates: Updates) -> None:
        """Add the updates to y `[rows, out]` for x `[rows, in]`."""


class OneByOne:
    """Adapter by adapter, through the library's matrix products: the readable one, for every device and dtype."""

    def takes(self, x: Tensor, y: Tensor) -> bool:
        return True

    def add(self, x: Tensor, y: Tensor, updates: Updates) -> None:
        for (start, stop), update in zip(updates.runs, updates.updates, strict=True):
            update.add(x[start:stop], y[start:stop])


class Compiled:
    """All adapters in one call."""

    def __init__(self, product: NativeProduct) -> None:
        self._product = product

    def takes(self, x: Tensor, y: Tensor) -> bool:
        plain = x.device.type == "cpu" and x.dtype is y.dtype and x.dtype in self._product.dtypes
        return plain and x.stride(-1) == 1 and y.stride(-1) == 1

    def add(self, x: Tensor, y: Tensor, updates: Updates) -> None:
        pieces, scratch = updates.pieces()
        self._product.add(x, y, pieces, scratch)


@dataclass(slots=True)
class _Trial:
    """Seconds that forms took for one kind of work, until each had its turns."""

    best: list[float]
    turns: int = 0
    chosen: Form | None = None


class Products:
    """Computes updates in the form that was fastest for work of their kind. One for each engine; not for several threads."""

    def __init__(self, forms: Sequence[Form] | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._given = tuple(forms) if forms is not None else None
        self._clock = clock
        self._trials: dict[Any, _Trial] = {}

    @property
    def _forms(self) -> tuple[Form, ...]:
        # Asked for when there is work: an engine without adapters compiles nothing.
        if self._given is None:
            self._given = available_forms()
        return self._given

    def add(self, x: Tensor, y: Tensor, updates: Updates) -> None:
        """Add the updates to y `[rows, out]` for x `[rows, in]`."""
        # Work is of one kind when its shapes are, and its rows and adapters number about the same.
        kind = (
            x.dtype,
            x.device.type,
            x.shape[1],
            y.shape[1],
            updates.rank,
            *map(_about, (updates.rows, len(updates.runs))),
        )
        trial = self._trials.get(kind)
        if trial is None:
            trial = self._trials[kind] = _Trial([float("inf")] * len(self._forms))
        if trial.chosen is not None:
            trial.chosen.add(x, y, updates)
            return
        forms = [number for number, form in enumerate(self._forms) if form.takes(x, y)]
        number = forms[trial.turns % len(forms)]
        if len(forms) > 1:
            started = self._clock()
            self._forms[number].add(x, y, updates)
            trial.best[number] = min(trial.best[number], self._clock() - started)
        else:
            self._forms[number].add(x, y, updates)
        trial.turns += 1
        if trial.turns >= _TRIALS * len(forms) or len(forms) == 1:
            trial.chosen = self._forms[min(forms, key=trial.best.__getitem__)]


def available_forms() -> tuple[Form, ...]:
    """The forms that this machine has, the readable one first."""
    product = load_native()
    return (OneByOne(),) if product is None else (OneByOne(), Compiled(product))


def _about(count: int) -> int:
    return count.bit_length()
