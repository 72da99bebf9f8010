"""Numbers on their way from the host to the GPU.

Decides when pinned memory may be written again: once the copies out of it are done. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class DeviceEvent(Protocol):
    """What is asked of `torch.cuda.Event`."""

    def record(self) -> None:
        """Mark this point of the device's work."""

    def synchronize(self) -> None:
        """Wait until the device has passed the last mark; at once when there is none."""


class Staging:
    """int32 rows in pinned memory, one set at a time: the copies of a set are over before the next one is written.

    One buffer is enough, and a second would save no wait: flashinfer's wrappers have a single pinned buffer each, which their
    `plan` rewrites. Without an event, on a CPU, "copies" may be the rows themselves, so every set has memory of its own.
    """

    def __init__(self, event: DeviceEvent | None, *, pinned: bool) -> None:
        self._event = event
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=torch.int32)

    @classmethod
    def of(cls, device: torch.device) -> Staging:
        """Staging for copies to a device."""
        on_gpu = device.type == "cuda"
        return cls(_event() if on_gpu else None, pinned=on_gpu)

    @contextmanager
    def rows(self, size: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function that puts numbers, `size` in all, into the staging memory and gives them back from there.

        All copies out of it are started before the block ends.
        """
        if self._event is not None:
            self._event.synchronize()
        if self._event is None or len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.int32, pin_memory=self._pinned)
        memory, used = self._memory, 0

        def put(numbers: Tensor) -> Tensor:
            nonlocal used
            placed = memory[used : used + len(numbers)].copy_(numbers)
            used += len(numbers)
            return placed

        try:
            yield put
        finally:
            if self._event is not None:
                self._event.record()


def _event() -> DeviceEvent:
    event: DeviceEvent = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event
