"""Numbers on their way from the device to the host.

Decides that one step needs one copy, however many tensors its answers are made of.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NUMPY = {torch.bool: np.bool_, torch.int64: np.int64, torch.float32: np.float32}


class Transfer:
    """Tensors of bool, int64 or float32 that are read together: `add` gives each a number, `start` copies all of them."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._flat: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._arrays: list[NDArray[Any]] | None = None

    def add(self, tensor: Tensor) -> int:
        """One more tensor to bring; the number under which `fetch` makes it available."""
        if tensor.dtype not in _NUMPY:
            raise TypeError(f"a transfer carries {list(_NUMPY)}, not {tensor.dtype}")
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def start(self) -> None:
        """Copy everything in one go, without waiting for it; what is launched later is not waited for either."""
        if not self._tensors:
            return
        # As bytes, so that tensors of different dtypes share one device-to-host copy.
        flat = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in self._tensors])
        self._flat = flat.to("cpu", non_blocking=True)
        if flat.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(flat.device))

    def fetch(self) -> None:
        """Wait for the copy. Idempotent; starts it where that was not done."""
        if self._arrays is not None:
            return
        if self._flat is None:
            self.start()
        self._arrays = []
        if self._flat is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        data = self._flat.numpy()
        at = 0
        for tensor in self._tensors:
            stop = at + tensor.numel() * tensor.element_size()
            # Copied, so that every array is aligned and none keeps the others alive.
            self._arrays.append(data[at:stop].copy().view(_NUMPY[tensor.dtype]).reshape(tuple(tensor.shape)))
            at = stop
        self._tensors, self._flat = [], None

    def __getitem__(self, number: int) -> NDArray[Any]:
        assert self._arrays is not None, "read before fetch()"
        return self._arrays[number]
